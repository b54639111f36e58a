"""When an answer is right: what of it counts, and what is equal to what."""

from __future__ import annotations

import re
from fractions import Fraction

MARK = "Answer:"
"""What stands between the working of an answer and its result."""
_PART = re.compile(r"((?:(?<![\w)])-)?(?:\d{1,3}(?:,\d{3})+|\d{1,60})(?:\.\d{1,60})?)|[^\W\d_]+|\S")
"""A number, with commas between its thousands or without, or a word, or a sign. A minus after a digit is a sign."""


def worked(steps: str, result: object) -> str:
    """An answer on one line: how it is found, and what it is."""
    return f"{steps}. {MARK} {result}"


def result(answer: str) -> str:
    """What of an answer counts: the line behind its last mark, or its first line where there is no mark."""
    before, mark, after = answer.rpartition(MARK)
    lines = (after if mark else before or after).strip().splitlines()
    return lines[0].strip() if lines else ""


def normalised(text: str) -> tuple[str, ...]:
    """The parts of a text: words without capitals, and numbers by their value, so that 1,000.0 is 1000.

    Spaces, and full stops and the like at its end, are no part of it: `12.50m.` is `12.5 m`.
    """
    text = text.replace("\u2212", "-").strip().rstrip(" .!?;:").casefold()
    return tuple(
        str(Fraction(found[1].replace(",", ""))) if found[1] is not None else found[0] for found in _PART.finditer(text)
    )


def is_right(answer: str, wanted: str) -> bool:
    """Whether two answers have the same result, which is not empty."""
    found = normalised(result(answer))
    return bool(found) and found == normalised(result(wanted))
