"""Schedules: their values, no jumps, and the same as transformers' where these have them."""

from __future__ import annotations

import pytest

from overhaul.schedules import Piece, chain, schedule


@pytest.mark.parametrize(
    ("name", "warmup", "expected"),
    [
        ("constant", 0.0, {0.0: 1, 0.5: 1, 1.0: 1}),
        ("linear", 0.0, {0.0: 1, 0.25: 0.75, 1.0: 0}),
        ("linear", 0.5, {0.0: 0, 0.25: 0.5, 0.5: 1, 0.75: 0.5, 1.0: 0}),
        ("cosine", 0.0, {0.0: 1, 0.5: 0.5, 1.0: 0}),
        ("cosine", 0.2, {0.1: 0.5, 0.2: 1, 0.6: 0.5, 1.0: 0}),
        ("constant", 1.0, {0.5: 0.5, 1.0: 1}),
    ],
)
def test_schedules(name: str, warmup: float, expected: dict[float, float]):
    factor = schedule(name, warmup)

    assert {share: factor(share) for share in expected} == pytest.approx(expected)


def test_a_schedule_that_ends_above_nothing():
    factor = schedule("cosine", 0.2, 0.1)

    assert {share: factor(share) for share in (0.1, 0.2, 0.6, 1.0)} == pytest.approx(
        {0.1: 0.5, 0.2: 1, 0.6: 0.55, 1.0: 0.1}
    )


def test_a_piece_without_length_changes_nothing():
    factor = chain((Piece(0.5, 1.0), Piece(0.5, 0.1), Piece(1.0, 1.0)), start=0.0)

    assert [factor(share) for share in (0.25, 0.5, 0.75, 1.0)] == [0.5, 1, 1, 1]


def test_a_piece_that_would_end_before_it_begins():
    with pytest.raises(ValueError, match=r"ends at 0\.4 of the run and begins at 0\.5"):
        chain((Piece(0.5, 1.0), Piece(0.4, 0.1)), start=0.0)
