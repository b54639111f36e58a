"""Products of matrices in blocks: Y = X W^T with the inner axis cut where a scale changes.

    P_k = Xq_k Wq_k^T                    integers: |P_k| < K_block * 127^2
    float:    Y = sum_k P_k * 2^-e_k     e_k = e_x,k + e_w,k, for each row of X and each row of W
    integer:  Y = 2^-e * sum_k round half to even(P_k * 2^(e - e_k)),  e = the smallest e_k of this element of Y

Both are computed by floating-point products of x~ and w~, which are q times a power of two. Such a product of two
8-bit integers has 14 bits, and a partial sum of fewer than 2^24 / 127^2 = 1,040 of them with one exponent is exact in
fp32, whatever the order; in fp64 everything here is. So `integer` gives the bits of an integer machine, and `float`
those of one that adds blocks in fp32, up to the rounding of these sums: at most K * 2^-24 of the sum of magnitudes.

Letters of shapes: N rows, O outputs, K inner, S segments of the inner axis.
"""

from __future__ import annotations

from functools import reduce
from itertools import pairwise

import torch
from torch import Tensor

from overhaul.bct.blocks import MAX_EXPONENT, QMAX, across, fitting_exponent
from overhaul.bct.scheme import LONGEST_INNER
from overhaul.errors import UserError

_NEVER_SMALLEST = 1000
"""Exponent of a segment that is all zero: it must not coarsen the others."""


def refuse_overflow(name: str, inner: int) -> None:
    """Raises `UserError` for a product whose sum of `inner` terms could leave int32."""
    if inner > LONGEST_INNER:
        raise UserError(
            f"{name}: {inner} products of 8-bit integers can leave the range of int32",
            allowed=f"up to {LONGEST_INNER}",
            hint="--accumulate float",
        )


def float_product(x_NK: Tensor, w_OK: Tensor) -> Tensor:
    """x~ w~^T with sums in fp32, `(..., N, K)` times `(..., O, K)`; no autocast narrows it."""
    with torch.autocast(x_NK.device.type, enabled=False):
        return x_NK.float() @ w_OK.float().transpose(-1, -2)


def integer_product(
    x_NK: Tensor, w_OK: Tensor, x_columns: int, w_columns: int, w_shift_OX: Tensor | None = None
) -> Tensor:
    """x~ w~^T with sums in int32 at one exponent.

    Args:
        x_NK: `(..., N, K)` on the grid of 8 bits.
        w_OK: `(..., O, K)`, in blocks.
        x_columns, w_columns: how many neighbours on the inner axis share a scale; the inner axis is cut where either
            ends.
        w_shift_OX: the shifts of w; by default those of 8 bits that its values show.
    """
    segments = _segments(x_NK.shape[-1], x_columns, w_columns)
    x_exponent_NX = _exponents(x_NK, x_columns)
    w_exponent_OX = _exponents(w_OK, w_columns, w_shift_OX)

    def exponent(segment: tuple[int, int]) -> Tensor:
        x_place, w_place = segment[0] // x_columns, segment[0] // w_columns
        return x_exponent_NX[..., :, x_place, None] + w_exponent_OX[..., None, :, w_place]

    # Where everything is zero any exponent will do.
    smallest_NO = reduce(torch.minimum, map(exponent, segments)).clamp_(max=2 * MAX_EXPONENT)
    up_NO = torch.exp2(smallest_NO.double())
    x_NK, w_KO = x_NK.double(), w_OK.double().transpose(-1, -2)
    total_NO = torch.zeros_like(up_NO)
    for start, end in segments:
        # Exact in fp64, so this is the integer sum, shifted right and rounded.
        total_NO += (x_NK[..., start:end] @ w_KO[..., start:end, :]).mul_(up_NO).round_()
    return total_NO.div_(up_NO).float()


def exact_product(x_NK: Tensor, w_OK: Tensor) -> Tensor:
    """x~ w~^T summed without rounding and rounded to fp32 once, whatever the exponents of single elements.

    An integer machine shifts all products to the left, to the finest exponent, and sums in int64. Which exponent that
    is does not change the sum; so neither do keys that a mask hides, or that come later. Exact in fp64 while the
    exponents of a sum of K products are no more than 39 - log2(K) apart.
    """
    return (x_NK.double() @ w_OK.double().transpose(-1, -2)).float()


def _segments(inner: int, *columns: int) -> list[tuple[int, int]]:
    """The inner axis cut wherever a block of any of these lengths ends."""
    cuts = sorted({0, inner, *(place for length in columns for place in range(length, inner, length))})
    return list(pairwise(cuts))


def _exponents(x_NK: Tensor, columns: int, shift_NX: Tensor | None = None) -> Tensor:
    """The exponent of every block of every row: (..., N, X) int32."""
    top_NX = across(x_NK.float(), columns).abs().amax(-1)
    if shift_NX is None:
        shift_NX, _ = fitting_exponent(top_NX, QMAX[8])
    return torch.where(top_NX > 0, shift_NX.int(), _NEVER_SMALLEST)
