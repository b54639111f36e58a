"""A linear layer that knows which of its weights were pruned."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn


class MaskedLinear(nn.Linear):
    """A linear layer whose zeros are a fact, not a guess: a kept weight may be 0, a pruned one must be.

    The mask is a buffer that is not part of the state dict, so that the weights stay a stock checkpoint; an
    `Artifact` stores it beside them. The weight is zero wherever the mask is False; `enforce` restores that
    after an update.
    """

    mask: Tensor  # (out, in) bool, True = kept

    @classmethod
    def from_linear(cls, linear: nn.Linear, mask_OI: Tensor) -> MaskedLinear:
        """Takes over the parameters of `linear` (no copy) and zeroes what `mask_OI` does not keep."""
        layer = cls(linear.in_features, linear.out_features, bias=False, device="meta")
        layer.weight, layer.bias = linear.weight, cast(nn.Parameter, linear.bias)
        layer.register_buffer("mask", mask_OI.to(linear.weight.device, torch.bool), persistent=False)
        layer.train(linear.training)
        layer.enforce()
        return layer

    @torch.no_grad()
    def enforce(self) -> None:
        """Sets every pruned weight to exactly +0."""
        self.weight.masked_fill_(~self.mask, 0.0)

    @property
    def num_pruned(self) -> int:
        """How many weights the mask removes."""
        return self.mask.numel() - int(self.mask.sum())
