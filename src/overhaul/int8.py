"""LLM.int8() (Dettmers et al., 2022) as functions of tensors: integers, their constants, outlier columns.

A number is an integer times a step, and 127 steps are the constant of its row. With absmax the constant is the largest
magnitude and zero is the integer 0; with a zero point 255 steps are the range and zero is the integer `-zero`. The
range always holds zero, so that a weight that was pruned is exactly zero afterwards.

    vector    a constant for each token and one for each output     (what LLM.int8() does)
    row       a constant for each token, one for the whole weight
    tensor    one constant for all tokens at once, one for the whole weight

Letters of shapes: N tokens, I inputs, O outputs, R rows of either, C columns.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from overhaul.int8_products import Integers, scaled_product

LARGEST = 127
LEAST = 1e-35
"""A row with nothing larger is a row of zeros: 127 over a smaller number is no fp32 number."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Kind:
    """Which arithmetic.

    Attributes:
        threshold: columns of the input with a magnitude from here on are multiplied in 16 bit; 0 for none.
        granularity: how many numbers share a constant.
        zero_point: whether the integers reach from the smallest to the largest number, not symmetrically around zero.
    """

    threshold: float = 6.0
    granularity: Literal["vector", "row", "tensor"] = "vector"
    zero_point: bool = False


class Scale(NamedTuple):
    """What an integer q stands for: `(q + zero) * constant / 127`.

    Attributes:
        constant: (R, 1), or (1, 1) for a whole tensor; c in the paper.
        zero: whole numbers of that shape; None is 0 throughout.
    """

    constant: Tensor
    zero: Tensor | None

    @property
    def step(self) -> Tensor:
        """What one more of the integer adds."""
        return self.constant * (1 / LARGEST)


class Rows(NamedTuple):
    """Activations ready for the product.

    Attributes:
        integers: (N, I), outlier columns standing for zero.
        scale: of each token.
        columns: (C,) int64, the columns that were left out.
    """

    integers: Integers
    scale: Scale
    columns: Tensor


def scale_of(x_RI: Tensor, *, whole: bool = False, zero_point: bool = False) -> Scale:
    """The scale of each row, or of the `whole` tensor."""
    if not zero_point:
        return _absmax(x_RI.abs(), whole=whole)
    low_R1, high_R1 = x_RI.amin(1, keepdim=True).clamp_max_(0), x_RI.amax(1, keepdim=True).clamp_min_(0)
    if whole:
        low_R1, high_R1 = low_R1.amin(0, keepdim=True), high_R1.amax(0, keepdim=True)
    constant_R1 = (high_R1 - low_R1) * (LARGEST / 255)
    # -128 stands for the smallest number.
    return Scale(constant_R1, (low_R1 * _inverse(constant_R1)).round_() + 128)


def _absmax(size_RI: Tensor, *, whole: bool) -> Scale:
    largest_R1 = size_RI.amax(1, keepdim=True)
    return Scale(largest_R1.amax(0, keepdim=True) if whole else largest_R1, None)


def integers_of(x_RI: Tensor, scale: Scale) -> Tensor:
    """round(127 x / c), less the zero point, in fp32; a row of zeros gives zeros."""
    q_RI = torch.mul(x_RI, _inverse(scale.constant)).round_()
    return q_RI if scale.zero is None else q_RI.sub_(scale.zero).clamp_(-128, 127)


def _inverse(constant_R1: Tensor) -> Tensor:
    return torch.where(constant_R1 > LEAST, LARGEST / constant_R1, 0.0)


def numbers_of(q_RI: Tensor, scale: Scale) -> Tensor:
    """What the integers stand for, fp32."""
    q_RI = q_RI.float()
    return (q_RI if scale.zero is None else q_RI + scale.zero) * scale.step


def quantize_weight(weight_OI: Tensor, kind: Kind) -> tuple[Tensor, Scale]:
    """int8 (O, I) and the scale of each output (O, 1), all of them equal where the weight has one."""
    weight_OI = weight_OI.detach().float()
    scale = scale_of(weight_OI, whole=kind.granularity != "vector", zero_point=kind.zero_point)
    q_OI = integers_of(weight_OI, scale).to(torch.int8)
    constant_O1, zero_O1 = (None if t is None else t.expand(len(weight_OI), 1).contiguous() for t in scale)
    assert constant_O1 is not None
    return q_OI, Scale(constant_O1, zero_O1)


def quantize_rows(x_NI: Tensor, kind: Kind) -> Rows:
    """Activations as integers, columns in which some magnitude reaches the threshold left out.

    A token's constant is taken over its entries below the threshold, those in outlier columns among them, as the
    authors' code has it; then the columns count as zero.
    """
    x_NI = x_NI.float()
    size_NI, whole = x_NI.abs(), kind.granularity == "tensor"
    scale = scale_of(x_NI, whole=whole, zero_point=True) if kind.zero_point else _absmax(size_NI, whole=whole)
    columns_C = torch.empty(0, dtype=torch.int64, device=x_NI.device)
    if kind.threshold and _reached(size_NI, scale, kind.threshold):
        columns_C = (size_NI.amax(0) >= kind.threshold).nonzero().flatten()
        scale = _without_outliers(x_NI, size_NI, scale, kind)
    q_NI = integers_of(x_NI, scale)
    if len(columns_C):
        q_NI[:, columns_C] = 0.0 if scale.zero is None else -scale.zero
    return Rows(Integers(q_NI), scale, columns_C)


def _reached(size_NI: Tensor, scale: Scale, threshold: float) -> bool:
    """Whether some entry reaches the threshold: with absmax the constants tell without a pass of its own."""
    largest = scale.constant if scale.zero is None else size_NI
    return not bool(largest.amax() < threshold)  # true for NaN too: it must not hide the outliers of other rows


def _without_outliers(x_NI: Tensor, size_NI: Tensor, scale: Scale, kind: Kind) -> Scale:
    """The scale over what is below the threshold; with a constant a row, only rows that reach it are read again."""
    whole = kind.granularity == "tensor"
    if kind.zero_point:
        return scale_of(x_NI.masked_fill(size_NI >= kind.threshold, 0.0), whole=whole, zero_point=True)
    if whole:
        return _absmax(size_NI.masked_fill(size_NI >= kind.threshold, 0.0), whole=True)
    rows_R = (scale.constant[:, 0] >= kind.threshold).nonzero().flatten()
    again_RI = size_NI[rows_R]
    again = _absmax(again_RI.masked_fill_(again_RI >= kind.threshold, 0.0), whole=False)
    return Scale(scale.constant.index_copy(0, rows_R, again.constant), None)


def product(rows: Rows, weight_OI: Tensor, scale: Scale) -> Tensor:
    """The int8 product, rescaled, fp32 (N, O): outlier columns and bias are not in it."""
    step_O = scale.step[:, 0]
    if rows.scale.zero is None or scale.zero is None:
        return scaled_product(rows.integers, weight_OI, step_O).mul_(rows.scale.step)
    # (q_x + z_x) (q_w + z_w) = q_x q_w + z_x q_w + q_x z_w + z_x z_w, summed: large numbers that cancel.
    sums_NO = scaled_product(rows.integers, weight_OI, torch.ones_like(step_O)).double()
    q_N1 = rows.integers.fp32_NI.sum(1, keepdim=True, dtype=torch.float64)
    q_O = weight_OI.sum(1, dtype=torch.int64).double()
    z_N1, z_O = rows.scale.zero.double(), scale.zero[:, 0].double()
    sums_NO += z_N1 * q_O + q_N1 * z_O + weight_OI.shape[1] * z_N1 * z_O
    return sums_NO.float().mul_(step_O).mul_(rows.scale.step)
