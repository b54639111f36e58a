"""Objectives are an algebra of small terms, each a sum and a count.

    CrossEntropy() + 0.5 * Distill(teacher)

A term returns a total over what it counts; the loop divides by the count over all micro-batches and processes, once.
So accumulating four micro-batches, or training on two processes, gives the loss of one large batch.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy

from overhaul.cross_entropy import linear_cross_entropy, logits_cross_entropy
from overhaul.interop import hf
from overhaul.interop.classifier import INPUTS, Classified, classified
from overhaul.interop.fused import fused
from overhaul.kinds import is_classifier
from overhaul.stream import IGNORED

Batch = Mapping[str, Tensor]


@dataclass(frozen=True, slots=True)
class Mean:
    """A weighted mean in two parts: `weight * total / count`."""

    total: Tensor
    count: int
    weight: float = 1.0


Terms = dict[str, Mean]


class Forward:
    """One micro-batch through the model, computed once however many terms look at it."""

    def __init__(self, model: nn.Module, batch: Batch) -> None:
        self.model, self.batch = model, batch
        self._keeps_states = False
        self._layers: tuple[str, ...] = ()
        self._outputs: hf.Outputs | None = None
        self._classified: Classified | None = None
        self._references: dict[nn.Module, Forward] = {}
        self._beside: dict[str, Forward] = {}

    def keep_states(self) -> None:
        """Says, before the pass, that hidden states between the blocks will be looked at."""
        self._keeps_states = True

    def keep_features(self, layers: Sequence[str]) -> None:
        """Says, before the pass through a classifier, whose outputs will be looked at, by the layers' dotted names."""
        self._layers = tuple(dict.fromkeys((*self._layers, *layers)))

    def run(self) -> None:
        """Makes the pass now, of whatever kind the model is."""
        if is_classifier(self.model):
            self.classified()
        else:
            self.outputs()

    def outputs(self) -> hf.Outputs:
        """Last hidden states, or logits where the model's are more than a linear map of these."""
        if self._outputs is None:
            self._outputs = hf.outputs(self.model, self.batch, states=self._keeps_states)
        return self._outputs

    def classified(self) -> Classified:
        """Of a classifier, logits `(B, C)` and the outputs of the layers that `keep_features` named."""
        if self._classified is None:
            self._classified = classified(self.model, self.batch, self._layers)
        return self._classified

    def features(self, layer: str) -> Tensor:
        """What a layer of a classifier gives for each example, `(B, ...)`; `keep_features` must have named it."""
        return self.classified().features[layer]

    def hidden(self) -> Tensor:
        """Last hidden states `(B, T, D)`, before the output embedding."""
        hidden_BTD = self.outputs().hidden
        assert hidden_BTD is not None, "a model whose logits are more than a linear map gives logits only"
        return hidden_BTD

    def states(self) -> tuple[Tensor, ...]:
        """The embedding's output and every block's `(B, T, D)`; `keep_states` must have been called before the pass."""
        states = self.outputs().states
        assert states is not None, "keep_states() comes before the pass"
        return states

    def beside(self, name: str, batch: Batch) -> Forward:
        """Other examples through the same model, with gradients, once however many terms ask for those of that name."""
        if name not in self._beside:
            self._beside[name] = Forward(self.model, batch)
        return self._beside[name]

    def together(self, others: Mapping[str, Batch]) -> None:
        """One pass of a classifier for this micro-batch and others, which `beside` has then; they share statistics.

        Args:
            others: by the name that `beside` knows them under.
        """
        beside = [self, *(self.beside(name, batch) for name, batch in others.items())]
        names = [name for name in INPUTS if name in self.batch]
        found = classified(self.model, {name: torch.cat([one.batch[name] for one in beside]) for name in names})
        sizes = [len(one.batch["labels"]) for one in beside]
        for one, logits_BC in zip(beside, found.logits.split(sizes), strict=True):
            one._classified = Classified(logits_BC, {})

    def of(self, reference: nn.Module) -> Forward:
        """The same micro-batch through a frozen model, without gradients, once however many terms ask for it."""
        if reference not in self._references:
            forward = self._references[reference] = Forward(reference, self.batch)
            forward._keeps_states, forward._layers = self._keeps_states, self._layers
            with torch.no_grad(), fused(reference):
                forward.run()
        return self._references[reference]


class Objective(ABC):
    """What to minimise: one or more terms."""

    @abstractmethod
    def parts(self) -> tuple[tuple[float, Term], ...]:
        """The terms with their weights, as they are in this step."""

    def stepped(self, means: Mapping[str, float]) -> None:  # noqa: B027 - most objectives keep nothing
        """Takes note of a finished step, or of the last one before a run that is resumed.

        Args:
            means: by term, its total over its count in the whole step, all micro-batches and processes together.
        """

    def __call__(self, forward: Forward, batch: Batch) -> Terms:
        """The terms of one micro-batch, by name."""
        if any(term.reads_states for _, term in self.parts()):
            forward.keep_states()
        forward.keep_features([layer for _, term in self.parts() for layer in term.reads_features])
        return {
            name: Mean(term.total(forward, batch), term.count(batch), weight)
            for name, (weight, term) in self.named().items()
        }

    def counts(self, batch: Batch) -> dict[str, int]:
        """What each term counts in this micro-batch; known before the forward pass."""
        return {name: term.count(batch) for name, (_, term) in self.named().items()}

    def named(self) -> dict[str, tuple[float, Term]]:
        """The weighted terms by name; a second term of one name gets a number."""
        named: dict[str, tuple[float, Term]] = {}
        for weight, term in self.parts():
            same = sum(name.split("#")[0] == term.name for name in named)
            named[f"{term.name}#{same + 1}" if same else term.name] = (weight, term)
        return named

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """The objective itself: the sharded twin of a model has the same one, with its weights and frozen teacher."""
        return self

    def __add__(self, other: Objective) -> Objective:
        return Weighted(((1.0, self), (1.0, other)))

    def __rmul__(self, weight: float) -> Objective:
        return Weighted(((weight, self),))


class Weighted(Objective):
    """A weighted sum of objectives."""

    def __init__(self, summands: tuple[tuple[float, Objective], ...]) -> None:
        self._summands = summands

    def parts(self) -> tuple[tuple[float, Term], ...]:
        return tuple((weight * own, term) for weight, inner in self._summands for own, term in inner.parts())

    def stepped(self, means: Mapping[str, float]) -> None:
        for _, inner in self._summands:
            inner.stepped(means)


class Balanced(Objective):
    """`main + alpha * other` with alpha = main / other, so that both count alike, whatever units they come in.

    Alpha is that of the step before: a step's own is known only when its last micro-batch, on the last process, is
    done. The first step, which has none before it, is on `main` alone.
    """

    def __init__(self, main: Term, other: Term) -> None:
        self.main, self.other = main, other
        self.alpha = 0.0

    def parts(self) -> tuple[tuple[float, Term], ...]:
        return ((1.0, self.main), (self.alpha, self.other))

    def stepped(self, means: Mapping[str, float]) -> None:
        other = means[self.other.name]
        self.alpha = means[self.main.name] / other if other > 0 else 0.0


class Term(Objective):
    """One quantity under one name, with weight 1."""

    name: str
    reads_states: bool = False
    """Whether it looks at hidden states between the blocks."""
    reads_features: tuple[str, ...] = ()
    """Layers of a classifier whose output it looks at."""

    def parts(self) -> tuple[tuple[float, Term], ...]:
        return ((1.0, self),)

    @abstractmethod
    def total(self, forward: Forward, batch: Batch) -> Tensor:
        """The sum over what `count` counts; a scalar with gradient."""

    def count(self, batch: Batch) -> int:
        """Trained labels; the first position of a window has no prediction."""
        return int((batch["labels"][:, 1:] != IGNORED).sum())

    def held_bytes(self) -> int:
        """Memory of tensors that it keeps of its own all the time."""
        return 0


class CrossEntropy(Term):
    """Next-token cross-entropy in nats, without ever holding all logits."""

    name = "cross_entropy"

    def total(self, forward: Forward, batch: Batch) -> Tensor:
        labels_N, head = batch["labels"][:, 1:].reshape(-1), hf.head(forward.model)
        if head is None:
            return logits_cross_entropy(predicting(forward.outputs().logits), labels_N)
        return linear_cross_entropy(predicting(forward.outputs().hidden), head.weight, labels_N, head.bias)


class ClassCrossEntropy(Term):
    """Cross-entropy of a classifier in nats, over examples.

    Args:
        classes: those that compete, by their place among the logits; None for all. A label that is not among them is
            an error of the caller.
        passes: of each micro-batch, over which it is averaged: for models that draw their weights anew in each.
        smoothing: share of each label that is spread over all classes (Szegedy et al., 2016); with it none may be left
            out.
    """

    name = "cross_entropy"

    def __init__(self, classes: Tensor | None = None, *, passes: int = 1, smoothing: float = 0.0) -> None:
        assert classes is None or not smoothing, "what is spread would be lost on classes that do not compete"
        self.classes, self.passes, self.smoothing = classes, passes, smoothing

    def total(self, forward: Forward, batch: Batch) -> Tensor:
        total = self._of(forward, batch)
        for number in range(2, self.passes + 1):
            total = total + self._of(forward.beside(f"pass {number}", batch), batch)
        return total / self.passes if self.passes > 1 else total

    def _of(self, forward: Forward, batch: Batch) -> Tensor:
        logits_BC = forward.classified().logits
        if self.classes is not None:
            logits_BC = only(logits_BC, self.classes)
        how = {"reduction": "sum", "label_smoothing": self.smoothing}
        return cross_entropy(logits_BC.float(), batch["labels"], **how)

    def count(self, batch: Batch) -> int:
        return len(batch["labels"])


class BinaryCrossEntropy(Term):
    """Binary cross-entropy in nats of some classes, each a classifier of its own, summed over them; over examples.

    Unlike a softmax it says nothing of the other classes: those of older tasks are not pushed down by new examples.

    Args:
        classes: by their place among the logits; a label is one of them.
    """

    name = "cross_entropy"

    def __init__(self, classes: Sequence[int]) -> None:
        self.classes = torch.tensor(classes)

    def total(self, forward: Forward, batch: Batch) -> Tensor:
        logits_BC = forward.classified().logits
        classes_K = self.classes.to(logits_BC.device)
        target_BK = (batch["labels"][:, None] == classes_K).float()
        return binary_cross_entropy_with_logits(logits_BC[:, classes_K].float(), target_BK, reduction="sum")

    def count(self, batch: Batch) -> int:
        return len(batch["labels"])


def only(logits_BC: Tensor, classes: Tensor) -> Tensor:
    """The logits with all but those of some classes at minus infinity."""
    kept_C = torch.zeros(logits_BC.shape[1], dtype=torch.bool, device=logits_BC.device)
    kept_C[classes.to(logits_BC.device)] = True
    return logits_BC.masked_fill(~kept_C, -torch.inf)


class Anchor(Term):
    """The squared distance of parameters from where they began, `||theta - theta_0||^2`."""

    name = "anchor"

    def __init__(self, start: Mapping[str, Tensor]) -> None:
        self.start = start

    def total(self, forward: Forward, batch: Batch) -> Tensor:
        own = dict(forward.model.named_parameters())
        return torch.stack([(own[name] - start).square().sum() for name, start in self.start.items()]).sum()

    def count(self, batch: Batch) -> int:
        return 1  # of each micro-batch the same, so that their mean is it

    def held_bytes(self) -> int:
        return sum(start.nbytes for start in self.start.values())


class ParameterNorms(Term):
    """The sum of tensors' L2 norms, which are not squared.

    Args:
        parameters: of which each has a norm of its own.
    """

    name = "norms"

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        self.parameters = list(parameters)

    def total(self, forward: Forward, batch: Batch) -> Tensor:
        return torch.stack([torch.linalg.vector_norm(parameter) for parameter in self.parameters]).sum()

    def count(self, batch: Batch) -> int:
        return 1  # of each micro-batch the same, so that their mean is it


def predicting(values_BTX: Tensor | None) -> Tensor:
    """`(N, X)` values at the places that predict a token, as `batch["labels"][:, 1:]` has them in order."""
    assert values_BTX is not None
    return values_BTX[:, :-1].reshape(-1, values_BTX.shape[-1])


def weighted_mean(terms: Mapping[str, Mean], counts: Mapping[str, int]) -> Tensor:
    """The loss: each term's total over its count in the whole step, weighted and summed."""
    losses: list[Any] = [mean.weight * mean.total / max(counts[name], 1) for name, mean in terms.items()]
    return torch.stack([loss.float() for loss in losses]).sum()
