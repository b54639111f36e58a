"""The stability gap of a curve: depth, place, length, area, and curves that have none."""

from __future__ import annotations

import math

import pytest

from overhaul.stability import gap, gaps_note


def test_a_rise_and_what_comes_back():
    found = gap([(0, 3.0), (100, 3.5), (200, 4.0), (300, 3.3), (400, 3.2), (500, 3.2)])

    assert found.depth == pytest.approx(1.0)
    assert found.at == 200
    assert found.length == 400  # 4.0 - 0.9 * 0.8 = 3.28
    assert found.final == pytest.approx(0.2)
    # Over 3.2: 0, 0.3, 0.8, 0.1, 0, 0 by trapezia.
    assert found.area == pytest.approx(100 * (0.15 + 0.55 + 0.45 + 0.05))


def test_a_loss_that_only_rises_has_not_come_back():
    found = gap([(0, 3.0), (100, 3.5), (200, 4.0)])

    assert (found.depth, found.at, found.length, found.area, found.final) == (1.0, 200, None, 0.0, 1.0)


def test_a_loss_that_only_falls_has_no_depth_and_no_area():
    found = gap([(0, 3.0), (100, 2.5), (200, 2.0)])

    assert found == (0.0, 0, 0, 0.0, -1.0)


def test_what_ends_below_its_beginning_is_measured_against_that():
    assert gap([(0, 3.0), (100, 3.4), (200, 2.0)]).area == pytest.approx(100 * 0.2 + 100 * 0.2)


def test_a_table_has_the_texts_that_were_looked_at():
    points = [{"step": step, "tokens": 10 * step} for step in range(1, 5)]
    points[1]["held-out/old"], points[3]["held-out/old"] = 4.0, 3.25  # pyright: ignore[reportArgumentType]

    note = gaps_note(points, {"old": 3.0, "other": 2.0}, "held-out/")

    assert note
    assert note.rows == (("old", "3.000", "+1.000", "20", "40", "+0.250", "15"),)
    assert gaps_note(points, {"other": 2.0}, "held-out/") is None
    assert gaps_note(points, {"old": math.nan}, "held-out/") is None
