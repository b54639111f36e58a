"""Low-rank adapters of pruned layers whose merged weights have exactly the same zeros (PERP, Zimmer et al., 2023).

    mask_lora    W_p + M * (s B A)     in training and merged: the merge is exact
    lora_prune   W_p + s B A           in training; the mask hits at the merge, so the loss jumps there
    scale_lora   W_p * (B A)           in training and merged: the merge is exact

W_p is the pruned weight, zero where the mask M is; s = alpha / R. Shapes: O output, I input features, R rank.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from overhaul.layers import to_linear
from overhaul.layers.lora import (
    LowRankLinear,
    incremented,
    lora_linear,
    start_at_zero,
)
from overhaul.layers.masked import MaskedLinear
from overhaul.machine import product_dtype


class SparseLowRankLinear(LowRankLinear):
    """A low-rank adapter that merges to a `MaskedLinear` with the mask of its base."""

    mask: Tensor  # (O, I) bool, True = kept

    def __init__(self, linear: MaskedLinear, lora_A: Tensor, lora_B: Tensor, alpha: float) -> None:
        super().__init__(linear, lora_A, lora_B, alpha)
        self.register_buffer("mask", linear.mask, persistent=False)

    def merge(self) -> MaskedLinear:
        """A masked layer of the base's dtype; exactly the base's zeros, computed in fp32 and rounded once."""
        weight_OI = self.dense().detach().to(self.weight.dtype)
        return MaskedLinear.from_linear(to_linear(weight_OI, self.bias, training=self.training), self.mask)


class MaskLoRALinear(SparseLowRankLinear):
    """W_p + M * (alpha / R) B A: pruned weights stay pruned while the increment is trained.

    The effective weight is made in the type of the matrix products: bf16 training sees the rounding that a merged
    bf16 model will have.
    """

    factor: Tensor | None = None

    @classmethod
    def from_linear(
        cls, linear: MaskedLinear, rank: int, alpha: float, generator: torch.Generator | None = None
    ) -> MaskLoRALinear:
        """Takes over the parameters and mask of `linear` and starts at an increment of zero."""
        return cls(linear, *start_at_zero(linear, rank, generator), alpha)

    def forward(self, x: Tensor) -> Tensor:
        """Maps `(..., I)` to `(..., O)`."""
        weight_OI = self._effective(product_dtype(x)) if self.enabled else self.weight
        return F.linear(x, weight_OI, self.bias)

    def dense(self) -> Tensor:
        """W_p + M * (alpha / R) B A, fp32."""
        return self._effective(torch.float32)

    def _effective(self, dtype: torch.dtype) -> Tensor:
        # W_p is zero where the mask is, so masking the sum is the same as masking the increment, in one pass less.
        return incremented(self.weight, self.lora_A, self.lora_B, self.scale, dtype).mul_(self._factor(dtype))

    def _factor(self, dtype: torch.dtype) -> Tensor:
        """The mask as zeros and ones of `dtype`, kept: a product with booleans takes ten times as long."""
        if self.factor is None or self.factor.dtype != dtype:
            self.factor = self.mask.to(dtype)
        return self.factor


class LoRAPruneLinear(SparseLowRankLinear):
    """W_p + (alpha / R) B A in training; the mask is applied at the merge, which therefore changes the outputs."""

    @classmethod
    def from_linear(
        cls, linear: MaskedLinear, rank: int, alpha: float, generator: torch.Generator | None = None
    ) -> LoRAPruneLinear:
        """Takes over the parameters and mask of `linear` and starts at an increment of zero."""
        return cls(linear, *start_at_zero(linear, rank, generator), alpha)

    def forward(self, x: Tensor) -> Tensor:
        """Maps `(..., I)` to `(..., O)`."""
        if not self.enabled:
            return F.linear(x, self.weight, self.bias)
        return lora_linear(x, self.weight, self.bias, self.lora_A, self.lora_B, self.scale)

    def dense(self) -> Tensor:
        """W_p + (alpha / R) B A, fp32: what `forward` computes, before the mask of the merge."""
        return incremented(self.weight, self.lora_A, self.lora_B, self.scale, torch.float32)


class ScaleLoRALinear(SparseLowRankLinear):
    """W_p * (B A): every kept weight is scaled, by a matrix of rank R that starts at one.

    Filled with a constant, all R components get equal gradients and stay equal: the scale remains an outer product
    (rows times columns) whatever R is. `noise` breaks the symmetry.
    """

    @classmethod
    def from_linear(
        cls,
        linear: MaskedLinear,
        rank: int,
        noise: float = 0.0,
        generator: torch.Generator | None = None,
    ) -> ScaleLoRALinear:
        """Takes over the parameters and mask of `linear`; without noise it starts as the pruned layer.

        Args:
            linear: the pruned layer.
            rank: R.
            noise: standard deviation of the normal noise on A and B, relative to their fill of 1 / sqrt(R).
            generator: draws the noise; torch's default one if None.
        """
        A_RI = torch.ones(rank, linear.in_features)
        B_OR = torch.ones(linear.out_features, rank)
        if noise:
            A_RI += noise * torch.randn(A_RI.shape, generator=generator)
            B_OR += noise * torch.randn(B_OR.shape, generator=generator)
        return cls(linear, A_RI / rank**0.5, B_OR / rank**0.5, alpha=rank)

    def forward(self, x: Tensor) -> Tensor:
        """Maps `(..., I)` to `(..., O)`."""
        weight_OI = self.dense().to(product_dtype(x)) if self.enabled else self.weight
        return F.linear(x, weight_OI, self.bias)

    def dense(self) -> Tensor:
        """W_p * (B A), fp32."""
        # In bf16 a scale near one moves in steps of 0.4-0.8%, the same step for a whole row; so it stays fp32.
        with torch.autocast(self.weight.device.type, enabled=False):
            return (self.lora_B @ self.lora_A) * self.weight
