"""Problems by rule: their answers are computed here once more, from the words of the question."""

from __future__ import annotations

import re
from collections.abc import Callable
from fractions import Fraction
from itertools import islice

import pytest

from overhaul.answers import normalised, result
from overhaul.question_templates import FAMILIES, Pair, definitions_in, in_digits, pairs

SIZES = {
    **{"millimetre": "0.001", "centimetre": "0.01", "metre": "1", "kilometre": "1000"},
    **{"milligram": "0.000001", "gram": "0.001", "kilogram": "1", "tonne": "1000"},
    **{"millilitre": "0.001", "centilitre": "0.01", "litre": "1", "cubic metre": "1000"},
    **{"second": "1", "minute": "60", "hour": "3600", "day": "86400", "week": "604800"},
    **{"byte": "1", "kilobyte": "1000", "megabyte": "1000000", "gigabyte": "1000000000"},
    **{"kibibyte": "1024", "mebibyte": "1048576", "gibibyte": "1073741824"},
    **{"volt": "1", "kilovolt": "1000", "watt": "1", "kilowatt": "1000", "megawatt": "1000000"},
    **{"pascal": "1", "hectopascal": "100", "kilopascal": "1000", "bar": "100000"},
}
"""Of each unit, in the one of its quantity that has no prefix."""


def mean(*numbers: Fraction) -> Fraction:
    return sum(numbers, Fraction()) / len(numbers)


# A pattern that only one family has, and the answer from the numbers in their order.
ARITHMETIC: tuple[tuple[str, Callable[..., Fraction]], ...] = (
    (r"buys .* gives .* away", lambda a, b, c: a + b - c),
    (r"together\?", lambda a, b: a + b),
    (r"How many more has", lambda a, b: a - b),
    (r"boxes with", lambda a, b, c: a * b + c),
    (r"shares .* equally", lambda a, b: a / b),
    (r"into bags of", lambda a, b: a % b),
    (r"How much comes back", lambda a, b, c: a - b * c),
    (r"an hour for", lambda a, b, c: a * b + c),
    (r"times as many", lambda a, b: a + a * b),
    (r"the mean of", mean),
    (r"What is \d+ \+", lambda a, b, c: a + b * c),
    (r"What is \d+ -", lambda a, b, c: a - b * c),
    (r"A file of", lambda a, b: a / b),
    (r"metres a second are", lambda a: a / Fraction("3.6")),
)


def answer_to(question: str) -> Fraction:
    """What the words ask for."""
    for pattern, compute in ARITHMETIC:
        if re.search(pattern, question):
            return compute(*map(Fraction, re.findall(r"\d+(?:\.\d+)?", question)))
    found = re.fullmatch(r"How many ([a-z ]+)s are ([\d.]+) ([a-z ]+)s(?: and (\d+) ([a-z ]+)s)?\?", question)
    assert found, question
    wanted, count, unit, rest, small = found.groups()
    whole = Fraction(count) * Fraction(SIZES[unit]) + (Fraction(rest) * Fraction(SIZES[small]) if rest else 0)
    return whole / Fraction(SIZES[wanted])


@pytest.fixture(scope="module", params=[10, 100, 1000])
def many(request: pytest.FixtureRequest) -> list[Pair]:
    return list(islice(pairs(tuple(FAMILIES), seed=request.param, largest=request.param), 3000))


def test_every_answer_is_what_the_words_of_the_question_ask_for(many: list[Pair]):
    for pair in many:
        assert normalised(result(pair.answer))[0] == str(answer_to(pair.question)), pair


def test_every_step_of_the_working_holds(many: list[Pair]):
    for pair in many:
        working = pair.answer.partition(". Answer:")[0]
        steps = [step for step in working.split(", ") if " = " in step]
        assert steps, pair
        for step in steps:
            left, _, right = step.partition(" = ")
            exact = re.sub(r"\d+(?:\.\d+)?", lambda number: f"Fraction('{number[0]}')", left)
            assert eval(exact, {"Fraction": Fraction}) == Fraction(right), pair
        for one, unit, factor, small in re.findall(r"(1) ([a-z ]+) is (\d+) ([a-z ]+)s,", working):
            assert Fraction(one) * Fraction(SIZES[unit]) == Fraction(factor) * Fraction(SIZES[small])


def test_a_question_and_its_answer_are_a_line_each(many: list[Pair]):
    assert all("\n" not in pair.question + pair.answer and pair.question.endswith("?") for pair in many)


@pytest.mark.parametrize("largest", [10, 11, 100])
def test_no_larger_number_is_drawn(largest: int):
    """Of the families whose questions hold what was drawn and nothing computed from it; of a speed, the answer."""
    plain = r"buys|together|How many more|boxes with|an hour for|times as many|the mean of|What is \d"
    asked = list(islice(pairs(tuple(FAMILIES), seed=0, largest=largest), 4000))
    drawn = {n for p in asked if re.search(plain, p.question) for n in map(int, re.findall(r"\d+", p.question))}
    speeds = {int(result(p.answer)) for p in asked if "metres a second are" in p.question}
    of_units = [(p, re.fullmatch(r"How many [a-z ]+s are ([\d.]+) ([a-z ]+)s\?", p.question)) for p in asked]
    counts = {Fraction(found[1]) for p, found in of_units if found and p.answer.startswith(f"1 {found[2]} is")}

    assert max(drawn) == largest
    assert max(speeds) == largest - largest % 5
    assert largest - 1 < max(counts) <= largest


def test_no_eight_words_in_a_row_are_without_a_number(many: list[Pair]):
    for pair in many:
        words = re.findall(r"[\w.]+", pair.question)
        assert all(any(word[0].isdigit() for word in words[at : at + 8]) for at in range(len(words) - 7)), pair


def test_the_same_seed_draws_the_same_problems_and_another_seed_others():
    first, again, other = ([p.question for p in islice(pairs(("units",), seed=s), 200)] for s in (1, 1, 2))

    assert first == again
    assert len(set(first) & set(other)) < 20


def test_a_kind_has_its_own_problems_and_many_of_them():
    for kind in FAMILIES:
        found = list(islice(pairs((kind,), seed=0), 10_000))

        assert {pair.kind for pair in found} == {kind}
        assert len({pair.question for pair in found}) > 7_000


@pytest.mark.parametrize(
    ("number", "digits"),
    [(12, "12"), ("3/4", "0.75"), ("-1/8", "-0.125"), ("25/2", "12.5"), (0, "0"), ("1/1000", "0.001")],
)
def test_numbers_are_written_exactly(number: int | str, digits: str):
    assert in_digits(Fraction(number)) == digits


def test_a_third_has_no_decimal():
    with pytest.raises(ValueError, match="1/3"):
        in_digits(Fraction(1, 3))


PAGE = """NAME

getent, other - get entries from libraries

DESCRIPTION

A lighthouse is a tower with a lamp at its top. It is a thing to see. The tower is the oldest of all. Sloops are the \
smallest of ships with one mast. Nobody is an island in this text. Oslo is large.
"""


def test_definitions_are_found_where_a_text_has_them():
    found = definitions_in(PAGE)

    assert [(pair.question, pair.answer) for pair in found] == [
        ("What is getent?", "get entries from libraries"),
        ("What is a lighthouse?", "A lighthouse is a tower with a lamp at its top."),
        ("What are Sloops?", "Sloops are the smallest of ships with one mast."),
    ]
    assert all(pair.answer in PAGE and pair.kind == "definitions" for pair in found)


def test_definitions_come_once_each_and_then_the_other_kinds_alone():
    found = definitions_in(PAGE)

    assert sorted(pair.question for pair in pairs(("definitions",), seed=0, definitions=found)) == sorted(
        pair.question for pair in found
    )
    mixed = list(islice(pairs(("definitions", "units"), seed=0, definitions=found), 100))
    assert [pair.kind for pair in mixed].count("definitions") == len(found)
    assert list(pairs(("definitions",), seed=0)) == []
