"""Losses that unlearn texts, and those that hold on to others.

| method | of the texts to forget |
| --- | --- |
| GA | `CE`, with the sign turned |
| NPO | `2 / beta * softplus(beta * (log p - log p_ref))` |
| SimNPO | `2 / beta * softplus(beta * (log p / |y| + gamma))` |
| RMU | `|h - c u|^2` of the states of one block; adaptive, `|h - c |h_ref| u|^2` |

`log p` is the sum over the labels of a text, as the papers write it; published code took differences of raw logits over
the whole vocabulary instead (Shi et al., MUSE, ICLR 2025; Zhang et al., NPO, 2024; Fan et al., SimNPO, 2024; Li et al.,
RMU, 2024). What is held on to is read beside them: cross-entropy (GDR), the divergence from the model before (KLR), or
its states (RMU).

Letters of shapes: B texts, T tokens, D width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from overhaul.cross_entropy import linear_cross_entropy, logits_cross_entropy
from overhaul.interop import hf
from overhaul.objective import Batch, Forward, Term
from overhaul.stream import IGNORED, part

REFERENCE = "reference"
"""In a batch, the log-probability of each text under the model before."""
RETAINED = "retain"
"""The part of a batch that is of the texts to retain."""


class Beside(Term):
    """A term over the texts to retain, which go through the model by themselves.

    Args:
        inner: the term.
    """

    def __init__(self, inner: Term) -> None:
        self.inner, self.name = inner, f"retain_{inner.name}"
        self.reads_states = False  # the pass beside is told by itself

    def total(self, forward: Forward, batch: Batch) -> Tensor:
        beside = forward.beside(RETAINED, part(batch, RETAINED))
        if self.inner.reads_states:
            beside.keep_states()
        return self.inner.total(beside, beside.batch)

    def count(self, batch: Batch) -> int:
        return self.inner.count(part(batch, RETAINED))


def log_probabilities(forward: Forward, batch: Batch) -> Tensor:
    """`(B,)`: of each text the sum of its labels' log-probabilities in nats, without ever holding all logits."""
    labels_BT, head, made = batch["labels"][:, 1:], hf.head(forward.model), forward.outputs()
    sums = []
    for row, labels_T in enumerate(labels_BT):
        if head is None or made.hidden is None:
            assert made.logits is not None
            sums.append(-logits_cross_entropy(made.logits[row, :-1], labels_T))
        else:
            sums.append(-linear_cross_entropy(made.hidden[row, :-1], head.weight, labels_T, head.bias))
    return torch.stack(sums)


class NegativePreference(Term):
    """NPO (Zhang et al., 2024, equation 3): `-2 / beta * log sigmoid(-beta * log(p / p_ref))`, the mean over texts.

    Its gradient is that of `W log p` with `W = 2 p^beta / (p^beta + p_ref^beta)`: gradient ascent where the model is
    as it was, and ever less of it the less likely a text becomes.

    Args:
        beta: above 0; towards 0 it is gradient ascent.
    """

    name = "npo"

    def __init__(self, beta: float) -> None:
        self.beta = beta

    def total(self, forward: Forward, batch: Batch) -> Tensor:
        ratios_B = log_probabilities(forward, batch) - batch[REFERENCE]
        return (2 / self.beta * softplus(self.beta * ratios_B)).sum()

    def count(self, batch: Batch) -> int:
        return len(batch["labels"])


class SimpleNegativePreference(Term):
    """SimNPO (Fan et al., 2024): `-2 / beta * log sigmoid(beta * (-log p / |y| - gamma))`, the mean over texts.

    Args:
        beta: above 0.
        gamma: the loss in nats a token that is asked for; beyond it little is unlearnt.
    """

    name = "simnpo"

    def __init__(self, beta: float, gamma: float) -> None:
        self.beta, self.gamma = beta, gamma

    def total(self, forward: Forward, batch: Batch) -> Tensor:
        lengths_B = (batch["labels"][:, 1:] != IGNORED).sum(dim=1).clamp_min(1)
        losses_B = -log_probabilities(forward, batch) / lengths_B
        return (2 / self.beta * softplus(-self.beta * (losses_B - self.gamma))).sum()

    def count(self, batch: Batch) -> int:
        return len(batch["labels"])


def direction(model: nn.Module) -> Tensor:
    """`(D,)` of norm 1: a direction of the hidden states, drawn from the unit cube as the authors' code does."""
    drawn_D = torch.rand(hf.width(model.config))  # pyright: ignore[reportArgumentType]
    return (drawn_D / drawn_D.norm()).to(next(model.parameters()).device)


class Misdirected(Term):
    """RMU (Li et al., 2024): the mean square between a block's states and one random direction, over tokens and width.

    Args:
        layer: the block, from 1.
        direction_D: of norm 1, times a coefficient.
        reference: the model before, frozen: each token's direction is as long as its state there, times its norm
            (Adaptive RMU: Huu-Tien et al., 2025, equation 9). Without one all are as long.
    """

    name = "misdirected"
    reads_states = True

    def __init__(self, layer: int, direction_D: Tensor, reference: nn.Module | None = None) -> None:
        self.layer, self.direction_D, self.reference = layer, direction_D, reference

    def total(self, forward: Forward, batch: Batch) -> Tensor:
        states_BTD, target = forward.states()[self.layer].float(), self.direction_D
        if self.reference is not None:
            target = target * forward.of(self.reference).states()[self.layer].float().norm(dim=-1, keepdim=True)
        return (states_BTD - target).square().mean(dim=-1).sum()

    def count(self, batch: Batch) -> int:
        return batch["input_ids"].numel()


class StatesKept(Term):
    """RMU's other half: the mean square between a block's states and those of the model before.

    Args:
        layer: the block, from 1.
        reference: the model before, frozen.
    """

    name = "states_kept"
    reads_states = True

    def __init__(self, layer: int, reference: nn.Module) -> None:
        self.layer, self.reference = layer, reference

    def total(self, forward: Forward, batch: Batch) -> Tensor:
        before_BTD = forward.of(self.reference).states()[self.layer].float()
        return (forward.states()[self.layer].float() - before_BTD).square().mean(dim=-1).sum()

    def count(self, batch: Batch) -> int:
        return batch["input_ids"].numel()
