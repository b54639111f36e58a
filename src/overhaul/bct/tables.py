"""Functions of one number on 8-bit blocks: an integer and a shift have 255 values, so a function is a table.

    T[e, q] = f(q * 2^-e), made in fp64        one row of 256 entries for each shift
    y = round half to even(T[e, q] * 2^e')     e': the largest shift that fits the results of the block

An integer machine reads two tables: the shift that one entry would allow, whose smallest value over the block is e',
and the rounded entries of (e, e'). `Table.entries` is that second table; `Table.__call__` gives the same numbers
through fp32 entries.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from overhaul.bct.blocks import MAX_EXPONENT, integers, snap
from overhaul.errors import UserError, did_you_mean

_SQRT_HALF = math.sqrt(0.5)
FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": lambda x: x * torch.sigmoid(x),
    "gelu": lambda x: 0.5 * x * torch.erfc(-x * _SQRT_HALF),
    "gelu_tanh": lambda x: 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
    "relu": lambda x: x.clamp_min(0),
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
}
_ALSO_CALLED = {"swish": "silu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu_fast": "gelu_tanh"}


class Table:
    """A function of one number, for every 8-bit integer and every shift.

    Attributes:
        name: of the function, in `FUNCTIONS`.
    """

    def __init__(self, name: str) -> None:
        self.name, function = name, FUNCTIONS[name]
        shift_S1 = torch.arange(-MAX_EXPONENT, MAX_EXPONENT + 1, dtype=torch.float64)[:, None]
        values_SQ = function(torch.arange(-128, 128, dtype=torch.float64) * torch.exp2(-shift_S1))
        # Where the argument is beyond all use (2^120), so may the result be; such a shift never meets a sound model.
        self.values_SQ = values_SQ.nan_to_num(0.0).clamp(-3e38, 3e38).float()

    def __call__(self, x: Tensor, columns: int) -> Tensor:
        """f of a tensor on the grid of `columns`, on the same grid: `(..., C)` to `(..., C)`."""
        value, shift = integers(x, columns)
        place = (shift + MAX_EXPONENT) * 256 + (value + 128)
        found = torch.take(self.values_SQ.to(x.device), place.long())
        return snap(found.flatten(-2)[..., : x.shape[-1]], columns)

    def entries(self, shift: int, result_shift: int) -> Tensor:
        """The integers (256,) that -128..127 with `shift` become with `result_shift`."""
        wide_Q = self.values_SQ[shift + MAX_EXPONENT].double() * 2.0**result_shift
        return wide_Q.round().int()


@cache
def table_of(name: str) -> Table:
    """The table of an activation function, by the name that configurations give it.

    Raises:
        UserError: there is none of that name.
    """
    known = _ALSO_CALLED.get(name, name)
    if known not in FUNCTIONS:
        names = [*FUNCTIONS, *_ALSO_CALLED]
        raise UserError(
            f"the activation function {name!r} has no table",
            allowed=", ".join(names),
            hint=did_you_mean(name, names) or "a mode that ends in a32, which computes in floats",
        )
    return Table(known)
