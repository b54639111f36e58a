"""A model that examples can be deleted from: what a request is about, what is left, whether all is as it is told."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from overhaul import documents, machine
from overhaul.deletion.book import Book, Found
from overhaul.deletion.sequences import expected_deletions
from overhaul.errors import UserError
from overhaul.picture_rows import PIXELS, hashes_at
from overhaul.unlearning.writing import whoami


@dataclass(frozen=True, slots=True, kw_only=True)
class Deleted:
    """What a request did.

    Attributes:
        examples: that are out now.
        before: that were out already.
        rows: of the data, copies counted.
        stages: that were erased.
        shards_gone: all shards that have nothing left.
        is_gone: whether no shard has anything left.
        hash: of the log's entry; None where nothing was left to do.
    """

    examples: int
    before: int
    rows: int
    stages: int
    shards_gone: tuple[int, ...]
    is_gone: bool
    hash: str | None


def delete(
    directory: Path,
    *,
    where: Sequence[tuple[str, str]] = (),
    texts: Path | None = None,
    images: Path | None = None,
    field: str | None = None,
    by: str | None = None,
    reason: str | None = None,
    dry_run: bool = False,
) -> Deleted:
    """Takes examples out of a model, at once and exactly: nothing is left that was trained with them.

    What was deleted before is told and no error, so a request may be made again.

    Args:
        directory: that `forget s3t` wrote.
        where: columns with values; an example with one of them is meant.
        texts: a file of examples, as the data was.
        images: a picture, a folder of them, or a table; whatever the label that they were learnt with.
        field: the column of it that holds the text; as in training where none is named.
        by: who asked for it; the user who runs this where it is None.
        reason: why, for the log.
        dry_run: tells what would be done.

    Raises:
        UserError: nothing is asked for, or something that this model's data never had; then nothing is deleted.
    """
    if not where and texts is None and images is None:
        raise UserError("nothing is named to be deleted", hint="--where user=17, --text FILE, or --images PATH")
    if field is not None and texts is None:
        raise UserError(f"--field {field} is the column of --text that holds it, and there is none", hint="--text FILE")
    with Book(directory) as book:
        book.sweep()
        _refuse_other_kind(book, texts, images)
        found = _joined(
            _by_columns(book, where),
            _by_text(book, texts, field) if texts is not None else (),
            _by_pixels(book, images) if images is not None else (),
        )
        left = book.survivors()
        stages = len(book.stages())
        if dry_run:
            hit = book.cells(found.there)
            for cell in hit:
                left.delete(*cell)
            rest, rows, seal = sum(len(left.stages(s)) for s in range(len(book.orders))), sum(hit.values()), None
        elif found.there:
            told = {"by": by or whoami(), "at": machine.now()} | ({"reason": reason} if reason else {})
            entry = book.delete(found.there, told)
            left, rest, rows, seal = book.survivors(), len(book.stages()), entry.what["rows"], entry.hash
        else:
            rest, rows, seal = stages, 0, None
        return Deleted(
            examples=len(found.there),
            before=len(found.gone),
            rows=rows,
            stages=stages - rest,
            shards_gone=left.gone(),
            is_gone=left.is_gone,
            hash=seal,
        )


def _refuse_other_kind(book: Book, texts: Path | None, images: Path | None) -> None:
    """Raises `UserError` for texts of a model of images, and for images of one of texts."""
    of_images = book.settings.get("images", False)
    if of_images and texts is not None:
        raise UserError(f"--text {texts}: this model learnt images", hint="--images PATH")
    if not of_images and images is not None:
        raise UserError(f"--images {images}: this model learnt texts", hint="--text FILE")


def _joined(*parts: Iterable[Found]) -> Found:
    """All of them, each example once."""
    every = list(chain.from_iterable(parts))
    there = dict.fromkeys(key for one in every for key in one.there)
    gone = dict.fromkeys(key for one in every for key in one.gone)
    return Found(tuple(there), tuple(gone))


def _by_columns(book: Book, where: Sequence[tuple[str, str]]) -> list[Found]:
    """Examples with values in columns; `UserError` where none ever had one."""
    known, every = book.settings["tags"], list[Found]()
    content = "--images PATH" if book.settings.get("images") else "--text FILE"
    for name, value in where:
        if name not in known:
            raise UserError(
                f"examples of this model cannot be asked for by {name!r}",
                allowed=", ".join(known) or f"{content}: no column was named in --tags when it was trained",
            )
        found = book.find((name, value))
        if not found.there and not found.gone:
            raise UserError(f"no example has {name}={value}; nothing was deleted", allowed="values of the data")
        every.append(found)
    return every


def _by_text(book: Book, texts: Path, field: str | None) -> list[Found]:
    """The examples of a file; `UserError` where some of it was never there."""
    settings = book.settings
    rows = documents.read_rows(texts, field or settings.get("field"), label=settings.get("label")).rows
    return _known(
        [book.find_content(row.id) for row in rows],
        texts,
        "examples exactly as the data has them, all of their columns",
    )


def _by_pixels(book: Book, images: Path) -> list[Found]:
    """The examples with some pictures, under whatever label; `UserError` where some were never there."""
    allowed = "pictures exactly as the data has them, pixel for pixel: neither resized nor compressed anew"
    return _known([book.find((PIXELS, pixels)) for pixels in hashes_at(images)], images, allowed)


def _known(every: list[Found], path: Path, allowed: str) -> list[Found]:
    unknown = [number for number, found in enumerate(every, 1) if not found.there and not found.gone]
    if unknown:
        raise UserError(
            f"{len(unknown)} of {len(every)} examples in {path} were never in this model's data, such as number "
            f"{unknown[0]}; nothing was deleted",
            allowed=allowed,
        )
    return every


def status(directory: Path) -> dict[str, Any]:
    """What is left of a model, as plain data.

    Returns:
        `shards`: of each the examples that are in and out, the stages of its longest sequence that are in use, and how
        many sequences have some; `stages` and `bytes` that are kept; `deleted` examples; `entries` of the log and the
        `head`, the hash of the last one; `expected_deletions` of a new model of this shape until nothing is left.
    """
    with Book(directory) as book:
        left, counts, stages = book.survivors(), book.counts(), book.stages()
        shards = []
        for shard, orders in enumerate(book.orders):
            alive = left.stages(shard)
            shards.append(
                {
                    "shard": shard,
                    "examples": sum(count for (own, _), count in counts.items() if own == shard),
                    "stages_in_use": len(left.serving(shard)),
                    "stages_of": len(orders[0]),
                    "sequences_left": sum(order[:1] in alive for order in orders),
                    "sequences": len(orders),
                }
            )
        entries = book.entries()
        return {
            "shards": shards,
            "stages": len(stages),
            "bytes": sum(stage.bytes for stage in stages),
            "deleted": book.num_deleted(),
            "entries": len(entries),
            "head": entries[-1].hash,
            "expected_deletions": expected_deletions(len(shards), len(book.orders[0][0]), len(book.orders[0])),
        }


def verify(directory: Path, *, head: str | None = None) -> dict[str, Any]:
    """Checks the log and the files, see `Book.verify`; returns how many there are, as plain data.

    Args:
        directory: that `forget s3t` wrote.
        head: the hash of an entry that was noted elsewhere.
    """
    with Book(directory) as book:
        entries = book.verify(head=head)
        return {"entries": entries, "stages": len(book.stages()), "head": book.entries()[-1].hash}


def log(directory: Path) -> list[Mapping[str, Any]]:
    """The audit log, as plain data: every entry's number, hash and content."""
    with Book(directory) as book:
        return [{"number": entry.number, "hash": entry.hash, **entry.what} for entry in book.entries()]
