"""Bytes of a model in blocks, by the formula alone: w + m / B bits a number, the shifts of one byte."""

from __future__ import annotations

from torch import nn


def formula_bytes(dense: nn.Module, bits: int, columns: int | None, float_bytes: int) -> int:
    """What the weights of a dense model take when its matrices are stored in blocks of one row.

    Args:
        dense: the model before.
        bits: of a stored number.
        columns: of a block; None for those of the matrix.
        float_bytes: of a number of all that is no matrix.
    """
    total = 0
    for parameter in dense.parameters():
        if parameter.ndim == 1:
            total += float_bytes * parameter.numel()
        else:
            rows, width = parameter.shape
            total += rows * (-(-width * bits // 8) + -(-width // (columns or width)))
    return total
