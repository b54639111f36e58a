"""Fronts by hand, and against the definition."""

from __future__ import annotations

import itertools
from dataclasses import replace

from hypothesis import given, settings
from hypothesis import strategies as st

from overhaul.report.facts import BITS_PER_BYTE, Facts
from overhaul.report.pareto import SIZE, TRADES, front, fronts_of, on_front
from overhaul.table import Row

from .examples import perplexity, three_facts

DENSE = three_facts()[0]
PREFILL = TRADES[1]


def model(quality: float, num_bytes: int, speed: float) -> Facts:
    return replace(
        DENSE,
        perplexity=perplexity("m", quality),
        bytes=num_bytes,
        tokens_per_second=speed,
        decode_tokens_per_second=speed,
    )


def test_a_point_that_another_beats_is_not_on_the_front() -> None:
    assert front([(1, 3), (2, 2), (3, 1), (3, 3), (2, 3)]) == [True, True, True, False, False]


def test_equal_points_do_not_beat_each_other_and_one_equal_coordinate_does_not_save() -> None:
    assert front([(1, 1), (1, 1), (1, 2)]) == [True, True, False]
    assert front([]) == []


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), min_size=1, max_size=12))
def test_a_front_is_never_empty_and_falls_from_left_to_right(points: list[tuple[float, float]]) -> None:
    best = sorted({point for point, on in zip(points, front(points), strict=True) if on})

    assert best
    assert all(left[0] < right[0] and left[1] > right[1] for left, right in itertools.pairwise(best))


def test_less_bytes_and_more_speed_are_better() -> None:
    dense, small, fast = model(28, 200, 100), model(30, 100, 90), model(30, 300, 200)

    assert fronts_of([dense, small, fast]) == [("size", "prefill", "decode"), ("size",), ("prefill", "decode")]


def test_speeds_of_one_quality_that_may_be_one_speed_do_not_beat_each_other() -> None:
    same = [model(30, 100, speed) for speed in (100, 110, 120)]
    slow, better = model(30, 100, 60), model(29, 100, 120)

    assert on_front([*same, slow], PREFILL) == [True, True, True, False]
    assert on_front([*same, better], PREFILL) == [False, False, False, True]


def test_what_was_not_measured_is_on_no_front_and_beats_nothing() -> None:
    unknown = replace(DENSE, perplexity=None)
    sizeless = replace(DENSE, bytes=None)

    assert on_front([unknown, sizeless, DENSE], SIZE) == [False, False, True]
    assert on_front([replace(DENSE, tokens_per_second=None)], PREFILL) == [False]


def test_bits_per_byte_stand_for_quality_where_they_are_known() -> None:
    def bits(facts: Facts, value: float) -> Facts:
        row = Row(model="m", metric=BITS_PER_BYTE, value=value, low=value, high=value, count=9)
        return replace(facts, metrics=(row,))

    coarse, fine = bits(model(90, 100, 1), 1.0), bits(model(20, 100, 1), 1.2)

    assert on_front([coarse, fine], SIZE) == [True, False]
