"""Linear CKA: its invariances, a direct HSIC computation, and what cannot be compared."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from overhaul.cka import linear_cka


def hsic(x_ND: Tensor, y_NE: Tensor) -> float:
    """Of linear kernels, with the centring matrix written out."""
    count = len(x_ND)
    centring = torch.eye(count, dtype=torch.float64) - 1 / count
    k_NN, l_NN = x_ND @ x_ND.T, y_NE @ y_NE.T
    return float((k_NN @ centring @ l_NN @ centring).trace()) / (count - 1) ** 2


@pytest.mark.parametrize(("examples", "widths"), [(50, (4, 7)), (6, (20, 30))])
def test_it_is_the_ratio_of_hsics(examples: int, widths: tuple[int, int]):
    x_ND, y_NE = (torch.randn(examples, width, dtype=torch.float64) for width in widths)

    expected = hsic(x_ND, y_NE) / math.sqrt(hsic(x_ND, x_ND) * hsic(y_NE, y_NE))
    assert linear_cka(x_ND, y_NE) == pytest.approx(expected, abs=1e-12)


def test_features_that_are_turned_scaled_and_moved_are_the_same():
    x_ND = torch.randn(40, 5, dtype=torch.float64)
    turn = torch.linalg.qr(torch.randn(5, 5, dtype=torch.float64)).Q

    assert linear_cka(x_ND, x_ND) == pytest.approx(1.0, abs=1e-12)
    assert linear_cka(x_ND, 3 * x_ND @ turn + 7) == pytest.approx(1.0, abs=1e-12)
    assert linear_cka(x_ND, x_ND * torch.tensor([1, 1, 1, 1, 9.0])) < 0.95


def test_features_of_more_axes_are_laid_out():
    x_NCHW = torch.randn(10, 2, 3, 3)

    assert linear_cka(x_NCHW, x_NCHW.flatten(1)) == pytest.approx(1.0)


def test_features_that_are_the_same_for_all_tell_nothing():
    assert math.isnan(linear_cka(torch.ones(5, 2), torch.randn(5, 2)))
