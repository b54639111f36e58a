"""Problems made by rule, each with its working and an exact answer: arithmetic in words, units, definitions in a text.

A family is a function of a random generator; numbers are exact. No run of eight words of a question is without a
number, so that two questions of a family do not count as one for the words they share.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

from overhaul.answers import worked

NAMES = (
    *("Ada", "Ahmed", "Amara", "Ana", "Ben", "Carlos", "Chen", "Clara", "David", "Elena", "Emil", "Fatima", "Femi"),
    *("Greta", "Hana", "Hugo", "Ines", "Ivan", "Jana", "Jonas", "Kofi", "Lars", "Leila", "Lena", "Luis", "Maja"),
    *("Marco", "Mei", "Nadia", "Nils", "Noor", "Olga", "Omar", "Paula", "Priya", "Rosa", "Sami", "Tariq", "Yuki"),
)
THINGS = (
    *("apples", "bags", "balls", "beads", "books", "boxes", "bricks", "buttons", "cakes", "candles", "cards", "chairs"),
    *("coins", "cups", "eggs", "flowers", "keys", "lamps", "letters", "maps", "marbles", "nails", "oranges", "pens"),
    *("pictures", "plates", "ropes", "seeds", "shells", "spoons", "stamps", "stones", "tickets", "tiles", "tools"),
)
VEHICLES = ("boat", "bus", "car", "lorry", "ship", "train", "tram", "van")
LEAST = 10
"""The largest number of a question may not be smaller than this."""


@dataclass(frozen=True, slots=True)
class Pair:
    """A question and its answer, each on one line.

    Attributes:
        question, answer: the text.
        kind: of the question, such as `units`.
        source: the page it was written from, in plain data; None where there is none.
        text: what its writer saw of that page.
    """

    question: str
    answer: str
    kind: str
    source: Mapping[str, Any] | None = None
    text: str = field(default="", repr=False)


Family = Callable[[random.Random, int], tuple[str, str]]
"""Draws a question with its answer; the second argument is the largest number to draw."""


def in_digits(number: Fraction | int) -> str:
    """An exact decimal: 12, 0.75.

    Raises:
        ValueError: it has no end, such as a third.
    """
    number = Fraction(number)
    places = next((n for n in range(40) if (number * 10**n).denominator == 1), None)
    if places is None:
        raise ValueError(f"{number} has no finite decimal")
    whole = str(abs(int(number * 10**places))).zfill(places + 1)
    digits = f"{whole[:-places]}.{whole[-places:]}" if places else whole
    return f"-{digits}" if number < 0 else digits


# Arithmetic in words.


def _trade(draw: random.Random, largest: int) -> tuple[str, str]:
    name, things = draw.choice(NAMES), draw.choice(THINGS)
    a, b = _two(draw, largest)
    c = draw.randint(2, min(largest, a + b - 1))
    question = f"{name} has {a} {things}, buys {b} more and then gives {c} away. How many {things} are left?"
    return question, worked(f"{a} + {b} = {a + b}, {a + b} - {c} = {a + b - c}", a + b - c)


def _together(draw: random.Random, largest: int) -> tuple[str, str]:
    (name, other), things = draw.sample(NAMES, 2), draw.choice(THINGS)
    a, b = _two(draw, largest)
    question = f"{name} has {a} {things} and {other} has {b}. How many is that together?"
    return question, worked(f"{a} + {b} = {a + b}", a + b)


def _more(draw: random.Random, largest: int) -> tuple[str, str]:
    (name, other), things = draw.sample(NAMES, 2), draw.choice(THINGS)
    b, a = sorted(draw.sample(range(2, largest + 1), 2))
    question = f"{name} has {a} {things} and {other} has {b}. How many more has {name}?"
    return question, worked(f"{a} - {b} = {a - b}", a - b)


def _boxes(draw: random.Random, largest: int) -> tuple[str, str]:
    things, c = draw.choice(THINGS), draw.randint(2, largest)
    a, b = _two(draw, largest)
    question = f"There are {a} boxes with {b} {things} each and {c} single ones. How many {things} are there?"
    return question, worked(f"{a} * {b} = {a * b}, {a * b} + {c} = {a * b + c}", a * b + c)


def _shared(draw: random.Random, largest: int) -> tuple[str, str]:
    name, things = draw.choice(NAMES), draw.choice(THINGS)
    each, b = _two(draw, largest)
    question = f"{name} shares {each * b} {things} equally among {b} friends. How many does each get?"
    return question, worked(f"{each * b} / {b} = {each}", each)


def _left_over(draw: random.Random, largest: int) -> tuple[str, str]:
    name, things = draw.choice(NAMES), draw.choice(THINGS)
    bags, b = _two(draw, largest)
    rest = draw.randrange(b)
    a = bags * b + rest
    question = f"{name} puts {a} {things} into bags of {b}. How many are left over?"
    return question, worked(f"{bags} * {b} = {bags * b}, {a} - {bags * b} = {rest}", rest)


def _change(draw: random.Random, largest: int) -> tuple[str, str]:
    name, things, rest = draw.choice(NAMES), draw.choice(THINGS), draw.randint(0, largest)
    b, c = _two(draw, largest)
    a = b * c + rest
    question = f"{name} pays {a} euros for {b} {things} at {c} euros each. How much comes back?"
    return question, worked(f"{b} * {c} = {b * c}, {a} - {b * c} = {rest}", rest)


def _journey(draw: random.Random, largest: int) -> tuple[str, str]:
    vehicle, c = draw.choice(VEHICLES), draw.randint(2, largest)
    a, b = draw.randint(2, largest), draw.randint(2, min(12, largest))
    question = f"A {vehicle} goes {a} kilometres an hour for {b} hours, then {c} kilometres more. How far in all?"
    return question, worked(f"{a} * {b} = {a * b}, {a * b} + {c} = {a * b + c}", f"{a * b + c} kilometres")


def _times(draw: random.Random, largest: int) -> tuple[str, str]:
    (name, other), things = draw.sample(NAMES, 2), draw.choice(THINGS)
    a, b = draw.randint(2, largest), draw.randint(2, 9)
    question = f"{name} has {a} {things} and {other} has {b} times as many. How many in all?"
    return question, worked(f"{b} * {a} = {a * b}, {a} + {a * b} = {a + a * b}", a + a * b)


def _mean(draw: random.Random, largest: int) -> tuple[str, str]:
    a, b = _two(draw, largest)
    c = draw.choice([number for number in range(2, largest + 1) if (a + b + number) % 3 == 0])
    total = a + b + c
    steps = f"{a} + {b} + {c} = {total}, {total} / 3 = {total // 3}"
    return f"What is the mean of {a}, {b} and {c}?", worked(steps, total // 3)


def _expression(draw: random.Random, largest: int) -> tuple[str, str]:
    a, b = _two(draw, largest)
    c, sign = draw.randint(2, min(12, largest)), draw.choice("+-")
    value = a + b * c if sign == "+" else a - b * c
    return f"What is {a} {sign} {b} * {c}?", worked(f"{b} * {c} = {b * c}, {a} {sign} {b * c} = {value}", value)


def _two(draw: random.Random, largest: int) -> tuple[int, int]:
    return draw.randint(2, largest), draw.randint(2, largest)


# Units. Each group has its units from small to large, with how many of the first one makes.

UNITS: tuple[tuple[tuple[str, int], ...], ...] = (
    (("millimetre", 1), ("centimetre", 10), ("metre", 1000), ("kilometre", 10**6)),
    (("milligram", 1), ("gram", 1000), ("kilogram", 10**6), ("tonne", 10**9)),
    (("millilitre", 1), ("centilitre", 10), ("litre", 1000), ("cubic metre", 10**6)),
    (("second", 1), ("minute", 60), ("hour", 3600), ("day", 86_400), ("week", 604_800)),
    (("byte", 1), ("kilobyte", 1000), ("megabyte", 10**6), ("gigabyte", 10**9)),
    (("byte", 1), ("kibibyte", 1024), ("mebibyte", 1024**2), ("gibibyte", 1024**3)),
    (("volt", 1), ("kilovolt", 1000)),
    (("watt", 1), ("kilowatt", 1000), ("megawatt", 10**6)),
    (("pascal", 1), ("hectopascal", 100), ("kilopascal", 1000), ("bar", 100_000)),
)


@dataclass(frozen=True, slots=True)
class _Conversion:
    """Two units of a quantity, and how many of the small one make the large one."""

    small: str
    large: str
    factor: int

    @classmethod
    def drawn(cls, draw: random.Random) -> _Conversion:
        (small, less), (large, more) = sorted(draw.sample(draw.choice(UNITS), 2), key=lambda unit: unit[1])
        return cls(small, large, more // less)

    @property
    def rule(self) -> str:
        return f"1 {self.large} is {self.factor} {self.small}s"

    def count(self, draw: random.Random, largest: int) -> Fraction:
        """Of the large unit; with a tenth only where that is a whole number of the small one."""
        tenths = draw.randint(1, 9) if self.factor % 10 == 0 and draw.random() < 0.5 else 0
        return draw.randint(2, largest - bool(tenths)) + Fraction(tenths, 10)


def _into_small(draw: random.Random, largest: int) -> tuple[str, str]:
    pair = _Conversion.drawn(draw)
    count = pair.count(draw, largest)
    value, told = in_digits(count * pair.factor), in_digits(count)
    question = f"How many {pair.small}s are {told} {pair.large}s?"
    return question, worked(f"{pair.rule}, {told} * {pair.factor} = {value}", value)


def _into_large(draw: random.Random, largest: int) -> tuple[str, str]:
    pair = _Conversion.drawn(draw)
    count = pair.count(draw, largest)
    told, value = in_digits(count * pair.factor), in_digits(count)
    question = f"How many {pair.large}s are {told} {pair.small}s?"
    return question, worked(f"{pair.rule}, {told} / {pair.factor} = {value}", value)


def _mixed(draw: random.Random, largest: int) -> tuple[str, str]:
    pair, count = _Conversion.drawn(draw), draw.randint(2, largest)
    rest, whole = draw.randint(2, min(pair.factor - 1, largest)), count * pair.factor
    question = f"How many {pair.small}s are {count} {pair.large}s and {rest} {pair.small}s?"
    steps = f"{pair.rule}, {count} * {pair.factor} = {whole}, {whole} + {rest} = {whole + rest}"
    return question, worked(steps, whole + rest)


def _download(draw: random.Random, largest: int) -> tuple[str, str]:
    unit, (seconds, rate) = draw.choice(("kilobytes", "megabytes", "gigabytes")), _two(draw, largest)
    size = seconds * rate
    question = f"A file of {size} {unit} comes at {rate} {unit} a second. How long, in seconds?"
    return question, worked(f"{size} / {rate} = {seconds}", f"{seconds} seconds")


def _speed(draw: random.Random, largest: int) -> tuple[str, str]:
    value = 5 * draw.randint(1, largest // 5)  # 18 km/h are 5 m/s, the least that are whole in both
    an_hour = value * 18 // 5
    question = f"How many metres a second are {an_hour} kilometres an hour?"
    return question, worked(f"{an_hour} * 1000 = {an_hour * 1000}, {an_hour * 1000} / 3600 = {value}", value)


FAMILIES: dict[str, tuple[Family, ...]] = {
    "arithmetic": (
        *(_trade, _together, _more, _boxes, _shared, _left_over, _change, _journey, _times, _mean, _expression),
    ),
    "units": (_into_small, _into_large, _mixed, _download, _speed),
}
DEFINITIONS = "definitions"
KINDS = (*FAMILIES, DEFINITIONS)


def pairs(kinds: Sequence[str], *, seed: int, largest: int = 100, definitions: Sequence[Pair] = ()) -> Iterator[Pair]:
    """Problems without end, each of a kind and a family drawn by the seed; definitions come once each.

    Args:
        kinds: of `KINDS`.
        seed: the same one draws the same problems.
        largest: number that is drawn, at least `LEAST`; what is computed from those, such as products, sums and numbers
            in a smaller unit, is larger, also where it stands in the question.
        definitions: what was found in pages, for the kind of that name.
    """
    draw = random.Random(f"questions/{seed}")
    found = draw.sample(list(definitions), len(definitions)) if DEFINITIONS in kinds else []
    left = [kind for kind in kinds if kind != DEFINITIONS or found]
    while left:
        kind = draw.choice(left)
        if kind == DEFINITIONS:
            yield found.pop()
            left = [other for other in left if other != DEFINITIONS or found]
        else:
            yield Pair(*draw.choice(FAMILIES[kind])(draw, largest), kind)


# Definitions.

_NOT_A_NAME = frozenset(
    (
        *("a", "all", "an", "and", "another", "any", "anyone", "anything", "both", "but"),
        *("each", "every", "everybody", "everyone", "everything", "first", "following", "he", "here", "his"),
        *("how", "i", "if", "in", "it", "its", "last", "my", "next", "no"),
        *("nobody", "none", "nor", "nothing", "now", "one", "only", "or", "other", "our"),
        *("result", "same", "second", "she", "so", "some", "someone", "something", "such", "that"),
        *("the", "their", "then", "there", "these", "they", "this", "those", "we", "what"),
        *("when", "where", "which", "who", "why", "you", "your"),
    )
)
_MANUAL = re.compile(r"\ANAME\n+([\w.+-]+)(?:, [\w.+-]+)* - (\S[^\n]{8,200})$", re.MULTILINE)
_SENTENCE = re.compile(
    r"(?:^|(?<=[.!?] ))((?:An? )?[\w-]+(?: [\w-]+){0,2}) (is|are) ((?:an?|the) [^.!?;:\n]{12,200})\.(?=\s|$)",
    re.MULTILINE,
)


def definitions_in(text: str) -> list[Pair]:
    """Questions about what something is, where a text says it in a sentence `X is a Y.`, and of a manual page its name.

    The answer stands in the text as it is. Simple patterns find few definitions, and some that are none. Subjects with
    `the` are left out: mostly they are something that the text spoke of before.
    """
    found = [Pair(f"What is {name}?", told.strip(), DEFINITIONS) for name, told in _MANUAL.findall(text)]
    for subject, verb, told in _SENTENCE.findall(text):
        words = subject.split()
        bare = words[1:] if words[0] in ("A", "An") else words
        if not bare or not subject[0].isupper() or _NOT_A_NAME.intersection(word.lower() for word in bare):
            continue
        asked = subject[0].lower() + subject[1:] if bare is not words else subject
        found.append(Pair(f"What {verb} {asked}?", f"{subject} {verb} {told}.", DEFINITIONS))
    return found
