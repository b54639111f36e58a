"""Which texts a model was trained on, by the ledger that lies beside it: those of a corpus, and those of a file."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

import numpy as np

from overhaul import artifact, documents, ledger
from overhaul.corpora import NO_CORPUS, Corpus, CorpusSpec, as_plain_text, every_row, open_corpus, open_whole
from overhaul.documents import Row
from overhaul.errors import UserError, did_you_mean
from overhaul.journal import note_table
from overhaul.ledger import Entry, Origin
from overhaul.progress import say
from overhaul.split import fingerprint, num_bytes

TRAINING = ("adapt", "distill", "extend", "learn", "shrink")
"""Verbs that may give a model documents; what `forget` reads, it gives to be forgotten, or again."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Known:
    """What a ledger says of some documents.

    Attributes:
        seen: of them, those that the model was trained on.
        total: of them all.
        tokens: that it was given of those, in all steps.
        last: the last step in which it was given any of them; empty where it never was.
        places: of those, among all.
    """

    seen: int
    total: int
    tokens: int
    last: str
    places: tuple[int, ...]

    def told(self) -> str:
        """One sentence."""
        count = f"{self.seen:,}" if self.seen == self.total else f"{self.seen:,} of {self.total:,}"
        how = f" ({self.tokens:,} tokens, last in {self.last})" if self.seen else ""
        return f"{count} documents were seen{how}"


def entries_of(path: Path, *, hint: str = "") -> tuple[Entry, ...]:
    """The ledger of a model; raises `UserError`, with a hint, where it has none."""
    if found := ledger.read(path):
        return found
    raise UserError(
        f"{path} has no {ledger.FILE}: nothing tells which documents it was trained on",
        allowed="what extend, adapt or distill wrote from --data, and what was made of that",
        hint=hint,
    )


def of_sources(entries: Sequence[Entry], names: Sequence[str]) -> tuple[Entry, ...]:
    """The part of a ledger that is about some corpora.

    Args:
        entries: of a model.
        names: corpora as the ledger calls them, or their paths; all where it is empty.

    Raises:
        UserError: the ledger knows no such corpus.
    """
    called = {name for entry in entries for name in (entry.seen.origin.source, entry.seen.origin.path)}
    for name in names:
        if name not in called:
            sources = dict.fromkeys(entry.seen.origin.source for entry in entries)
            raise UserError(
                f"the ledger of the model has no source {name!r}",
                allowed=", ".join(sources),
                hint=did_you_mean(name, sources) or "overhaul show MODEL",
            )
    return tuple(
        entry for entry in entries if not names or entry.seen.origin.source in names or entry.seen.origin.path in names
    )


def known(rows: Sequence[Row], entries: Sequence[Entry]) -> Known:
    """What a ledger says of rows as they stand in a corpus or a file."""
    hashes_D = np.array([int(row.document, 16) for row in rows], np.uint64)
    is_seen_D, tokens, last = np.zeros(len(rows), bool), 0, ""
    for entry in entries:
        found_D = np.isin(hashes_D, entry.seen.documents_D)
        given_E = np.isin(entry.seen.documents_D, hashes_D)
        if found_D.any():
            is_seen_D |= found_D
            tokens += int(entry.seen.tokens_D[given_E].sum())
            last = entry.called
    places = tuple(np.flatnonzero(is_seen_D).tolist())
    return Known(seen=len(places), total=len(rows), tokens=tokens, last=last, places=places)


def note(corpus: Corpus, found: Known) -> None:
    """The table of what was seen, for the report."""
    columns = ("text", "documents", "seen", "tokens", "last in")
    row = (corpus.name, f"{found.total:,}", f"{found.seen:,}", f"{found.tokens:,}", found.last)
    note_table("Of the texts to forget the ledger knows what the model was trained on", columns, [row])


def untold(path: Path, entries: Sequence[Entry]) -> tuple[str, ...]:
    """Steps of a model that may have given it documents of which its ledger says nothing."""
    if not (path / artifact.RECORD).is_file():
        return ()
    told = {entry.step for entry in entries}
    steps = enumerate(artifact.read_record(path).get("lineage", ()), 1)
    return tuple(
        f"step {number}, {step['verb']} {step['method']}"
        for number, step in steps
        if number not in told and step["verb"] in TRAINING and step.get("data")
    )


def among(corpus: Corpus, path: Path, names: Sequence[str]) -> tuple[Corpus, Known]:
    """Of a corpus of which nothing is held out, the rows that a model was trained on.

    Args:
        corpus: the rows.
        path: of the model.
        names: corpora that the ledger knows, as `of_sources`.

    Raises:
        UserError: there is no ledger, no such source, or the model never saw any of the rows.
    """
    entries = entries_of(path, hint="without --from-ledger")
    rows, chosen = tuple(corpus.train), of_sources(entries, names)
    found = known(rows, chosen)
    if not found.seen:
        missing = untold(path, entries)
        but = f"; of {', and '.join(missing)}, it says nothing" if missing else ""
        where = f" from {', '.join(names)}" if names else ""
        raise UserError(
            f"{path} never saw any of the {len(rows):,} documents of {corpus.name}{where}: its ledger has none of "
            f"them, so nothing is to be forgotten{but}",
            allowed="documents exactly as they stood in the text that was trained on",
            hint="without --from-ledger, which unlearns them all the same",
        )
    return _of_rows(corpus, [rows[place] for place in found.places]), found


def trained_on(path: Path, names: Sequence[str]) -> tuple[Corpus, Known]:
    """The texts of some corpora that a model was trained on, read again where they were read.

    Of a corpus that is what it was it is the part of each document that was trained on, without what was held out.

    Args:
        path: of the model.
        names: of the corpora.

    Raises:
        UserError: there is no ledger, no such source, the corpus is not there, or it has no longer all of them.
    """
    chosen = of_sources(entries_of(path, hint="--forget FILE without --from-ledger"), names)
    origins: dict[Origin, list[Entry]] = {}
    for entry in chosen:
        origins.setdefault(entry.seen.origin, []).append(entry)
    rows: dict[str, list[Row]] = {}
    for origin, entries in origins.items():
        for document, found in _read_again(origin, entries).items():
            rows.setdefault(document, found)
    tokens = sum(int(entry.seen.tokens_D.sum()) for entry in chosen)
    places = tuple(range(len(rows)))
    found = Known(seen=len(rows), total=len(rows), tokens=tokens, last=chosen[-1].called, places=places)
    whole = [row for several in rows.values() for row in several]
    return _of_rows(replace(NO_CORPUS, name="+".join(names)), whole), found


def _of_rows(corpus: Corpus, rows: Sequence[Row]) -> Corpus:
    """A corpus of some rows, of which nothing is held out."""
    kept = tuple(rows)
    return replace(corpus, train=kept, bytes=sum(map(num_bytes, kept)), fingerprint=fingerprint((kept, (), ())))


def _read_again(origin: Origin, entries: Sequence[Entry]) -> dict[str, list[Row]]:
    """The rows of each document that was read of a corpus, by its hash."""
    if origin.path in ("", "-"):
        where = "standard input" if origin.path else "text that was made on the way"
        raise UserError(f"{origin.source} was {where}, which cannot be read again", hint="--forget FILE --from-ledger")
    wanted = {f"{document:016x}" for entry in entries for document in entry.seen.documents_D.tolist()}
    try:
        rows = list(_rows_of(origin, wanted))
    except UserError as error:
        raise UserError(
            f"{origin.source} cannot be read again: {error.given}", hint="--forget FILE --from-ledger, with its text"
        ) from error
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(row.document, []).append(row)
    if lost := sorted(wanted - found.keys()):
        raise UserError(
            f"{len(lost):,} of {len(wanted):,} documents of {origin.source} that the model was trained on are no "
            f"longer in {origin.path}; the first of them has the hash {lost[0]}",
            allowed="the corpus as it was",
            hint="--forget FILE --from-ledger, with the text of those that are to be forgotten",
        )
    return found


def _rows_of(origin: Origin, wanted: set[str]) -> Iterator[Row]:
    """What was trained on, or, of a corpus that is another one by now, whole documents."""
    spec = CorpusSpec(path=origin.path, field=origin.field, limit=origin.limit)
    divided = open_whole(spec) if origin.whole else open_corpus(spec)
    corpus = as_plain_text(divided) if origin.plain else divided
    if corpus.fingerprint == origin.fingerprint:
        return (row for row in corpus.train if row.document in wanted)
    say(f"note: {origin.source} was changed since it was trained on: its documents are read whole")
    rows = (row for row in islice(every_row(spec.path, spec.field), spec.limit) if row.document in wanted)
    return map(documents.as_plain_text, rows) if origin.plain else rows
