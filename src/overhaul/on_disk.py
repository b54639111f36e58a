"""Corpora that are too large to be held in memory: read through twice, divided, and read again row by row."""

from __future__ import annotations

import hashlib
import heapq
import json
from collections.abc import Callable, Iterable, Iterator, Sequence, Set
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from overhaul import disk
from overhaul.documents import Message, Notes, Reading, Row
from overhaul.errors import UserError
from overhaul.fetch import cache_directory
from overhaul.progress import say
from overhaul.records import TABLE_SUFFIXES, TEXT_SUFFIXES, is_saved_dataset
from overhaul.split import WithoutLeaks, num_bytes

LARGE_BYTES = 256_000_000
"""Of text, about, from which on a corpus stays on disk."""
UNPACKED = {".zst": 4, ".parquet": 3}
"""How much larger the text is than a packed file, about."""
LONGEST_BYTES = 64_000_000
"""Of a file of plain text: it is read at once, and where one is longer the corpus is held in memory."""
HELDOUT_BYTES, CALIB_BYTES = 4_000_000, 2_000_000
"""Of a large corpus: more would say nothing new, and has to be in memory."""
AT_HAND = 10_000
"""Rows of the training text that are read where something has to be in memory, as for statistics."""
KNOWN, VERSION = "corpus.json", 1


def is_large(path: Path) -> bool:
    """Whether the text of a file or a directory is better left on disk, and can be: a single long text cannot."""
    files = _files(path)
    if any(size > LONGEST_BYTES for name, size, _ in files if name.lower().endswith(TEXT_SUFFIXES)):
        return False
    return sum(size * UNPACKED.get(Path(name).suffix, 1) for name, size, _ in files) > LARGE_BYTES


def _files(path: Path) -> list[tuple[str, int, int]]:
    """Name, size and time of each file that would be read."""
    files = sorted(path.rglob("*")) if path.is_dir() else [path]
    read = TEXT_SUFFIXES + TABLE_SUFFIXES + ((".arrow",) if is_saved_dataset(path) else ())
    kept = [file for file in files if file.is_file() and file.name.lower().endswith(read)]
    return [(str(file.resolve()), (told := file.stat()).st_size, told.st_mtime_ns) for file in kept]


@dataclass(frozen=True, slots=True)
class RowsOnDisk(Iterable[Row]):
    """Training rows that are read anew each time, in the order of the files, without what is held out.

    Attributes:
        path, field: what is read, as in `Reading`.
        heldout: what no training row may repeat.
        chosen: hashes of the rows that are held out or for calibration.
        count: how many are left.
        change: made to each row on the way; it may not drop any.
    """

    path: Path
    field: str | None
    heldout: tuple[Row, ...]
    chosen: frozenset[str]
    count: int
    change: Callable[[Row], Row] | None = None

    def __iter__(self) -> Iterator[Row]:
        rows = WithoutLeaks(self.heldout)(_others(self.path, self.field, self.chosen))
        return map(self.change, rows) if self.change else rows

    def __len__(self) -> int:
        return self.count

    def at_hand(self) -> tuple[Row, ...]:
        """The first rows, for what cannot be done row by row."""
        return tuple(islice(self, AT_HAND))


def _others(path: Path, field: str | None, chosen: Set[str]) -> Iterator[Row]:
    return (row for row in Reading(path, field) if row.id not in chosen)


@dataclass(frozen=True, slots=True, kw_only=True)
class Divided:
    """A large corpus in three parts; see `split.Split`."""

    train: RowsOnDisk
    calib: tuple[Row, ...]
    heldout: tuple[Row, ...]
    bytes: int
    fingerprint: str
    notes: Notes
    lines_removed: int
    rows_removed: int


def divided(path: Path, field: str | None) -> Divided:
    """Reads a corpus twice, row by row; or finds what was learnt of it in the cache, if no file was changed since.

    The rows with the least hashes are held out, then those for calibration, as in smaller corpora.

    Raises:
        UserError: it cannot be read, or no row is small enough to be held out.
    """
    key = hashlib.sha256(json.dumps([VERSION, field, HELDOUT_BYTES, CALIB_BYTES, _files(path)]).encode()).hexdigest()

    def make(directory: Path) -> None:
        say(f"{path} is large: it is read through twice, and stays on disk")
        (directory / KNOWN).write_text(json.dumps(_look(path, field)))

    kept = disk.made_once(cache_directory() / "corpora" / key[:32], KNOWN, make)
    told = json.loads((kept / KNOWN).read_text())
    heldout, calib = (tuple(_row(row) for row in told[name]) for name in ("heldout", "calib"))
    return Divided(
        train=RowsOnDisk(path, field, heldout, frozenset(told["chosen"]), told["count"]),
        calib=calib,
        heldout=heldout,
        bytes=told["bytes"],
        fingerprint=told["fingerprint"],
        notes=Notes(**told["notes"]),
        lines_removed=told["lines_removed"],
        rows_removed=told["rows_removed"],
    )


class _Candidate(NamedTuple):
    """A row that may be held out; the largest hash goes first where there are too many."""

    order: int
    size: int
    row: Row


def _look(path: Path, field: str | None) -> dict[str, Any]:
    """All that has to be known of a corpus, in plain data."""
    reading, digest, total = Reading(path, field), hashlib.sha256(), 0
    heap: list[_Candidate] = []
    held: set[str] = set()
    held_bytes = 0
    for row in reading:
        digest.update(row.id.encode())
        size = num_bytes(row)
        total += size
        if size > HELDOUT_BYTES or row.id in held:
            continue
        heapq.heappush(heap, _Candidate(-int(row.id, 16), size, row))
        held.add(row.id)
        held_bytes += size
        while held_bytes - heap[0].size >= HELDOUT_BYTES + CALIB_BYTES:
            dropped = heapq.heappop(heap)
            held.discard(dropped.row.id)
            held_bytes -= dropped.size
    reading.refuse_nothing()
    heldout, calib = _shared_out(sorted(heap, reverse=True))
    if not heldout:
        raise UserError(
            f"no document of {path} is small enough to be held out: all have more than {HELDOUT_BYTES / 1e6:.0f} MB",
            allowed="text in smaller documents, one a row",
        )
    chosen, without = {row.id for row in (*heldout, *calib)}, WithoutLeaks(heldout)
    calib = list(without(calib))
    count = sum(1 for _ in without(_others(path, field, chosen)))
    return {
        "chosen": sorted(chosen),
        "heldout": [row.columns for row in heldout],
        "calib": [row.columns for row in calib],
        "count": count,
        "bytes": total,
        "fingerprint": digest.hexdigest()[:16],
        "notes": asdict(reading.notes),
        "lines_removed": without.lines_removed,
        "rows_removed": without.rows_removed,
    }


def _shared_out(candidates: Sequence[_Candidate]) -> tuple[list[Row], list[Row]]:
    """Fills the held-out part, then that for calibration."""
    heldout: list[Row] = []
    calib: list[Row] = []
    held_bytes = 0
    for candidate in candidates:
        (heldout if held_bytes < HELDOUT_BYTES else calib).append(candidate.row)
        held_bytes += candidate.size
    return heldout, calib


def _row(columns: Sequence[Sequence[Any]]) -> Row:
    """From what JSON makes of a row's columns."""
    return Row(
        tuple(
            (name, tuple(Message(*message) for message in value) if isinstance(value, list) else value)
            for name, value in columns
        )
    )
