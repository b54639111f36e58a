"""Objectives are an algebra of small terms, each a sum and a count.

    CrossEntropy() + 0.5 * Distill(teacher)

A term returns a total over what it counts; the loop divides by the count over all micro-batches and processes, once.
So accumulating four micro-batches, or training on two processes, gives the loss of one large batch.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from overhaul.cross_entropy import linear_cross_entropy
from overhaul.interop import hf
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
        self._hidden: Tensor | None = None

    def hidden(self) -> Tensor:
        """Last hidden states `(B, T, D)`, before the output embedding."""
        if self._hidden is None:
            self._hidden = hf.hidden_states(self.model, self.batch)
        return self._hidden

    def of(self, reference: nn.Module) -> Forward:
        """The same micro-batch through a frozen model, without gradients."""
        with torch.no_grad():
            forward = Forward(reference, self.batch)
            forward.hidden()
        return forward


class Objective(ABC):
    """What to minimise: one or more terms."""

    @abstractmethod
    def parts(self) -> tuple[tuple[float, Term], ...]:
        """The terms with their weights."""

    def __call__(self, forward: Forward, batch: Batch) -> Terms:
        """The terms of one micro-batch, by name."""
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

    def __add__(self, other: Objective) -> Objective:
        return Weighted(self.parts() + other.parts())

    def __rmul__(self, weight: float) -> Objective:
        return Weighted(tuple((weight * own, term) for own, term in self.parts()))


class Weighted(Objective):
    """A weighted sum of terms."""

    def __init__(self, parts: tuple[tuple[float, Term], ...]) -> None:
        self._parts = parts

    def parts(self) -> tuple[tuple[float, Term], ...]:
        return self._parts


class Term(Objective):
    """One quantity under one name, with weight 1."""

    name: str

    def parts(self) -> tuple[tuple[float, Term], ...]:
        return ((1.0, self),)

    @abstractmethod
    def total(self, forward: Forward, batch: Batch) -> Tensor:
        """The sum over what `count` counts; a scalar with gradient."""

    def count(self, batch: Batch) -> int:
        """Trained labels; the first position of a window has no prediction."""
        return int((batch["labels"][:, 1:] != IGNORED).sum())


class CrossEntropy(Term):
    """Next-token cross-entropy in nats, without ever holding all logits."""

    name = "cross_entropy"

    def total(self, forward: Forward, batch: Batch) -> Tensor:
        head = hf.head(forward.model)
        if head is None:
            return hf.unchunked_cross_entropy(forward.model, batch)
        hidden_BTD = forward.hidden()[:, :-1]
        return linear_cross_entropy(
            hidden_BTD.reshape(-1, hidden_BTD.shape[-1]),
            head.weight,
            batch["labels"][:, 1:].reshape(-1),
            head.bias,
        )


def weighted_mean(terms: Mapping[str, Mean], counts: Mapping[str, int]) -> Tensor:
    """The loss: each term's total over its count in the whole step, weighted and summed."""
    losses: list[Any] = [mean.weight * mean.total / max(counts[name], 1) for name, mean in terms.items()]
    return torch.stack([loss.float() for loss in losses]).sum()
