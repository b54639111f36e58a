"""Centred kernel alignment: how alike two sets of features of the same examples are (Kornblith et al., 2019)."""

from __future__ import annotations

import math

from torch import Tensor


def linear_cka(x_ND: Tensor, y_NE: Tensor) -> float:
    """`||Y^T X||^2 / (||X^T X|| ||Y^T Y||)` of centred features, in Frobenius norms.

    It is 1 where one is the other turned, mirrored, scaled or moved.

    Args:
        x_ND, y_NE: features of the same examples, one a row.

    Returns:
        From 0 to 1; NaN where a set of features is the same for all examples, and so tells nothing.
    """
    x_ND, y_NE = (f.flatten(1).double() for f in (x_ND, y_NE))
    x_ND, y_NE = (f - f.mean(dim=0) for f in (x_ND, y_NE))
    within = _squared(x_ND, x_ND) * _squared(y_NE, y_NE)
    return _squared(x_ND, y_NE) / math.sqrt(within) if within > 0 else math.nan


def _squared(x_ND: Tensor, y_NE: Tensor) -> float:
    """`||X^T Y||^2`, by whichever product is smaller: of features, or of examples."""
    if x_ND.shape[1] * y_NE.shape[1] <= len(x_ND) ** 2:
        return float((x_ND.T @ y_NE).square().sum())
    return float(((x_ND @ x_ND.T) * (y_NE @ y_NE.T)).sum())
