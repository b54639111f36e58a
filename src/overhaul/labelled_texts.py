"""Texts with labels: rows of tables with a column for each, or corpora that are a class each; in train and heldout."""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from overhaul.corpora import Corpus, open_several
from overhaul.documents import Row, class_name, row_text
from overhaul.errors import UserError, did_you_mean
from overhaul.records import NotUtf8Error, records
from overhaul.split import held_out

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

_WORD = re.compile(r"\S+")
LISTED = 5
"""Names in a note or an error; of the others, how many there are."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LabelledTexts:
    """Texts and what they are.

    Attributes:
        texts: none of them empty.
        labels_N: int64, places in the set's `classes`.
    """

    texts: tuple[str, ...]
    labels_N: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.labels_N)

    def chosen(self, kept_N: NDArray[np.bool_]) -> LabelledTexts:
        """Some of them."""
        texts = tuple(text for text, is_kept in zip(self.texts, kept_N, strict=True) if is_kept)
        return LabelledTexts(texts=texts, labels_N=self.labels_N[kept_N])

    def relabelled(self, places_C: NDArray[np.int64]) -> LabelledTexts:
        """The same with other labels: for each one that there is, its new one."""
        return LabelledTexts(texts=self.texts, labels_N=places_C[self.labels_N])


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TextSet:
    """Labelled texts in two parts, no text in both.

    Attributes:
        name: as it was asked for.
        licence: what the texts may be used under.
        classes: their names, in the order of the labels; each has texts in both parts.
        train, heldout: for training, for measuring.
        notes: what was left out, one sentence each.
        fingerprint: hash of texts, labels and names, 16 hex digits.
    """

    name: str
    licence: str
    classes: tuple[str, ...]
    train: LabelledTexts
    heldout: LabelledTexts
    notes: tuple[str, ...]
    fingerprint: str


@dataclass
class _Met:
    """What reading a table met."""

    no_label: int = 0
    no_text: int = 0
    undecodable: int = 0
    types: Counter[str] = field(default_factory=Counter)

    def sentences(self) -> list[str]:
        told = (
            (self.no_label, "rows without a label left out"),
            (self.no_text, "rows without text left out"),
            (self.undecodable, "rows or files that are not UTF-8 left out"),
        )
        found = [f"{count:,} {what}" for count, what in told if count]
        if len(self.types) > 1:
            kinds = ", ".join(f"{count:,} {kind}" for kind, count in sorted(self.types.items()))
            found.append(f"labels of several types are read as text: {kinds}")
        return found


def open_labelled(
    path: str, *, label: str, text: str = "text", limit: int | None = None, heldout: int | None = None
) -> TextSet:
    """Reads a table of labelled texts; a fifth of each class is held out.

    Args:
        path: JSON lines, CSV, Parquet, or a directory of them or of `datasets`.
        label: the column of the label; numbers are read as text.
        text: the column of the text.
        limit: of the texts of a class that are trained on, at most, chosen by content; None for all.
        heldout: of those that are held out.

    Raises:
        UserError: it cannot be read, no row has the columns, a label is no name, or no class has two different texts.
    """
    rows, notes = read_labelled(path, label=label, text=text)
    counts = Counter(name for _, name in set(rows))
    few = sorted(name for name, count in counts.items() if count < 2)
    classes = tuple(sorted(counts.keys() - set(few), key=_natural))
    if not classes:
        raise UserError(f"{path} has no class with two different texts", allowed="one to train on and one to hold out")
    places = {name: place for place, name in enumerate(classes)}
    kept = [(said, places[name]) for said, name in rows if name in places]
    hashes = [hashlib.sha256(said.encode("utf-8", "surrogatepass")).digest() for said, _ in kept]
    is_held, contradictory = held_out([place for _, place in kept], hashes)
    parts = _Parts(len(classes), limit, heldout)
    for (said, place), key, held in zip(kept, hashes, is_held, strict=True):
        parts.add(said, place, key, held=held)
    if few:
        notes.append(f"classes with one text, or one again and again, left out: {_listed(few)}")
    if contradictory:
        notes.append(f"{contradictory:,} texts that occur under several labels are trained on, never held out")
    if unmeasured := parts.without_heldout():
        raise UserError(
            f"{path}: nothing of class {classes[unmeasured[0]]} can be held out: its texts occur in other classes too",
            allowed="two different texts of each class that no other class has",
        )
    return parts.as_set(name=Path(path).resolve().name, licence="not stated", classes=classes, notes=notes)


def read_labelled(path: str, *, label: str, text: str = "text") -> tuple[list[tuple[str, str]], list[str]]:
    """The texts of a table with the names of their classes, and what was left out, one sentence each.

    Args:
        path, label, text: as `open_labelled` takes them.

    Raises:
        UserError: it cannot be read, no row has the columns, or a label is no name.
    """
    met, rows, columns = _Met(), list[tuple[str, str]](), dict[str, None]()
    for where, record in records(Path(path)):
        if isinstance(record, NotUtf8Error):
            met.undecodable += 1
            continue
        columns |= dict.fromkeys(map(str, record))
        name, said = class_name(where, record.get(label)), record.get(text)
        if name is None:
            met.no_label += 1
            continue
        met.types[type(record[label]).__name__] += 1
        if not isinstance(said, str) or not said.strip():
            met.no_text += 1
        else:
            rows.append((said, name))
    for column, flag in ((label, "--label-field"), (text, "--text-field")):
        if column not in columns:
            raise UserError(
                f"{path} has no column {column!r}",
                allowed=", ".join(columns) or "rows with a text and a label",
                hint=did_you_mean(column, columns) or f"{flag} {next(iter(columns), 'COLUMN')}",
            )
    if not rows:
        raise UserError(f"{path} has no row with a text and a label", allowed=f'{{"{text}": ..., "{label}": ...}}')
    return rows, met.sentences()


def _natural(name: str) -> tuple[int, int, str]:
    """Sorts 9 before 10, and numbers before names."""
    return (0, int(name), name) if name.isdecimal() else (1, 0, name)


def open_classes(
    paths: Sequence[str], *, words: int, limit: int | None = None, heldout: int | None = None
) -> list[TextSet]:
    """Corpora, each a set of one class: its texts cut into short pieces.

    Args:
        paths: names or paths, as `open_corpus` takes them.
        words: of a piece, with what stands between them; a rest of less than half of it is left out.
        limit: of the pieces of a class that are trained on, at most, chosen by content; None for all.
        heldout: of those that are held out.

    Raises:
        UserError: a corpus cannot be read, or is too short for two pieces.
    """
    return [_class(corpus, words, limit, heldout) for corpus in open_several(paths).values()]


def _class(corpus: Corpus, words: int, limit: int | None, heldout: int | None) -> TextSet:
    trained = dict.fromkeys(_pieces(corpus.train, words))
    held = [piece for piece in dict.fromkeys(_pieces(corpus.heldout, words)) if piece not in trained]
    if not trained or not held:
        raise UserError(f"{corpus.name} is too short for pieces of {words} words", allowed="more text")
    parts = _Parts(1, limit, heldout)
    for is_held, pieces in ((False, trained), (True, held)):
        for piece in pieces:
            parts.add(piece, 0, hashlib.sha256(piece.encode("utf-8", "surrogatepass")).digest(), held=is_held)
    return parts.as_set(name=corpus.name, licence=corpus.licence, classes=(corpus.name,), notes=corpus.notes)


def _pieces(rows: Iterable[Row], words: int) -> Iterator[str]:
    for row in rows:
        said = "".join(piece for piece, _ in row_text(row))
        # Between words stands what stands there: code is known by it.
        starts = [word.start() for word in _WORD.finditer(said)]
        for at in range(0, len(starts), words):
            if len(starts) - at >= (words + 1) // 2:
                end = starts[at + words] if at + words < len(starts) else len(said)
                yield said[starts[at] : end].rstrip()


class _Parts:
    """Texts that are trained on and held out, of each class as many as are asked for."""

    def __init__(self, classes: int, limit: int | None, heldout: int | None) -> None:
        self.most = {False: limit, True: heldout}
        self.found: dict[tuple[bool, int], list[tuple[bytes, int, str]]] = {
            (held, place): [] for held in (False, True) for place in range(classes)
        }
        self.count = 0

    def add(self, said: str, place: int, key: bytes, *, held: bool) -> None:
        """One more, in the order of the source."""
        self.found[held, place].append((key, self.count, said))
        self.count += 1

    def without_heldout(self) -> list[int]:
        """Classes of which nothing is held out."""
        return [place for (held, place), rows in self.found.items() if held and not rows]

    def _part(self, *, held: bool) -> LabelledTexts:
        import numpy as np

        kept = [
            (number, said, place)
            for (is_held, place), rows in self.found.items()
            if is_held == held
            for _, number, said in islice(sorted(rows), self.most[held])
        ]
        kept.sort()
        labels_N = np.array([place for _, _, place in kept], np.int64)
        return LabelledTexts(texts=tuple(said for _, said, _ in kept), labels_N=labels_N)

    def as_set(self, *, name: str, licence: str, classes: tuple[str, ...], notes: Sequence[str]) -> TextSet:
        """What was added, as a set."""
        train, heldout = (self._part(held=held) for held in (False, True))
        told = [classes, *((part.texts, part.labels_N.tolist()) for part in (train, heldout))]
        return TextSet(
            name=name,
            licence=licence,
            classes=classes,
            train=train,
            heldout=heldout,
            notes=tuple(notes),
            fingerprint=hashlib.sha256(json.dumps(told).encode()).hexdigest()[:16],
        )


def joined(sets: Sequence[TextSet]) -> TextSet:
    """Sets as one, with the classes of all.

    Raises:
        UserError: two of them have a class in common.
    """
    import numpy as np

    _refuse_shared(sets)
    starts = np.cumsum([0, *(len(one.classes) for one in sets)])

    def part(name: str) -> LabelledTexts:
        own: list[LabelledTexts] = [getattr(one, name) for one in sets]
        labels = [each.labels_N + start for each, start in zip(own, starts[:-1], strict=True)]
        return LabelledTexts(texts=tuple(said for each in own for said in each.texts), labels_N=np.concatenate(labels))

    return TextSet(
        name=" ".join(one.name for one in sets),
        licence="; ".join(dict.fromkeys(one.licence for one in sets)),
        classes=tuple(name for one in sets for name in one.classes),
        train=part("train"),
        heldout=part("heldout"),
        notes=tuple(dict.fromkeys(note for one in sets for note in one.notes)),
        fingerprint=hashlib.sha256(json.dumps([one.fingerprint for one in sets]).encode()).hexdigest()[:16],
    )


def _refuse_shared(sets: Sequence[TextSet]) -> None:
    """Raises `UserError` for a class that two sets have."""
    owner: dict[str, str] = {}
    for one in sets:
        for name in one.classes:
            if name in owner:
                raise UserError(
                    f"class {name} is in {owner[name]} and in {one.name}",
                    allowed="sets of classes that no other set has",
                    hint="one file, and --split",
                )
            owner[name] = one.name


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - LISTED:,} more" if len(names) > LISTED else ""
    return ", ".join(names[:LISTED]) + more
