"""Norms of tensors on the grid: sums of integers, one reciprocal root a row in fp32, a weight in 8 bits.

Squares and sums of the 8-bit integers of one block are exact; the blocks of a row are then added at their exponents in
fp64, which is exact while these are no more than 16 apart. Letters of shapes: D width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from overhaul.bct.blocks import across, snap


def rms_norm(x: Tensor, weight_D: Tensor, epsilon: float, columns: int) -> Tensor:
    """x / sqrt(mean(x^2) + epsilon) * weight of `(..., D)` on the grid of `columns`, on the same grid."""
    root = (_mean(x.square(), columns) + epsilon).rsqrt().float()
    return snap((x * root).mul_(snap(weight_D, columns)), columns)


def layer_norm(x: Tensor, weight_D: Tensor, bias_D: Tensor, epsilon: float, columns: int) -> Tensor:
    """(x - mean) / sqrt(variance + epsilon) * weight + bias of `(..., D)` on the grid, on the same grid."""
    mean = _mean(x, columns)
    variance = _mean(x.square(), columns) - mean.square()
    root = (variance.clamp_min(0) + epsilon).rsqrt()
    centred = (x.double() - mean).mul_(root).float()
    return snap(centred.mul_(snap(weight_D, columns)).add_(snap(bias_D, columns)), columns)


def _mean(x: Tensor, columns: int) -> Tensor:
    """The mean over the last axis in fp64, summed block by block: (..., 1)."""
    return across(x, columns).sum(-1).sum(-1, keepdim=True, dtype=torch.float64) / x.shape[-1]
