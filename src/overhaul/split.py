"""Dividing a corpus into train, calib and heldout by document, without leaks, the same way everywhere."""

from __future__ import annotations

import hashlib
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from overhaul.documents import Row, row_text, text_row
from overhaul.errors import UserError

SHARE = 0.05
"""Of the bytes, for calib and for heldout each; more in a small corpus, for enough windows:"""
HELDOUT_FLOOR_BYTES = 36_000
"""About 16 windows of 512 tokens of English."""
CALIB_FLOOR_BYTES = 18_000
"""About 8; calibration that needs more goes on into the training text."""
LARGEST_SHARE = 0.125

LONG_LINE_CHARACTERS = 50
"""A line or sentence this long that is met again was copied: it may not be on both sides."""

OF_CLASS = 0.2
"""Of the examples of each class, where they are divided by class."""

_SENTENCE_END = re.compile(r"(?<=[.!?])\s+")


@dataclass(frozen=True, slots=True, kw_only=True)
class Split:
    """Three parts of a corpus, each in the order of the source, and what was taken out of the first two.

    Attributes:
        train, calib, heldout: no long line of heldout is in the others.
        lines_removed: lines and sentences removed from train and calib.
        rows_removed: rows removed from them, whole.
    """

    train: tuple[Row, ...]
    calib: tuple[Row, ...]
    heldout: tuple[Row, ...]
    lines_removed: int = 0
    rows_removed: int = 0


def split(rows: Sequence[Row]) -> Split:
    """Divides rows by their content's hash, so that neither order nor machine changes who is held out.

    A document larger than the held-out part should be stays in train. Where that leaves too little to choose
    from, as with a single book, each text is cut in order instead: its beginning is train, its end heldout.
    Then long lines and sentences of heldout are removed from train and calib; rows that are not plain text
    are removed whole, and only what they train on is compared.

    Raises:
        UserError: fewer than three rows that cannot be cut, or nothing is left to train on.
    """
    total_bytes = sum(map(num_bytes, rows))
    calib_bytes = total_bytes * share(total_bytes, CALIB_FLOOR_BYTES)
    heldout_bytes = total_bytes * share(total_bytes, HELDOUT_FLOOR_BYTES)
    movable = [row for row in rows if num_bytes(row) <= heldout_bytes]
    if sum(map(num_bytes, movable)) >= 2 * (calib_bytes + heldout_bytes):
        parts = _by_hash(rows, movable, calib_bytes, heldout_bytes)
    elif all(_is_text(row) for row in rows):
        parts = _in_order(rows, calib_bytes / total_bytes, heldout_bytes / total_bytes)
    elif len(rows) >= 3:
        parts = _by_hash(rows, rows, calib_bytes, heldout_bytes)
    else:
        raise UserError(f"{len(rows)} rows cannot be split into train, calib and heldout", allowed="3 rows or more")
    return _without_leaks(*parts)


def share(total_bytes: int, floor_bytes: int) -> float:
    """Of a corpus, what makes a part of at least `floor_bytes`, from `SHARE` to `LARGEST_SHARE`."""
    return min(LARGEST_SHARE, max(SHARE, floor_bytes / total_bytes))


def num_bytes(row: Row) -> int:
    """Size of the row's text in UTF-8."""
    return sum(len(text.encode("utf-8", "surrogatepass")) for text, _ in row_text(row))


def leaks(train: Iterable[Row], heldout: Iterable[Row]) -> list[str]:
    """Long lines, sentences and whole rows of `heldout` that are in `train` too; empty is right."""
    ids = {row.id for row in heldout}
    lines = _long_lines(heldout)
    found = [row.id for row in train if row.id in ids]
    return found + [line for row in train for line in _long_lines([row]) if line in lines]


def _is_text(row: Row) -> bool:
    return tuple(row) == ("text",)


def _by_hash(
    rows: Sequence[Row], movable: Sequence[Row], calib_bytes: float, heldout_bytes: float
) -> tuple[list[Row], list[Row], list[Row]]:
    """Fills heldout, then calib, in the order of the hashes; equal rows go the same way."""
    sizes = {row.id: 0 for row in sorted(movable, key=lambda row: row.id)}
    for row in movable:
        sizes[row.id] += num_bytes(row)
    unique = iter(sizes.items())
    heldout, calib = _take(unique, heldout_bytes), _take(unique, calib_bytes)
    chosen = heldout | calib
    return (
        [row for row in rows if row.id not in chosen],
        [row for row in rows if row.id in calib],
        [row for row in rows if row.id in heldout],
    )


def _take(sizes: Iterator[tuple[str, int]], wanted_bytes: float) -> set[str]:
    taken, taken_bytes = set(), 0
    for name, size in sizes:
        taken.add(name)
        taken_bytes += size
        if taken_bytes >= wanted_bytes:
            break
    return taken


def _in_order(rows: Sequence[Row], calib_share: float, heldout_share: float) -> tuple[list[Row], list[Row], list[Row]]:
    """Cuts each text into a beginning, a middle and an end."""
    parts: tuple[list[Row], list[Row], list[Row]] = ([], [], [])
    for row in rows:
        text = row["text"]
        first = _cut(text, round(len(text) * (1 - calib_share - heldout_share)))
        second = max(first, _cut(text, round(len(text) * (1 - heldout_share))))
        for part, piece in zip(parts, (text[:first], text[first:second], text[second:]), strict=True):
            if piece.strip():
                part.append(text_row(piece.strip("\n"), cut_of=row.document))
    return parts


def _cut(text: str, at: int) -> int:
    """The end of the last paragraph, else line, else word before `at`, within a tenth of the text."""
    for end in ("\n\n", "\n", " "):
        if (found := text.rfind(end, at - len(text) // 10, at)) >= 0:
            return found + len(end)
    return at


def _without_leaks(train: list[Row], calib: list[Row], heldout: list[Row]) -> Split:
    without = WithoutLeaks(heldout)
    cleaned = {name: tuple(without(part)) for name, part in (("train", train), ("calib", calib))}
    if not cleaned["train"] or not heldout:
        raise UserError(
            "nothing is left to train on once what the held-out text repeats is removed"
            if heldout
            else "the text is too short to hold a part of it out",
            allowed="a corpus with more, and more different, text",
        )
    return Split(
        train=cleaned["train"],
        calib=cleaned["calib"],
        heldout=tuple(heldout),
        lines_removed=without.lines_removed,
        rows_removed=without.rows_removed,
    )


class WithoutLeaks:
    """Takes out of rows what a held-out text has too.

    Attributes:
        lines_removed: lines and sentences, so far.
        rows_removed: whole rows, so far.
    """

    def __init__(self, heldout: Sequence[Row]) -> None:
        self._lines, self._ids = _long_lines(heldout), {row.id for row in heldout}
        self.lines_removed = self.rows_removed = 0

    def __call__(self, rows: Iterable[Row]) -> Iterator[Row]:
        """The rows, one by one, without what is held out."""
        for row in rows:
            clean, removed = _clean(row, self._lines)
            if clean is None or clean.id in self._ids:
                self.rows_removed += 1
            else:
                self.lines_removed += removed
                yield clean


def _clean(row: Row, forbidden: set[str]) -> tuple[Row | None, int]:
    """The row without forbidden lines and how many those were; None if nothing of it can be kept."""
    if forbidden.isdisjoint(_long_lines([row])):
        return row, 0
    if not _is_text(row):
        return None, 0
    kept, removed = [], 0
    for line in row["text"].split("\n"):
        if len(line) < LONG_LINE_CHARACTERS:
            kept.append(line)
            continue
        indent, words = line[: -len(line.lstrip())], line.strip()
        sentences = _SENTENCE_END.split(words)
        allowed = [] if words in forbidden else [s for s in sentences if s not in forbidden]
        if len(allowed) == len(sentences):
            kept.append(line)
        elif allowed:
            kept.append(indent + " ".join(allowed))
        removed += len(sentences) - len(allowed) if allowed else 1
    text = "\n".join(kept).strip("\n")
    return (text_row(text, cut_of=row.document) if text.strip() else None), removed


def _long_lines(rows: Iterable[Row]) -> set[str]:
    """Lines and sentences, in what the rows train on, that are long enough to be told apart."""
    found = set()
    for row in rows:
        for text, trained in row_text(row):
            for line in map(str.strip, text.split("\n") if trained else ()):
                if len(line) >= LONG_LINE_CHARACTERS:
                    found.add(line)
                    found.update(s for s in _SENTENCE_END.split(line) if len(s) >= LONG_LINE_CHARACTERS)
    return found


def fingerprint(parts: Iterable[Sequence[Row]]) -> str:
    """Content hash of the parts, in order: 16 hex digits."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(f"{len(part)}:{''.join(row.id for row in part)};".encode())
    return digest.hexdigest()[:16]


def held_out(labels: Sequence[int], contents: Sequence[bytes], groups: Sequence[bytes] = ()) -> tuple[list[bool], int]:
    """Chooses a fifth of each class by content: neither order nor machine changes who is held out.

    Equal contents go the same way, and what is in one group does. What occurs under several labels is trained on: it
    could not be told right or wrong. Never all of a class is held out.

    Args:
        labels: of the examples.
        contents: a hash of each.
        groups: a hash of what must not be divided; empty for contents.

    Returns:
        For each example whether it is held out, and how many occur under several labels.
    """
    labels_of: dict[bytes, set[int]] = defaultdict(set)
    for content, label in zip(contents, labels, strict=True):
        labels_of[content].add(label)
    places: dict[int, dict[bytes, list[int]]] = defaultdict(lambda: defaultdict(list))
    contradictory = 0
    for place, (key, label) in enumerate(zip(groups or contents, labels, strict=True)):
        if len(labels_of[contents[place]]) > 1:
            contradictory += 1
        else:
            places[label][key].append(place)
    found = [False] * len(labels)
    for members_of in places.values():
        wanted = max(1, round(OF_CLASS * sum(map(len, members_of.values()))))
        for _, members in sorted(members_of.items())[:-1]:
            for place in members:
                found[place] = True
            wanted -= len(members)
            if wanted <= 0:
                break
    return found, contradictory
