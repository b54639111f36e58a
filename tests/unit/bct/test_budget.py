from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from overhaul.bct.budget import Choice, measured, widths_within
from overhaul.bct.model import Stored
from overhaul.bct.scheme import Scheme
from overhaul.errors import UserError

A = Choice("a", (10, 20), (0.50, 0.01))
B = Choice("b", (100, 200), (0.90, 0.02))
C = Choice("c", (10, 20), (0.10, 0.00))


@pytest.mark.parametrize(
    ("budget", "wide"),
    [
        (150, set()),  # 120 and the 30 that stay float
        (160, {"a"}),  # 0.049 a byte
        (169, {"a"}),
        (170, {"a", "c"}),  # 0.010 a byte, before b with 0.009
        (270, {"a", "b", "c"}),
    ],
)
def test_bytes_go_where_they_lessen_the_error_most(budget, wide):
    widths = widths_within([A, B, C], 30, budget)

    assert {name for name, bits in widths.items() if bits == 8} == wide


def test_what_does_not_fit_is_passed_over_for_what_does():
    assert widths_within([B, C], 0, 120) == {"b": 4, "c": 8}


def test_the_embedding_comes_first_if_it_fits():
    embedding = replace(B, is_embedding=True)

    assert widths_within([A, embedding, C], 0, 220) == {"a": 4, "b": 8, "c": 4}
    assert widths_within([A, embedding, C], 0, 219) == {"a": 8, "b": 4, "c": 8}


def test_a_budget_below_four_bits_is_refused():
    with pytest.raises(UserError, match="149 bytes; with 4 bits for every tensor there are 150"):
        widths_within([A, B, C], 30, 149)


def test_errors_and_sizes_are_those_of_the_blocks():
    weight = torch.tensor([[7.0, 3.4], [0.0, 0.0]])
    (choice,) = measured([Stored("w", weight, "1x2")], Scheme(mode="w4a32"))

    # 7 and 3.4 in steps of 1, then of 1/16: 3.4 becomes 3, or 3.375.
    assert choice.bytes == (2 * 1 + 2, 2 * 2 + 2)
    assert choice.errors == pytest.approx((0.16 / 60.56, 0.025**2 / 60.56), rel=1e-4)
