"""A frozen linear layer with increments of low rank, some of which are added for each row of a batch; and heads."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Choice:
    """Which increments are added for each row of the batch that a model is given next, in all of its layers.

    Attributes:
        entries_BK: their places; None for the frozen model alone.
        weights_BK: by which each counts.
    """

    def __init__(self) -> None:
        self.entries_BK: Tensor | None = None
        self.weights_BK: Tensor | None = None

    def take(self, entries_BK: Tensor, weights_BK: Tensor) -> None:
        """From here on these are added."""
        self.entries_BK, self.weights_BK = entries_BK, weights_BK

    def nothing(self) -> None:
        """From here on the model is the frozen one."""
        self.entries_BK = self.weights_BK = None


class JointlyAdapted(nn.Module):
    """`W x + sum_k w_k A_k^T B_k x` for each row of a batch (joint adaptive re-parameterisation, Peng et al., 2024).

    No matrix `A^T B` is ever built. An entry begins with A = 0, and so changes nothing.

    Args:
        linear: W, frozen.
        choice: of the entries k and their weights w, which all layers of a model share.
        entries: how many there are.
        rank: rows of each A and B.
    """

    def __init__(self, linear: nn.Linear, choice: Choice, *, entries: int, rank: int) -> None:
        super().__init__()
        self.linear, self.choice = linear, choice
        weight = linear.weight
        self.down_PRI = nn.Parameter(torch.randn(entries, rank, linear.in_features, device=weight.device))
        self.up_PRO = nn.Parameter(torch.zeros(entries, rank, linear.out_features, device=weight.device))

    @property
    def weight(self) -> Tensor:
        """The frozen weight."""
        return self.linear.weight

    def forward(self, x_BTI: Tensor) -> Tensor:
        """Maps `(B, T, I)` to `(B, T, O)`; the choice has B rows, or one for all."""
        y_BTO = self.linear(x_BTI)
        if self.choice.entries_BK is None or self.choice.weights_BK is None:
            return y_BTO
        down_BKRI, up_BKRO = self.down_PRI[self.choice.entries_BK], self.up_PRO[self.choice.entries_BK]
        inner_BTKR = torch.einsum("bti,bkri->btkr", x_BTI, down_BKRI.to(x_BTI.dtype))
        inner_BTKR = inner_BTKR * self.choice.weights_BK[:, None, :, None].to(x_BTI.dtype)
        return y_BTO + torch.einsum("btkr,bkro->bto", inner_BTKR, up_BKRO.to(x_BTI.dtype))

    def increment(self, row: int = 0) -> Tensor:
        """`(O, I)`: what is added to W for a row of the choice, as one matrix."""
        assert self.choice.entries_BK is not None
        assert self.choice.weights_BK is not None
        entries_K, weights_K = self.choice.entries_BK[row], self.choice.weights_BK[row]
        return torch.einsum("k,kro,kri->oi", weights_K, self.up_PRO[entries_K], self.down_PRI[entries_K])


class JointHead(nn.Module):
    """`W_k x + b_k` for each row of a batch: a head in place of which every entry k has one of its own.

    Args:
        linear: the head that is there, whose shape all have.
        choice: of one entry for each row, which all layers of a model share.
        entries: how many there are.
    """

    def __init__(self, linear: nn.Linear, choice: Choice, *, entries: int) -> None:
        super().__init__()
        self.linear, self.choice, self.entries = linear, choice, entries
        self.own = nn.ParameterDict({
            name: nn.Parameter(torch.zeros(entries, *place.shape, device=place.device), requires_grad=False)
            for name, place in linear.named_parameters()
        })  # fmt: skip

    def forward(self, x_BXI: Tensor) -> Tensor:
        """Maps `(B, ..., I)` to `(B, ..., C)`; the choice has B rows."""
        if self.choice.entries_BK is None:
            return self.linear(x_BXI)
        chosen_B = self.choice.entries_BK[:, 0]
        weight_BCI = self.own["weight"][chosen_B]
        logits_BXC = torch.einsum("b...i,bci->b...c", x_BXI.to(weight_BCI.dtype), weight_BCI)
        if "bias" in self.own:
            logits_BXC = logits_BXC + self.own["bias"][chosen_B].view(len(chosen_B), *[1] * (x_BXI.dim() - 2), -1)
        return logits_BXC
