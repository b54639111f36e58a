"""When an answer is right: what of it counts, and what is equal to what."""

from __future__ import annotations

import re
import unicodedata
from fractions import Fraction

MARK = "Answer:"
"""What stands between the working of an answer and its result."""
_PART = re.compile(r"((?:[1-9]\d{0,2}(?:,\d{3})+(?!\d|,\d)|\d{1,60})(?:\.\d{1,60})?|(?<![\w.])\.\d{1,60})|[^\W\d_]+|\S")
"""A number, with commas between all of its thousands or without, or a word, or a sign."""


def worked(steps: str, result: object) -> str:
    """An answer on one line: how it is found, and what it is."""
    return f"{steps}. {MARK} {result}"


def result(answer: str) -> str:
    """What of an answer counts: the line behind its last mark, or its first line where there is no mark."""
    lines = _behind_mark(answer).splitlines()
    return lines[0].strip() if lines else ""


def _behind_mark(answer: str) -> str:
    before, mark, after = answer.rpartition(MARK)
    return (after if mark else before or after).strip()


def normalised(text: str) -> tuple[str, ...]:
    """The parts of a text: words without capitals, and numbers by their value, so that 1,000.0 is 1000 and .5 is 0.5.

    Spaces, and full stops and the like at its end, are no part of it: `12.50m.` is `12.5 m`. A minus belongs to the
    number behind it unless it stands between two things that it may part: `5 -3` is `5 - 3`. Letters are compared as
    they look, however their accents are stored (Unicode's form NFC).
    """
    text = unicodedata.normalize("NFC", text).replace("\u2212", "-").strip().rstrip(" .!?;:").casefold()
    parts: list[str] = []
    for found in _PART.finditer(text):
        if found[1] is None:
            parts.append(found[0])
            continue
        number = Fraction(found[1].replace(",", ""))
        if parts[-1:] == ["-"] and not (parts[:-1] and (parts[-2][-1].isalnum() or parts[-2] == ")")):
            number = -number
            parts.pop()
        parts.append(str(number))
    return tuple(parts)


def is_right(answer: str, wanted: str) -> bool:
    """Whether two answers have the same result, which is not empty.

    Where the wanted answer has several lines and no mark, all of both counts.
    """
    counts = _behind_mark if MARK not in wanted and "\n" in wanted.strip() else result
    found = normalised(counts(answer))
    return bool(found) and found == normalised(counts(wanted))
