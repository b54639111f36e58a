"""Tensors as small integers with one scale per block.

A matrix is cut into blocks of r rows and c columns. With a shift (the default) the scale of block b is 2^-e_b:

    e_b = the largest integer with max|x_b| * 2^e_b <= qmax      qmax: 127 for 8 bits, 7 for 4
    q   = round half to even(x * 2^e_b)                          x~ = q * 2^-e_b,  |x - x~| <= 2^-e_b / 2

With a float scale s_b = max|x_b| / qmax, rounded up to its type, so that nothing is clipped.

Every x~ is exact in fp32, and encoding it again gives the same q and e: the largest |q| of a block is more than half of
qmax, so no larger exponent fits. A tensor in fp32 that lies on this grid is therefore the same thing as its integers
and shifts, and modules hand such tensors to each other.

Letters of shapes: R rows, C columns, Y blocks down, X blocks across, r and c the rows and columns of a block.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from overhaul.bct.scheme import ScaleKind

QMAX = {8: 127, 4: 7}
"""Largest integer of a width in bits; the range is symmetric."""
MAX_EXPONENT = 126
"""Of a shift: 2^126 and 2^-126 are both normal fp32 numbers. Blocks below 2^-120 would need more and become zero."""
SMALLEST = 2.0**-120
"""With a float scale, blocks below become zero too: their own would be subnormal, and its inverse infinite."""
SCALE_DTYPES = {"shift": torch.int8, "fp16": torch.float16, "fp32": torch.float32}
_BIAS, _MANTISSA = 127, 23  # of an fp32 number


@dataclass(frozen=True, slots=True)
class Blocks:
    """A matrix in blocks.

    Attributes:
        values: (R, C) int8, also for 4 bits; `pack` stores those two a byte.
        scale: (Y, X) shifts (int8) or float scales.
        block: rows and columns of a block.
        flushed: how many blocks were too small for a scale and became zero.
    """

    values: Tensor
    scale: Tensor
    block: tuple[int, int]
    flushed: int = 0


def encode(x_RC: Tensor, block: tuple[int, int], bits: int = 8, scale: ScaleKind = "shift") -> Blocks:
    """Rounds a matrix of finite floats to integers, block by block; ragged edges are blocks of fewer elements.

    Raises:
        ValueError: not a matrix of floats, or values that are NaN, infinite, or too large for an fp16 scale.
    """
    if x_RC.ndim != 2 or not x_RC.is_floating_point():
        raise ValueError(f"blocks are cut from a matrix of floats, not from {tuple(x_RC.shape)} {x_RC.dtype}")
    x_RC = x_RC.detach().float()
    if not x_RC.isfinite().all():
        raise ValueError(f"{int((~x_RC.isfinite()).sum())} values are NaN or infinite")
    cut = _cut(x_RC, block)
    top_YX = cut.abs().amax((1, 3))
    if scale == "shift":
        exponent_YX, fits_YX = fitting_exponent(top_YX, QMAX[bits])
        scale_YX, up_YX = exponent_YX.to(torch.int8), power_of_two(exponent_YX) * fits_YX
        flushed = int((~fits_YX & (top_YX > 0)).sum())
    else:
        tiny_YX = (top_YX > 0) & (top_YX < SMALLEST)
        scale_YX = _rounded_up((top_YX / QMAX[bits]).masked_fill(tiny_YX, 1.0), SCALE_DTYPES[scale])
        up_YX = torch.where((top_YX > 0) & ~tiny_YX, 1 / scale_YX.float(), 0)
        flushed = int(tiny_YX.sum())
    cut = (cut * up_YX[:, None, :, None]).round_().clamp_(-QMAX[bits], QMAX[bits])
    num_rows, num_columns = x_RC.shape
    values_RC = cut.flatten(2).flatten(0, 1)[:num_rows, :num_columns].to(torch.int8)
    return Blocks(values_RC.contiguous(), scale_YX, block, flushed)


def decode(values_RC: Tensor, scale_YX: Tensor, block: tuple[int, int]) -> Tensor:
    """x~ in fp32: integers (of any integer type) times the scales of their blocks."""
    step_YX = step(scale_YX)
    (num_rows, num_columns), (rows, columns) = values_RC.shape, block
    if rows == 1 and num_columns % columns == 0:  # the usual case, in one pass over the values
        values = values_RC.view(num_rows, -1, columns).float()
        return values.mul_(step_YX[:, :, None]).view(num_rows, num_columns)
    step_YC = step_YX.repeat_interleave(columns, 1)[:, :num_columns]
    return values_RC.float().mul_(step_YC.repeat_interleave(rows, 0)[:num_rows])


def step(scale: Tensor) -> Tensor:
    """What one unit of a block's integers is worth, in fp32."""
    return scale.float() if scale.is_floating_point() else power_of_two(-scale.int())


def snap(x: Tensor, columns: int) -> Tensor:
    """x~ for 8 bits and shifts in blocks of `columns` neighbours, `(..., C)` to `(..., C)` in fp32: what storing does.

    The last block may be shorter. A block that holds a NaN or an infinity gets more of them: nothing hides it.
    """
    width = x.shape[-1]
    cut = across(x.float(), columns)
    exponent, fits = fitting_exponent(cut.abs().amax(-1, keepdim=True), QMAX[8])
    cut = (cut * (power_of_two(exponent) * fits)).round_().mul_(power_of_two(-exponent))
    return cut.flatten(-2)[..., :width].view(x.shape)


def integers(x: Tensor, columns: int) -> tuple[Tensor, Tensor]:
    """The integers (..., X, c) and shifts (..., X, 1), both int32, of a tensor that `snap` has put on the grid."""
    cut = across(x, columns)
    exponent, fits = fitting_exponent(cut.abs().amax(-1, keepdim=True), QMAX[8])
    return (cut * (power_of_two(exponent) * fits)).round_().int(), exponent


def fitting_exponent(top: Tensor, qmax: int) -> tuple[Tensor, Tensor]:
    """The largest e with `top * 2^e <= qmax`, int32, and whether the block can keep its values.

    Zeros and what is too small for a shift have e = 0 and do not fit. Read off the bits of fp32: no logarithm that
    could round the wrong way.
    """
    bits = top.contiguous().view(torch.int32)
    field, mantissa = bits >> _MANTISSA, bits & ((1 << _MANTISSA) - 1)
    qmax_exponent = qmax.bit_length() - 1
    qmax_mantissa = (qmax << (_MANTISSA - qmax_exponent)) - (1 << _MANTISSA)
    exponent = qmax_exponent + _BIAS - field - (mantissa > qmax_mantissa).int()
    fits = exponent <= MAX_EXPONENT
    return exponent * fits, fits


def power_of_two(exponent: Tensor) -> Tensor:
    """2^e in fp32, exact, for whole e from -126 to 126."""
    return ((exponent.int() + _BIAS) << _MANTISSA).view(torch.float32)


def pack(values_RC: Tensor) -> Tensor:
    """Two integers of -7 to 7 a byte, the left one in the low half; an odd row ends with a zero: uint8 (R, C/2)."""
    padded_RC = F.pad(values_RC, (0, values_RC.shape[1] % 2)).view(torch.uint8) & 15
    return padded_RC[:, ::2] | (padded_RC[:, 1::2] << 4)


def unpack(packed_RH: Tensor, num_columns: int) -> Tensor:
    """What `pack` packed, int8."""
    signed_RH = packed_RH.view(torch.int8)
    # Shifts of signed bytes carry the sign along.
    halves = torch.stack((signed_RH << 4 >> 4, signed_RH >> 4), dim=-1)
    return halves.flatten(1)[:, :num_columns].contiguous()


def num_blocks(shape: tuple[int, int], block: tuple[int, int]) -> int:
    """How many blocks a matrix is cut into."""
    return -(-shape[0] // block[0]) * -(-shape[1] // block[1])


def stored_bytes(shape: tuple[int, int], block: tuple[int, int], bits: int, scale: ScaleKind) -> int:
    """Bytes of a matrix on disk: w bits an element, rows of whole bytes, and one scale a block: w + m / B bits."""
    row_bytes = -(-shape[1] * bits // 8)
    return shape[0] * row_bytes + num_blocks(shape, block) * SCALE_DTYPES[scale].itemsize


def _cut(x_RC: Tensor, block: tuple[int, int]) -> Tensor:
    """(Y, r, X, c), the edges filled with zeros."""
    (num_rows, num_columns), (rows, columns) = x_RC.shape, block
    padded_RC = F.pad(x_RC, (0, -num_columns % columns, 0, -num_rows % rows))
    return padded_RC.view(-1, rows, padded_RC.shape[1] // columns, columns)


def across(x: Tensor, columns: int) -> Tensor:
    """The last axis in blocks of `columns`, (..., X, c), the last of them filled up with zeros."""
    columns = min(columns, x.shape[-1])
    if missing := -x.shape[-1] % columns:
        x = F.pad(x, (0, missing))
    return x.unflatten(-1, (-1, columns))


def _rounded_up(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """The next number of `dtype` that is not below `scale`."""
    if dtype == torch.float32:
        return scale
    if scale.numel() and scale.max() > torch.finfo(dtype).max:
        raise ValueError("values too large for an fp16 scale; fp32 and shift hold them")
    near = scale.to(dtype)
    above = torch.nextafter(near, torch.full_like(near, torch.inf))
    return torch.where(near.float() < scale, above, near)
