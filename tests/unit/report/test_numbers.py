"""Numbers as people read them."""

import pytest

from overhaul.report.numbers import (
    as_count,
    as_duration,
    as_interval,
    as_percent,
    as_place,
    as_quantity,
    as_size,
    as_speed,
    as_tokens,
    interval_ends,
)
from overhaul.table import Row


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (28.0512, "28.05"),
        (1197.31, "1197"),
        (0.012345, "0.01235"),
        (0.0, "0"),
        (3.2e-7, "3.200e-07"),
        (4.5e6, "4.500e+06"),
        (float("inf"), "inf"),
        (None, "n/a"),
    ],
)
def test_quantities_have_four_significant_digits(number: float | None, text: str) -> None:
    assert as_quantity(number) == text


def test_places_on_an_axis_keep_all_their_digits() -> None:
    assert [as_place(x) for x in (0, 500.0, 1_234_567, 0.25, 1e-4)] == ["0", "500", "1,234,567", "0.25", "0.0001"]


def test_tokens_have_suffixes_from_a_million_on() -> None:
    told = ["0", "200,000", "1M", "1.5M", "2.4B"]
    assert [as_tokens(x) for x in (0, 200_000, 1_000_000, 1_500_000, 2_400_000_000)] == told


@pytest.mark.parametrize(
    ("share", "text"),
    [
        (0.5, "50.0%"),
        (1.0, "100%"),
        (0.0, "0%"),
        (0.99999, "100.00%"),
        (0.99967, "99.97%"),
        (0.000346, "0.0346%"),
        (1.1234, "112%"),
    ],
)
def test_percentages_do_not_round_a_rest_away(share: float, text: str) -> None:
    assert as_percent(share) == text


def test_sizes_are_decimal() -> None:
    assert [as_size(n) for n in (0, 999, 1000, 269_060_552, 1_214_000_000)] == [
        "0 B",
        "999 B",
        "1.00 kB",
        "269 MB",
        "1.21 GB",
    ]


def test_rounding_up_moves_to_the_next_unit() -> None:
    assert as_size(999_999) == "1.00 MB"
    assert as_count(999_999_999) == "1.000 B"


def test_durations_name_two_units_at_most() -> None:
    assert [as_duration(s) for s in (0.84, 9.97, 59.7, 130.2, 3599.6, 3900)] == [
        "0.8 s",
        "10 s",
        "1 min 00 s",
        "2 min 10 s",
        "1 h 00 min",
        "1 h 05 min",
    ]


def test_an_interval_has_the_decimals_of_its_value() -> None:
    row = Row(model="m", metric="perplexity", value=28.0512, low=9.5, high=101.25, count=10)

    assert as_interval(row) == "28.05 [9.50, 101.25]"


def test_without_sampling_there_is_no_interval() -> None:
    row = Row(model="m", metric="nonzero", value=3.0, low=3.0, high=3.0, count=1)

    assert interval_ends(row) == ""
    assert as_interval(row) == "3"


def test_what_was_not_measured_says_so() -> None:
    formats = (as_quantity, as_interval, as_percent, as_size, as_count, as_speed, as_duration)

    assert {write(None) for write in formats} == {"n/a"}
