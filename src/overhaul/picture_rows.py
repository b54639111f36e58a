"""Labelled pictures one by one, each of its own size, of which none is held out here: they are known by their pixels.

Who is held out of a set by `overhaul.images` depends on the others in it; here a picture is there, or is not.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from overhaul import image_files, image_tables, images
from overhaul.errors import UserError
from overhaul.image_files import TRAIN, Decoding, Entry, Tags, Undecoded, numbered

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

PIXELS = "pixels"
"""The tag that every picture has: the hash of its pixels."""


@dataclass(frozen=True, slots=True, eq=False)
class PictureRow:
    """A picture with the name of its class.

    Attributes:
        pixels_HWC: uint8; C is 1 where no pixel has a colour, else 3.
        label: the name.
        tags: `PIXELS` with the hash of its pixels, then columns that were asked for: none is content.
        where: what it is called in messages.
    """

    pixels_HWC: NDArray[np.uint8]
    label: str
    tags: Tags
    where: str = ""

    @property
    def id(self) -> str:
        """Hash of the content, 16 hex digits: of its pixels, whatever file they are in, and of its label."""
        return hashlib.sha256(json.dumps([self.tags[0][1], self.label]).encode()).hexdigest()[:16]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PictureCorpus:
    """Labelled pictures.

    Attributes:
        name: as they were asked for.
        licence: what they may be used under.
        source: the packages and versions, or the path they were read from.
        train: what is trained on: all, but for those that their source holds out itself.
        heldout: those.
        notes: what was left out, one sentence each.
        fingerprint: hash of the rows of both parts, in order.
        unit: what they are counted in.
    """

    name: str
    licence: str
    source: str
    train: tuple[PictureRow, ...]
    heldout: tuple[PictureRow, ...]
    notes: tuple[str, ...]
    fingerprint: str
    unit: str = "images"


def open_pictures(path: str, tags: Sequence[str] = ()) -> PictureCorpus:
    """Reads labelled pictures, each as it stands, whatever others there are.

    Args:
        path: as `images.open_images` takes it. A set that goes by a name is divided as it is there.
        tags: columns of a table, arrays of an `.npz`, or `file` of a folder, which pictures keep beside their content.

    Raises:
        UserError: it does not exist or cannot be read, has no such column, none may be called so, or nothing is left to
            train on.
    """
    if PIXELS in tags:
        raise UserError(f"--tags {PIXELS}: by these every picture is known already", allowed="columns of other names")
    if path in images.image_sets.NAMED:
        return _named(path, tags)
    there = images.existing(path)
    if there.suffix == ".npz" and there.is_file():
        entries, arrays, notes = _in_npz(there, tags)
        rows = [_row(array_HWC, entry) for entry, array_HWC in zip(entries, arrays, strict=True)]
    else:
        found = images.undecoded(there, tags)
        decoding = Decoding(replace(found, entries=_with_tags(found.entries, tags)))
        entries, rows = [], list[PictureRow]()
        for entry, array_HWC in decoding:
            entries.append(entry)
            rows.append(_row(array_HWC, entry))
        places_N, names = numbered([entry.label for entry in entries], str(there), "class", found.classes)
        rows = [replace(row, label=names[place]) for row, place in zip(rows, places_N.tolist(), strict=True)]
        notes = decoding.notes
    parts: dict[bool, list[PictureRow]] = {True: [], False: []}
    for entry, row in zip(entries, rows, strict=True):
        parts[entry.part != "heldout"].append(row)
    if not parts[True]:
        raise UserError(f"{path} has no picture that is trained on: all are held out", allowed=f"some in {TRAIN}")
    return _corpus(there.resolve().name, "not stated", path, parts[True], parts[False], notes)


def _with_tags(entries: Iterable[Entry], tags: Sequence[str]) -> Iterator[Entry]:
    """Each with those tags alone that are asked for."""
    return (entry._replace(tags=tuple(tag for tag in entry.tags if tag[0] in tags)) for entry in entries)


def _named(name: str, tags: Sequence[str]) -> PictureCorpus:
    if tags:
        raise UserError(f"{name} has no columns, and so no {tags[0]}", hint="without --tags")
    found = images.open_images(name)
    train, heldout = (
        [
            _row(image_HWC, Entry(f"{name}:{number}", b"", found.classes[place]))
            for number, (image_HWC, place) in enumerate(zip(part.images_NHWC, part.labels_N.tolist(), strict=True))
        ]
        for part in (found.train, found.heldout)
    )
    return _corpus(name, found.licence, found.source, train, heldout, found.notes)


def _in_npz(path: Path, tags: Sequence[str]) -> tuple[list[Entry], NDArray[np.uint8], tuple[str, ...]]:
    found = image_tables.read_npz(path, tags=tags)
    entries = [
        Entry(
            f"{path}:{number}",
            b"",
            found.classes[place],
            "heldout" if found.heldout_N is not None and found.heldout_N[number] else TRAIN,
            tags=found.tags[number] if tags else (),
        )
        for number, place in enumerate(found.labels_N.tolist())
    ]
    return entries, found.images_NHWC, found.notes


def _row(array_HWC: NDArray[np.uint8], entry: Entry) -> PictureRow:
    plain_HWC = _plain(array_HWC)
    return PictureRow(plain_HWC, str(entry.label), ((PIXELS, _hash(plain_HWC)), *entry.tags), entry.where)


def _plain(array_HWC: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Grey where no pixel has a colour, so that one picture is the same in whatever format it was saved."""
    import numpy as np

    has_colour = (array_HWC != array_HWC[..., :1]).any()
    return np.ascontiguousarray(array_HWC if has_colour else array_HWC[..., :1])


def _hash(plain_HWC: NDArray[np.uint8]) -> str:
    return hashlib.sha256(json.dumps(plain_HWC.shape).encode() + plain_HWC.tobytes()).hexdigest()


def _corpus(
    name: str,
    licence: str,
    source: str,
    train: Sequence[PictureRow],
    heldout: Sequence[PictureRow],
    notes: Sequence[str],
) -> PictureCorpus:
    copies = len(train) - len({row.id for row in train})
    told = json.dumps([[row.id for row in part] for part in (train, heldout)])
    return PictureCorpus(
        name=name,
        licence=licence,
        source=source,
        train=tuple(train),
        heldout=tuple(heldout),
        notes=(*notes, *([f"{copies:,} exact duplicates kept"] if copies else [])),
        fingerprint=hashlib.sha256(told.encode()).hexdigest()[:16],
    )


def hashes_at(path: Path) -> list[str]:
    """The hash of every picture at a path, in order, by which a `PictureRow` is known too.

    Args:
        path: a picture; a folder of them, at any depth; or labelled ones as `open_pictures` reads them.

    Raises:
        UserError: nothing is there, or a picture cannot be read.
    """
    there = images.existing(path)
    if there.suffix == ".npz" and there.is_file():
        return [_hash(_plain(array_HWC)) for array_HWC in image_tables.read_npz(there).images_NHWC]
    decoding = Decoding(_unlabelled(there))
    found = [_hash(_plain(array_HWC)) for _, array_HWC in decoding]
    if decoding.unreadable:
        raise UserError(
            f"{len(decoding.unreadable):,} pictures of {path} cannot be read, such as {decoding.unreadable[0]}",
            allowed="pictures exactly as the data has them",
        )
    return found


def _unlabelled(path: Path) -> Undecoded:
    """All pictures of a file or a folder; of a table its own."""
    if path.is_dir() and not image_tables.is_saved(path) and not image_tables.parquet_files(path):
        files = [file for file in sorted(image_files.visible(path)) if image_files.is_picture(file)]
        return Undecoded(where=str(path), entries=[Entry(str(file.relative_to(path)), file, "") for file in files])
    if path.is_file() and image_files.is_picture(path):
        return Undecoded(where=str(path), entries=[Entry(path.name, path, "")])
    return images.undecoded(path)
