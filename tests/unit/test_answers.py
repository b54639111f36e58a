"""What of an answer counts, and what is equal to what."""

from __future__ import annotations

import pytest

from overhaul.answers import is_right, normalised, result, worked


@pytest.mark.parametrize(
    ("answer", "counts"),
    [
        ("72", "72"),
        (worked("3 * 24 = 72", 72), "72"),
        ("No. Answer: 4, or rather Answer: 5", "5"),
        ("Answer:\n6\nand more", "6"),
        ("a bridge\nWhat is a ferry?", "a bridge"),
        ("", ""),
        ("12 Answer: ", ""),
    ],
)
def test_what_counts_is_behind_the_last_mark_or_the_first_line(answer: str, counts: str):
    assert result(answer) == counts


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("1,000.0", "1000"),
        ("  Twelve   Metres. ", "twelve metres"),
        ("12500m", "12500 m"),
        ("0.50", "0.5"),
        (".5", "0.5"),
        ("-.5", "-0.5"),
        ("- 5", "-5"),
        ("5 -3", "5 - 3"),
        ("(2) -3", "(2) - 3"),
        ("x = -3.0", "x = -3"),
        ("cafe\u0301", "caf\u00e9"),
        ("\u22125", "-5"),
        ("STRASSE", "straße"),
        ("7!", "7"),
    ],
)
def test_equal_answers(one: str, other: str):
    assert normalised(one) == normalised(other)


@pytest.mark.parametrize(
    ("one", "other"),
    [("5", "-5"), ("1.5", "15"), ("1,5", "15"), ("3-5", "3 5"), ("72 apples", "72"), ("12 m", "12 km"), ("1/3", "1/4"),
     ("1,2345", "1234 5"), ("1,2345", "12345"), ("0,500", "500"), ("2 * -3", "2 * 3"),
     ("5 - 3", "-5 3"), ("v.5", "v 0.5")],
)  # fmt: skip
def test_unequal_answers(one: str, other: str):
    assert normalised(one) != normalised(other)


def test_numbers_are_compared_exactly_however_long():
    assert normalised("0." + "3" * 40) != normalised("0." + "3" * 39)
    assert normalised("9" * 5000) == normalised("9" * 5000)


def test_nothing_is_never_right():
    assert is_right("The sum is 5. Answer: 5.0", "2 + 3 = 5. Answer: 5")
    assert is_right("5", "2 + 3 = 5. Answer: 5")
    assert not is_right("", "")
    assert not is_right(" . ", "5")


def test_all_of_a_wanted_answer_counts_where_it_has_lines_and_no_mark():
    wanted = "roses are red\nviolets are blue"

    assert is_right("Roses are red\n violets are blue.\n", wanted)
    assert not is_right("roses are red\nviolets are green", wanted)
    assert not is_right("roses are red", wanted)
    assert not is_right(f"{wanted}\nand so on", wanted)
    assert is_right("2 + 3\n= 5\nAnswer: 5\nWhat else?", "2 + 3 = 5\nAnswer: 5")
    assert is_right("roses are red\nor not", "roses are red\n")


def test_a_number_without_all_of_its_commas_is_several_parts():
    assert normalised("1,2345") == ("1", ",", "2345")
    assert normalised("1,234,567") == ("1234567",)
