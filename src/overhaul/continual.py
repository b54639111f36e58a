"""The terms of continual learning: each holds a model to a reference, in the space of outputs or of weights.

| method | term | divergence | reference |
| ER | `Replayed` | KL(label, network) | labels from the memory |
| DER | `LogitsKept` | squared distance of logits | logits from the memory, as they were when it was filled |
| DER++ | both, of two draws | | |
| FDR | `PredictionsKept` | distance of probabilities | probabilities at the end of an example's task |
| LwF | `OldModel` | KL(old model, network) | the model before the task, on the task's own examples |
| PredKD | `OldSigmoids` | binary KL(old model, network) | as LwF |
| FeatKD | `FeaturesKept` | squared distance of features | as LwF |
| CPR | `Uniform` | KL(network, uniform) | the uniform distribution |
| EWC, L2 | `Pulled` | quadratic | weights before the task |
| VCL | `Believed` | KL(network, before) of weights | their distributions before the task |

The order of the arguments differs: labels and old predictions come first, before the network; against the uniform
distribution the network does (Wang et al., 2024, arXiv:2403.13249; PredKD and FeatKD: Smith et al., 2023,
arXiv:2203.17269).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, one_hot, pad

from overhaul.bregman import from_uniform, gaussians, kl, quadratic, squared
from overhaul.kinds import is_classifier
from overhaul.layers.variational import Distribution, distributions
from overhaul.objective import Batch, Forward, Objective, Term, Terms
from overhaul.reservoir import Reservoir, offered, remembered

WIDTH = "width"
"""In the memory, how many classes an example's logits were of."""


class Remembering(Objective):
    """An objective whose batches are offered to a memory after each step, a classifier's with the step's logits.

    Logits are those of the very pass that was trained on, not taken again afterwards; inputs are as the batch has them,
    or has them for the memory, where those that are trained on are augmented.

    Args:
        inner: what is minimised.
        memory: what batches are offered to.
        joined: whether draws from it go through the model in one pass with the batch.
    """

    def __init__(self, inner: Objective, memory: Reservoir, *, joined: bool = False) -> None:
        self.inner, self.memory, self.joined = inner, memory, joined
        self._trained: dict[int, dict[str, Tensor]] = {}

    def parts(self) -> tuple[tuple[float, Term], ...]:
        return self.inner.parts()

    def __call__(self, forward: Forward, batch: Batch) -> Terms:
        if self.joined:
            draws = {term.draw for _, term in self.parts() if isinstance(term, OnMemory) and term.count(batch)}
            forward.together({f"draw {draw}": remembered(batch, draw) for draw in sorted(draws)})
        terms = super().__call__(forward, batch)
        own = offered(batch)
        # By the batch: a step that looks at it twice, as refresh learning does, offers it once.
        classifies = is_classifier(forward.model)  # the logits of all words of a window are too many to keep
        kept = with_logits(own, forward.classified().logits) if classifies else own
        self._trained[id(batch["labels"])] = kept
        return terms

    def stepped(self, means: Mapping[str, float]) -> None:
        for examples in self._trained.values():
            self.memory.insert(examples)
        self._trained.clear()
        self.inner.stepped(means)


def with_logits(examples: Batch, logits_BC: Tensor) -> dict[str, Tensor]:
    """Examples as they are remembered: with the logits that a model has for them, and how many classes it had."""
    width_B = torch.full((len(logits_BC),), logits_BC.shape[1])
    return {**examples, "logits": logits_BC.detach().float(), WIDTH: width_B}


class Focused(Objective):
    """An objective of which, inside `alone()`, one term counts and the others do not.

    Args:
        inner: the whole.
        name: of the term.
    """

    def __init__(self, inner: Objective, name: str) -> None:
        self.inner, self.name, self.is_alone = inner, name, False

    def parts(self) -> tuple[tuple[float, Term], ...]:
        parts = self.inner.parts()
        return tuple(part for part in parts if part[1].name == self.name) if self.is_alone else parts

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """Inside, the one term is all there is."""
        self.is_alone = True
        try:
            yield
        finally:
            self.is_alone = False

    def stepped(self, means: Mapping[str, float]) -> None:
        self.inner.stepped(means)


class OnMemory(Term):
    """A term over a draw from memory; without one it is nothing.

    Args:
        draw: its number, counted from 1.
    """

    def __init__(self, draw: int = 1) -> None:
        self.draw = draw

    def total(self, forward: Forward, batch: Batch) -> Tensor:
        if not self.count(batch):
            return next(forward.model.parameters()).new_zeros((), dtype=torch.float32)
        beside = forward.beside(f"draw {self.draw}", remembered(batch, self.draw))
        return self.of_each(beside.classified().logits.float(), beside.batch).sum()

    def count(self, batch: Batch) -> int:
        drawn = remembered(batch, self.draw)
        return len(drawn["labels"]) if drawn else 0

    def of_each(self, logits_BC: Tensor, drawn: Batch) -> Tensor:
        """`(B,)` of the draw's examples."""
        raise NotImplementedError


class Replayed(OnMemory):
    """Experience replay (ER): the cross-entropy of remembered examples, `KL(label || network)`."""

    name = "replayed"

    def of_each(self, logits_BC: Tensor, drawn: Batch) -> Tensor:
        labels_BC = one_hot(drawn["labels"], logits_BC.shape[1]).to(logits_BC.dtype)
        return kl(labels_BC, logits_BC.log_softmax(dim=-1))


class LogitsKept(OnMemory):
    """Dark experience replay (DER, Buzzega et al., 2020): the mean squared distance to remembered logits.

    The mean is over the classes that there were when the example was remembered, as the authors' code has it; the sum,
    which is the divergence of the squared norm, is that times their number.
    """

    name = "logits_kept"

    def of_each(self, logits_BC: Tensor, drawn: Batch) -> Tensor:
        known_BC, width_B = _known(logits_BC, drawn)
        kept_BC = _kept(logits_BC, drawn)
        return squared(logits_BC * known_BC, kept_BC * known_BC) / width_B


class PredictionsKept(OnMemory):
    """Function distance regularisation (FDR, Benjamin et al., 2019): the distance of probabilities, not squared."""

    name = "predictions_kept"

    def of_each(self, logits_BC: Tensor, drawn: Batch) -> Tensor:
        known_BC, _ = _known(logits_BC, drawn)
        now_BC, then_BC = (
            logits.masked_fill(~known_BC, -torch.inf).softmax(dim=-1) for logits in (logits_BC, _kept(logits_BC, drawn))
        )
        # The root has no gradient at zero, where a prediction is still what it was.
        return (squared(now_BC, then_BC) + 1e-12).sqrt()


def _kept(logits_BC: Tensor, drawn: Batch) -> Tensor:
    """The remembered logits, as wide as those of now; a head may have grown since."""
    kept_BC = drawn["logits"].to(logits_BC)
    return pad(kept_BC, (0, logits_BC.shape[1] - kept_BC.shape[1]))


def _known(logits_BC: Tensor, drawn: Batch) -> tuple[Tensor, Tensor]:
    """The classes that there were when each example was remembered, `(B, C)`, and how many, `(B,)`."""
    width_B = drawn[WIDTH].to(logits_BC.device)
    return torch.arange(logits_BC.shape[1], device=logits_BC.device) < width_B[:, None], width_B


class OldModel(Term):
    """Learning without forgetting (LwF, Li and Hoiem, 2016): `KL(old || network)` over old classes, of new examples.

    Args:
        old: the model before the task, frozen.
        classes: that it had.
        temperature: that both logits are divided by; the term is multiplied by its square, which keeps the gradient's
            size.
    """

    name = "old_model"

    def __init__(self, old: nn.Module, classes: int, temperature: float = 2.0) -> None:
        self.old, self.classes, self.temperature = old, classes, temperature

    def total(self, forward: Forward, batch: Batch) -> Tensor:
        theirs_BC, ours_BC = (
            one.classified().logits[:, : self.classes].float() / self.temperature
            for one in (forward.of(self.old), forward)
        )
        return self.temperature**2 * kl(theirs_BC.softmax(dim=-1), ours_BC.log_softmax(dim=-1)).sum()

    def count(self, batch: Batch) -> int:
        return len(batch["labels"])

    def held_bytes(self) -> int:
        return sum(p.nbytes for p in self.old.parameters())


class OldSigmoids(Term):
    """Prediction distillation with a head of binary classifiers (PredKD of Smith et al., 2023, after LwF.MC).

    The cross-entropy of the old model's sigmoids and the network's, less the old one's entropy: where they agree it is
    zero, and so is its gradient. Summed over old classes, of new examples.

    Args:
        old: the model before the task, frozen.
        classes: that it had: the first so many.
    """

    name = "old_model"

    def __init__(self, old: nn.Module, classes: int) -> None:
        self.old, self.classes = old, classes

    def total(self, forward: Forward, batch: Batch) -> Tensor:
        theirs_BC, ours_BC = (
            one.classified().logits[:, : self.classes].float() for one in (forward.of(self.old), forward)
        )
        p_BC = theirs_BC.sigmoid()
        crossed, own = (
            binary_cross_entropy_with_logits(logits, p_BC, reduction="sum") for logits in (ours_BC, theirs_BC)
        )
        return crossed - own

    def count(self, batch: Batch) -> int:
        return len(batch["labels"])

    def held_bytes(self) -> int:
        return sum(p.nbytes for p in self.old.parameters())


class FeaturesKept(Term):
    """Feature distillation (FeatKD): the squared distance of a layer's output to the old model's, of new examples.

    Args:
        old: the model before the task, frozen.
        layer: the dotted name of a layer, or `PENULTIMATE` for what the head reads.
    """

    name = "features_kept"

    def __init__(self, old: nn.Module, layer: str) -> None:
        self.old, self.layer, self.reads_features = old, layer, (layer,)

    def total(self, forward: Forward, batch: Batch) -> Tensor:
        theirs, ours = (one.features(self.layer).float() for one in (forward.of(self.old), forward))
        return (ours - theirs).square().sum()

    def count(self, batch: Batch) -> int:
        return len(batch["labels"])

    def held_bytes(self) -> int:
        return sum(p.nbytes for p in self.old.parameters())


class Uniform(Term):
    """Classifier-projection regularisation (CPR, Cha et al., 2021): `KL(network || uniform)`, which rewards entropy.

    Args:
        classes: that compete: the first so many.
    """

    name = "uniform"

    def __init__(self, classes: int) -> None:
        self.classes = classes

    def total(self, forward: Forward, batch: Batch) -> Tensor:
        return from_uniform(forward.classified().logits[:, : self.classes].float().log_softmax(dim=-1)).sum()

    def count(self, batch: Batch) -> int:
        return len(batch["labels"])


class Pulled(Term):
    """`1/2 sum F (theta - theta_old)^2`: EWC (Kirkpatrick et al., 2017) with Fisher information, L2 without.

    Args:
        anchor: weights to stay near, by name. A parameter that is larger now, as a head that has grown, is held where
            it was before.
        curvature: F, by name and in the shapes of `anchor`; None for ones.

    Raises:
        ValueError: names or shapes of the two differ, or curvature is negative or not finite.
    """

    name = "pulled"

    def __init__(self, anchor: Mapping[str, Tensor], curvature: Mapping[str, Tensor] | None = None) -> None:
        for name, tensor in (curvature or {}).items():
            if name not in anchor or anchor[name].shape != tensor.shape:
                raise ValueError(f"curvature of {name} fits no weight that is held")
            if not tensor.isfinite().all() or (tensor < 0).any():
                raise ValueError(f"curvature of {name} is negative, NaN or infinite")
        self.anchor, self.curvature = anchor, curvature
        self._held = dict(anchor) if curvature is None else {name: anchor[name] for name in curvature}
        self._old = _flat(self._held.values())
        self._information = 1.0 if curvature is None else _flat(curvature.values())

    def total(self, forward: Forward, batch: Batch) -> Tensor:
        own = dict(forward.model.named_parameters())
        # As one vector: a step would else spend more on small tensors than on their numbers.
        now = _flat(_as_before(own[name], old) for name, old in self._held.items())
        return quadratic(now, self._old, self._information)

    def count(self, batch: Batch) -> int:
        return 1  # of each micro-batch the same, so that their mean is it

    def held_bytes(self) -> int:
        return 2 * sum(tensor.nbytes for kept in (self.anchor, self.curvature or {}) for tensor in kept.values())


class Believed(Term):
    """Variational continual learning (VCL, Nguyen et al., 2018, eq. 4): `KL(q || q_old)`, in nats over all weights.

    With the mean cross-entropy of N examples, the paper's bound is that and 1 / N of this.

    Args:
        before: q_old of each weight with a distribution, by its name and in its shape.
    """

    name = "believed"

    def __init__(self, before: Mapping[str, Distribution]) -> None:
        self.before = before
        self._mean, self._log_std = (_flat(parts) for parts in zip(*before.values(), strict=True))

    def total(self, forward: Forward, batch: Batch) -> Tensor:
        own = distributions(forward.model)
        mean, log_std = (_flat(parts) for parts in zip(*(own[name] for name in self.before), strict=True))
        return gaussians(mean, log_std, self._mean, self._log_std)

    def count(self, batch: Batch) -> int:
        return 1  # of each micro-batch the same, so that their mean is it

    def held_bytes(self) -> int:
        return sum(tensor.nbytes for old in self.before.values() for tensor in old)


def _flat(tensors: Iterable[Tensor]) -> Tensor:
    """All numbers of some tensors as one vector."""
    return torch.cat([tensor.reshape(-1) for tensor in tensors])


def _as_before(parameter: Tensor, old: Tensor) -> Tensor:
    """The part of a parameter that was there before it grew."""
    if parameter.shape == old.shape:
        return parameter
    return parameter[tuple(slice(size) for size in old.shape)]
