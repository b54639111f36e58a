"""Softmax in integers: differences to the row's largest score in 8 bits, a table of the exponential, an integer sum.

    d = round(16 * (max - s)), at most 255      s: int32 sums of the product, brought to one exponent in a row
    E = round(2^15 * exp(-d / 16))              256 entries; from d = 178 on they are 0
    p = E / sum of E                            then 8 bits: of 1/255, or with one shift per block of keys

What a mask hides is dropped before the maximum is taken. Letters of shapes: S keys, D codes.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from overhaul.bct.blocks import snap
from overhaul.bct.scheme import Scheme

CODES_PER_NAT = 16
"""Scores are rounded to sixteenths; the last of 256 codes is exp(-15.9), less than a part in 2^22."""
ONE = 1 << 15
UNIT = 255


@cache
def exp_table() -> Tensor:
    """E for each code, (256,) in fp32, which holds these integers exactly."""
    code_D = torch.arange(256, dtype=torch.float64)
    return (ONE * torch.exp(-code_D / CODES_PER_NAT)).round().float()


def exponentials(scores: Tensor, keep: Tensor | None) -> Tensor:
    """E of `(..., S)` scores, whole numbers from 0 to 2^15; 0 where `keep`, which broadcasts, is False."""
    if keep is not None:
        scores = scores.masked_fill(~keep, -torch.inf)
    top = scores.amax(-1, keepdim=True)
    code = ((top - scores) * CODES_PER_NAT).round_().clamp_(max=255)
    code = code.nan_to_num_(nan=255)  # a row of which everything is hidden
    found = torch.take(exp_table().to(scores.device), code.long())
    return found if keep is None else found.masked_fill_(~keep, 0)


def softmax(scores: Tensor, keep: Tensor | None, scheme: Scheme) -> Tensor:
    """8-bit probabilities of `(..., S)` scores, as fp32 on their grid.

    Rounded to 1/255 each, a row of n keys sums to 1 within n / 510; with one shift per block of b keys within b / 128,
    for each is wrong by at most a 128th of its block's largest, and errors of both signs cancel in most rows.
    """
    share = exponentials(scores, keep)
    # Whole numbers of at most 2^15: fp32 sums 512 of them exactly, and fp64 more than there are keys.
    share = share / share.sum(-1, keepdim=True, dtype=torch.float64).clamp_(min=1).float()
    if scheme.probabilities == "unit":
        return share.mul_(UNIT).round_().div_(UNIT)
    return snap(share, scheme.activation_block)
