"""The leading directions of a matrix, however they are found."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from overhaul.optim.subspace import leading


def decaying(rows: int, columns: int) -> Tensor:
    """A matrix whose singular values halve."""
    u, v = (torch.linalg.qr(torch.randn(size, 12, dtype=torch.float64)).Q for size in (rows, columns))
    return u @ (0.5 ** torch.arange(12.0).double()).diag() @ v.t()


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("right", [True, False])
@pytest.mark.parametrize("how", ["svd", "randomized", "warm"])
def test_the_rows_are_orthonormal_and_span_what_svd_finds(how: Any, right: bool):
    matrix = decaying(40, 30)
    u, _, v = torch.linalg.svd(matrix, full_matrices=False)
    exact = v[:4] if right else u[:, :4].t()
    near = torch.linalg.qr(exact.t() + 0.01 * torch.randn(exact.t().shape, dtype=torch.float64)).Q.t()

    found = leading(matrix, 4, how, right=right, before=near if how == "warm" else None)

    torch.testing.assert_close(found @ found.t(), torch.eye(4, dtype=torch.float64))
    assert float((found @ exact.t()).square().sum()) == pytest.approx(4, abs=2e-3)


def test_the_randomized_search_is_the_same_each_time_and_leaves_torchs_generator_alone():
    matrix, state = decaying(40, 30), torch.get_rng_state()

    first, second = (leading(matrix, 4, "randomized", right=True) for _ in range(2))

    assert torch.equal(first, second)
    assert torch.equal(torch.get_rng_state(), state)


def test_warm_turns_a_basis_and_comes_nearer_each_time():
    matrix = decaying(40, 30)
    exact, basis = torch.linalg.svd(matrix).Vh[:4], torch.linalg.qr(torch.randn(30, 4, dtype=torch.float64)).Q.t()

    shares = []
    for _ in range(4):
        basis = leading(matrix, 4, "warm", right=True, before=basis)
        shares.append(float((basis @ exact.t()).square().sum()) / 4)

    assert shares == sorted(shares)
    assert shares[-1] > 0.99


def test_warm_does_not_flip_a_basis_that_is_right_already():
    matrix = decaying(40, 30)
    exact = -torch.linalg.svd(matrix).Vh[:4]

    torch.testing.assert_close(leading(matrix, 4, "warm", right=True, before=exact), exact)
