"""Labelled pictures in files: decoded to one size, from a folder per class as people keep them."""

from __future__ import annotations

import io
import struct
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from overhaul.errors import UserError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from PIL.Image import Image

Size = tuple[int, int]
"""Height and width in pixels."""

Tags = tuple[tuple[str, str], ...]
"""Columns with values, which are no content."""
FILE = "file"
"""The one that a folder has: the path of a picture in it."""

TRAIN = "train"
HELDOUT = ("heldout", "test", "valid", "validation", "val")
"""What people call the part that is not trained on; the first that is there is read."""

READABLE_SHARE = 0.5
"""Of the pictures, at least: below that the folder is not what its owner thinks it is."""

# EPS starts another program, Ghostscript, on a file that nobody looked at; the others are known and not decoded.
_NOT_READ = {"EPS", "BUFR", "GRIB", "HDF5", "MPEG", "WMF"}
# What Pillow's decoders raise on files that are cut short or not what their name says.
_UNREADABLE = (OSError, ValueError, SyntaxError, EOFError, IndexError, struct.error)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Pictures:
    """Pictures of one size with their labels, before it is settled who is held out.

    Attributes:
        images_NHWC: uint8; C is 1 (grey) or 3 (RGB).
        labels_N: int64, places in `classes`.
        classes: their names.
        heldout_N: True for what the source itself holds out; without it, nothing is decided yet.
        groups: one for each picture; those of one group in a class are not divided. Empty: nothing belongs together.
        domains_N: int64, places in `domains`, such as the artist, the camera or the year.
        domains: their names.
        notes: what was left out or changed, one sentence each.
        tags: of each picture, where they were asked for.
    """

    images_NHWC: NDArray[np.uint8]
    labels_N: NDArray[np.int64]
    classes: tuple[str, ...]
    heldout_N: NDArray[np.bool_] | None = None
    groups: tuple[str, ...] = ()
    domains_N: NDArray[np.int64] | None = None
    domains: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    tags: tuple[Tags, ...] = ()


class Entry(NamedTuple):
    """One picture that is not decoded yet.

    Attributes:
        where: what it is called in messages.
        source: the file, or its content.
        label: name or number of the class.
        part: "train" or "heldout" if its source says so.
        domain: name or number, if there are domains.
        group: what it may not be divided from.
        tags: what else its source says of it: columns with values.
    """

    where: str
    source: Path | bytes
    label: str | int
    part: str = ""
    domain: str | int | None = None
    group: str = ""
    tags: Tags = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Undecoded:
    """Where the pictures of a source are, before any is decoded.

    Attributes:
        where: what all of them are called in messages.
        entries: one for each picture.
        classes: names of the classes; without them, the labels that occur.
        notes: what was left out, one sentence each.
    """

    where: str
    entries: Iterable[Entry]
    classes: Sequence[str] | None = None
    notes: tuple[str, ...] = ()


class Decoding:
    """The pictures of a source one by one; what cannot be read is left out and noted.

    Args:
        found: the source.
        size: what they are resized to; None leaves each its own.
    """

    def __init__(self, found: Undecoded, size: Size | None = None) -> None:
        self.found, self.size = found, size
        self.count, self.unreadable = 0, list[str]()

    def __iter__(self) -> Iterator[tuple[Entry, NDArray[np.uint8]]]:
        """Each with its pixels (H, W, C); `UserError` at the end where there are none, or too few can be read."""
        for entry in self.found.entries:
            try:
                array_HWC = decoded(entry.source, self.size)
            except _UNREADABLE as error:
                self.unreadable.append(f"{entry.where}: {_reason(error)}")
                continue
            self.count += 1
            yield entry._replace(source=b""), array_HWC
        self._refuse_too_few()

    def _refuse_too_few(self) -> None:
        total, where = self.count + len(self.unreadable), self.found.where
        if not total:
            raise UserError(f"{where} holds no pictures", allowed=LAYOUTS)
        if self.count < total * READABLE_SHARE:
            raise UserError(
                f"{len(self.unreadable):,} of the {total:,} pictures in {where} cannot be read; first "
                f"{self.unreadable[0]}",
                allowed="pictures that Pillow reads, half of them at least",
            )

    @property
    def notes(self) -> tuple[str, ...]:
        """What was left out, when all of them were read."""
        left = self.unreadable
        told = (f"{len(left):,} unreadable pictures left out; first {left[0]}",) if left else ()
        return (*told, *self.found.notes)


def gathered(found: Undecoded, size: Size | None = None) -> Pictures:
    """The pictures decoded; what cannot be read is left out and noted.

    Args:
        found: the source.
        size: what they are resized to; without it they must have one size.

    Raises:
        UserError: there are none, more than half cannot be read, sizes differ, or labels are not classes.
    """
    arrays: list[NDArray[np.uint8]] = []
    kept: list[Entry] = []
    decoding = Decoding(found, size)
    for entry, array_HWC in decoding:
        if arrays and array_HWC.shape[:2] != arrays[0].shape[:2]:
            raise _sizes_differ((kept[0].where, arrays[0]), (entry.where, array_HWC))
        arrays.append(array_HWC)
        kept.append(entry)
    return _stacked(arrays, kept, found.where, found.classes, decoding.notes)


def _reason(error: Exception) -> str:
    # Pillow says of what it does not know at all which object it was given, an address in memory.
    return "not a picture" if type(error).__name__ == "UnidentifiedImageError" else str(error) or type(error).__name__


def _sizes_differ(first: tuple[str, NDArray[np.uint8]], other: tuple[str, NDArray[np.uint8]]) -> UserError:
    told = (f"{where} is {array.shape[0]} x {array.shape[1]}" for where, array in (first, other))
    return UserError(
        f"the pictures have different sizes: {', '.join(told)} (height x width)",
        allowed="pictures of one size, or a size that all are brought to",
        hint="size=(32, 32)",
    )


def _stacked(
    arrays: list[NDArray[np.uint8]],
    kept: list[Entry],
    where: str,
    classes: Sequence[str] | None,
    notes: tuple[str, ...],
) -> Pictures:
    import numpy as np

    channels = max(array.shape[-1] for array in arrays)
    # One after another into the place they stay in, each let go: never twice as much as the pictures take.
    images_NHWC = np.empty((len(arrays), *arrays[0].shape[:2], channels), np.uint8)
    for number in range(len(arrays)):
        images_NHWC[number], arrays[number] = arrays[number], arrays[0][:0]  # grey is repeated over the channels
    labels_N, names = numbered([entry.label for entry in kept], where, "class", classes)
    domains_N, domains = None, ()
    if any(entry.domain is not None for entry in kept):
        domains_N, domains = numbered([entry.domain for entry in kept], where, "domain")
    parts = {entry.part for entry in kept}
    return Pictures(
        images_NHWC=images_NHWC,
        labels_N=labels_N,
        classes=names,
        heldout_N=None if parts == {""} else np.array([entry.part == "heldout" for entry in kept]),
        groups=tuple(entry.group for entry in kept) if any(entry.group for entry in kept) else (),
        domains_N=domains_N,
        domains=domains,
        notes=notes,
    )


def numbered(
    labels: Sequence[Any], where: str, kind: str, names: Sequence[str] | None = None
) -> tuple[NDArray[np.int64], tuple[str, ...]]:
    """Labels as places in a tuple of names: of text in sorted order, of numbers in rising order.

    Args:
        labels: all text or all whole numbers.
        where, kind: for messages: the source, and what a label is (`class`, `domain`).
        names: the names by number, if the source has them; text must be among them.

    Raises:
        UserError: labels are of neither kind or of both, or not among the names.
    """
    import numpy as np

    values = set(labels)
    is_text = all(isinstance(value, str) for value in values)
    if not is_text and not all(isinstance(v, int | np.integer) and not isinstance(v, bool) for v in values):
        kinds = ", ".join(sorted({type(value).__name__ for value in values}))
        raise UserError(
            f"the {kind} labels in {where} are of type {kinds}", allowed="all whole numbers, or all text, none missing"
        )
    if names is not None:
        known = {name: number for number, name in enumerate(names)} if is_text else {n: n for n in range(len(names))}
        if len(set(names)) < len(names):
            twice = next(name for name, count in Counter(names).items() if count > 1)
            raise UserError(f"{where} names the {kind} {twice!r} twice", allowed="a name of its own for each")
        if strange := sorted(values - set(known)):
            raise UserError(
                f"{where} has the {kind} {strange[0]!r}, which is not one of the {len(names)} it names",
                allowed=", ".join(names) if is_text else f"0 to {len(names) - 1}",
            )
    else:
        known = {value: number for number, value in enumerate(sorted(values))}
    shown = tuple(names) if names is not None else tuple(str(value) for value in known)
    return np.array([known[label] for label in labels], np.int64), shown


def decoded(source: Path | bytes, size: Size | None = None) -> NDArray[np.uint8]:
    """One picture, upright, on white where it is transparent.

    Args:
        source: the file, or its content.
        size: what it is resized to (bilinear, over all pixels that shrink into one), if given.

    Returns:
        (H, W, 1) if it is stored as grey, else (H, W, 3).

    Raises:
        OSError, ValueError, SyntaxError, EOFError, IndexError, struct.error: Pillow cannot read it.
    """
    import numpy as np
    from PIL import Image, ImageOps

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about metadata, mostly; what spoils pixels is an error
        try:
            opened = Image.open(io.BytesIO(source) if isinstance(source, bytes) else source, formats=_formats()[0])
            with opened:
                flat = _flat(ImageOps.exif_transpose(opened))
        except Image.DecompressionBombError as error:
            raise ValueError(f"far too many pixels: {error}") from error
        if size is not None and flat.size != (size[1], size[0]):
            flat = flat.resize((size[1], size[0]), Image.Resampling.BILINEAR)
    array = np.asarray(flat)
    return array[:, :, None] if array.ndim == 2 else array


def _flat(picture: Image) -> Image:
    """Eight bits a channel, grey or RGB, nothing transparent."""
    import numpy as np
    from PIL import Image

    if picture.mode.startswith("I;16"):  # Pillow would clip sixteen bits to eight, not scale them
        return Image.fromarray(((np.asarray(picture).astype(np.uint32) + 128) // 257).astype(np.uint8))
    if picture.mode in ("I", "F"):
        raise ValueError("its pixels have 32 bits, without a scale")
    grey = picture.mode in ("1", "L", "LA", "La")
    if picture.has_transparency_data:
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture.convert("RGBA"))
    return picture.convert("L" if grey else "RGB")


def resized(images_NHWC: NDArray[np.uint8], size: Size | None) -> NDArray[np.uint8]:
    """The pictures in another height and width, or as they are."""
    import numpy as np
    from PIL import Image

    if size is None or images_NHWC.shape[1:3] == size:
        return images_NHWC
    out_NHWC = np.empty((len(images_NHWC), *size, images_NHWC.shape[-1]), np.uint8)
    for number, image_HWC in enumerate(images_NHWC):
        flat = Image.fromarray(image_HWC.squeeze(-1) if image_HWC.shape[-1] == 1 else image_HWC)
        out_NHWC[number] = np.asarray(flat.resize((size[1], size[0]), Image.Resampling.BILINEAR)).reshape(*size, -1)
    return out_NHWC


def is_picture(file: Path) -> bool:
    """Whether the name of a file ends as that of a picture of a format that is read."""
    return file.suffix.lower() in _formats()[1]


@cache
def _formats() -> tuple[tuple[str, ...], frozenset[str]]:
    """The formats that are read, and the suffixes their files have."""
    from PIL import Image

    Image.init()
    formats = tuple(sorted(set(Image.OPEN) - _NOT_READ))
    return formats, frozenset(end for end, kind in Image.registered_extensions().items() if kind in formats)


# What follows reads folders.

LAYOUTS = "FOLDER/CLASS/picture.png, or FOLDER/train/CLASS/picture.png and FOLDER/test/CLASS/picture.png"


def parts_among(names: Iterable[str], where: str) -> tuple[dict[str, str], tuple[str, ...]]:
    """Which parts of a source are read as what.

    Args:
        names: its parts, such as `train` and `test`.
        where: what the source is called in messages.

    Returns:
        Each name that is read with "train" or "heldout", or with "" where only `train` is there; and notes on the rest.

    Raises:
        UserError: there is no train.
    """
    known = {name.lower(): name for name in names}
    if TRAIN not in known:
        raise UserError(
            f"{where} has {', '.join(known.values())}, but no part {TRAIN!r}",
            allowed=f"{TRAIN} and one of {', '.join(HELDOUT)}; or {TRAIN} alone, which is then divided",
        )
    heldout = next((known[name] for name in HELDOUT if name in known), None)
    read = {known[TRAIN]: TRAIN, heldout: "heldout"} if heldout else {known[TRAIN]: ""}
    return read, tuple(f"{name} left out" for name in known.values() if name not in read)


def are_parts(names: Iterable[str]) -> bool:
    """Whether all of the names, and at least one, are those of parts and not of classes."""
    lower = {name.lower() for name in names}
    return bool(lower) and lower <= {TRAIN, *HELDOUT}


def in_folder(path: Path) -> Undecoded:
    """Pictures of a directory with one folder for each class, under train/ and test/ or not.

    Hidden files are ignored; what Pillow has no format for is counted and noted.

    Args:
        path: the directory.

    Raises:
        UserError: fewer than two classes, or an empty class.
    """
    top = _folders(path)
    read, notes = parts_among(top, str(path)) if are_parts(top) else ({"": ""}, ())
    folders = [(part, path / name / label) for name, part in read.items() for label in _folders(path / name)]
    classes = sorted({folder.name for _, folder in folders})
    if len(classes) < 2:
        raise UserError(
            f"{path} has {f'the class {classes[0]} alone' if classes else 'no folders'}: pictures of two classes "
            "at least are needed, each in a folder of its own",
            allowed=LAYOUTS,
        )
    entries, others = [], []
    for part, folder in folders:
        files = sorted(visible(folder))
        pictures = [file for file in files if is_picture(file)]
        others += [file for file in files if not is_picture(file)]
        if not pictures:
            but = f" ({len(files):,} files of other kinds, first {files[0].name})" if files else ""
            raise UserError(
                f"the class folder {folder} holds no picture{but}",
                allowed="files of formats that Pillow reads, such as .png and .jpg",
                hint=f"remove {folder.name}/ or put pictures into it",
            )
        names = [str(file.relative_to(path)) for file in pictures]
        entries += [
            Entry(name, file, folder.name, part, tags=((FILE, name),))
            for name, file in zip(names, pictures, strict=True)
        ]
    loose = [file for name in read for file in (path / name).iterdir() if file.is_file() and file.name[0] != "."]
    if others := loose + others:
        notes += (f"{len(others):,} files ignored that are no pictures in a class folder; first {others[0]}",)
    return Undecoded(where=str(path), entries=entries, classes=classes, notes=notes)


def _folders(path: Path) -> list[str]:
    # Archives made on a Mac carry a second tree of metadata.
    return sorted(f.name for f in path.iterdir() if f.is_dir() and f.name[0] != "." and f.name != "__MACOSX")


def visible(folder: Path) -> Iterator[Path]:
    """Files at any depth, but for those that are hidden, or in a folder that is."""
    for file in folder.rglob("*"):
        if file.is_file() and not any(part.startswith(".") for part in file.relative_to(folder).parts):
            yield file
