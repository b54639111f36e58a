"""Labelled pictures in tables: arrays in an `.npz`, columns in Parquet, what `datasets` saved."""

from __future__ import annotations

import json
import re
import zipfile
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from overhaul.errors import UserError, did_you_mean
from overhaul.image_files import TRAIN, Entry, Pictures, Size, Undecoded, are_parts, numbered, parts_among, resized

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa
    from numpy.typing import NDArray

NPZ = "images (N, H, W) or (N, H, W, C) uint8 and labels (N,); if wanted classes, domains (N,) and heldout (N,) bool"
COLUMNS = "image (the content of a picture file) and label (a number or text); if wanted domain"
ROWS_AT_ONCE = 256

CHANNELS = (1, 3)
"""Grey, or red, green and blue."""


def read_npz(path: Path, size: Size | None = None, *, tags: Sequence[str] = ()) -> Pictures:
    """Pictures from the arrays of an `.npz`: `images` and `labels`, if wanted `classes`, `domains` and `heldout`.

    Args:
        path: the file.
        size: what the pictures are resized to, if given.
        tags: further arrays with a value for each picture.

    Raises:
        UserError: it is no such file, or an array is missing, of another type or another length.
    """
    arrays = _arrays(path)
    images_NHWC = _images(arrays["images"], path)
    count = len(images_NHWC)
    _refuse_missing(tags, arrays, f"{path} has no array", allowed="--tags with arrays of the file")
    for name in ("labels", "domains", "heldout", *tags):
        if name in arrays and arrays[name].shape != (count,):
            raise UserError(
                f"{name} in {path} has the shape {arrays[name].shape}, images that of {count:,} pictures",
                allowed=f"{name} ({count},)",
            )
    heldout_N = arrays.get("heldout")
    if heldout_N is not None and heldout_N.dtype != bool:
        raise UserError(f"heldout in {path} is {heldout_N.dtype}", allowed="bool, True for what is held out")
    names = [str(name) for name in arrays["classes"].ravel()] if "classes" in arrays else None
    labels_N, classes = numbered(arrays["labels"].tolist(), str(path), "class", names)
    domains_N, domains = None, ()
    if "domains" in arrays:
        domains_N, domains = numbered(arrays["domains"].tolist(), str(path), "domain")
    return Pictures(
        images_NHWC=resized(images_NHWC, size),
        labels_N=labels_N,
        classes=classes,
        heldout_N=heldout_N,
        domains_N=domains_N,
        domains=domains,
        tags=tuple(zip(*(_tag(name, arrays[name]) for name in tags), strict=True)),
    )


def _tag(name: str, values_N: NDArray[Any]) -> list[tuple[str, str]]:
    return [(name, str(value)) for value in values_N.tolist()]


def _arrays(path: Path) -> dict[str, Any]:
    import numpy as np

    try:
        with path.open("rb") as opened, np.load(opened, allow_pickle=False) as file:
            if not isinstance(file, Mapping):
                raise ValueError("one array without a name")
            arrays = {name: file[name] for name in file}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, AttributeError, TypeError) as error:
        raise UserError(f"{path} cannot be read as .npz: {error}", allowed=NPZ) from error
    _refuse_missing(("images", "labels"), arrays, f"{path} has no array", allowed=NPZ)
    return arrays


def _refuse_missing(wanted: Sequence[str], there: Collection[str], begins: str, *, allowed: str) -> None:
    """Raises `UserError` for the first name that is wanted and not there."""
    for name in wanted:
        if name not in there:
            raise UserError(
                f"{begins} {name!r}, but {', '.join(there) or 'none at all'}",
                allowed=allowed,
                hint=did_you_mean(name, there),
            )


def _images(images: NDArray[Any], path: Path) -> NDArray[np.uint8]:
    """The array as (N, H, W, C)."""
    import numpy as np

    hint = ""
    if images.dtype != np.uint8:
        if images.dtype.kind == "f" and images.size and images.min() >= 0 and images.max() <= 1:
            hint = "(images * 255).round().astype('uint8')"
    elif images.ndim == 3 and images.size:
        return images[..., None]
    elif images.ndim == 4 and images.size and images.shape[-1] in CHANNELS:
        return images
    elif images.ndim == 4 and images.shape[1] in CHANNELS:
        hint = "images.transpose(0, 2, 3, 1)"
    raise UserError(f"images in {path} is {images.dtype} of the shape {images.shape}", allowed=NPZ, hint=hint)


def in_parquet(path: Path, tags: Sequence[str] = ()) -> Undecoded:
    """Pictures from the columns `image`, `label` and, if there, `domain` of Parquet files.

    Args:
        path: a file, or a directory of them; files called `train-...` and `test-...` keep that division.
        tags: further columns.

    Raises:
        UserError: it is no such file, or has other columns; of some files not before they are read.
    """
    files = parquet_files(path) if path.is_dir() else [path]
    kinds = {file: re.split(r"[-.]", file.name)[0] for file in files}
    read, notes = parts_among(kinds.values(), str(path)) if are_parts(kinds.values()) else ({}, ())
    chosen = {file: read.get(kind, "") for file, kind in kinds.items() if not read or kind in read}
    names = None
    for file in chosen:
        names = names or _named_in(file)
    entries = (
        entry
        for file, part in chosen.items()
        for entry in _entries(_batches(file, tags), str(file), part, file.parent, tags)
    )
    return Undecoded(where=str(path), entries=entries, classes=names, notes=notes)


def parquet_files(path: Path) -> list[Path]:
    """The Parquet files in a directory, or in the folder data/ in it, where published sets have them."""
    return sorted(path.glob("*.parquet")) or sorted(path.glob("data/*.parquet"))


def _batches(file: Path, tags: Sequence[str]) -> Iterator[pa.RecordBatch]:
    from pyarrow import ArrowInvalid
    from pyarrow.parquet import ParquetFile

    try:
        with ParquetFile(file) as opened:
            columns = _columns(opened.schema_arrow.names, str(file), tags)
            yield from opened.iter_batches(ROWS_AT_ONCE, columns=columns)
    except (ArrowInvalid, OSError) as error:
        raise UserError(f"{file} is not a Parquet file: {error}") from error


def _columns(names: Sequence[str], where: str, tags: Sequence[str]) -> list[str]:
    _refuse_missing(("image", "label"), names, f"{where} has no column", allowed=COLUMNS)
    _refuse_missing(tags, names, f"{where} has no column", allowed="--tags with columns of the table")
    return list(dict.fromkeys([*(name for name in ("image", "label", "domain") if name in names), *tags]))


def _named_in(file: Path) -> list[str] | None:
    """The names of the classes, where `datasets` wrote them beside the schema."""
    from pyarrow import ArrowInvalid
    from pyarrow.parquet import read_schema

    try:
        told = json.loads((read_schema(file).metadata or {}).get(b"huggingface", b"{}"))
        return told["info"]["features"]["label"]["names"]
    except (KeyError, TypeError, ValueError, ArrowInvalid, OSError):  # a file that is none is refused where it is read
        return None


def _entries(batches: Iterable[Any], where: str, part: str, folder: Path, tags: Sequence[str]) -> Iterator[Entry]:
    number = 0
    for batch in batches:
        for row in batch.to_pylist():
            number += 1
            source = _source(row["image"], where, folder)
            told = tuple((name, str(row[name])) for name in tags if row[name] is not None)
            yield Entry(f"{where}:{number}", source, row["label"], part, row.get("domain"), tags=told)


def _source(image: object, where: str, folder: Path) -> Path | bytes:
    """A picture's content, or its file: plain bytes, or the pair of both that `datasets` writes."""
    content, file = (image.get("bytes"), image.get("path")) if isinstance(image, dict) else (image, None)
    if isinstance(content, bytes):
        return content
    if isinstance(file, str):
        return folder / file
    if image is None or isinstance(image, dict):
        return b""  # a missing picture is an unreadable one: counted, and left out
    raise UserError(f"the column image of {where} holds {type(image).__name__}", allowed=COLUMNS)


def is_saved(path: Path) -> bool:
    """Whether `datasets`' `save_to_disk` wrote the directory."""
    return any((path / name).is_file() for name in ("dataset_info.json", "dataset_dict.json"))


def in_saved(path: Path, tags: Sequence[str] = ()) -> Undecoded:
    """Pictures of what `datasets`' `save_to_disk` wrote, in the columns of `in_parquet`; its splits are kept.

    Args:
        path: the directory.
        tags: further columns.

    Raises:
        UserError: it cannot be read, has other columns, or no split called train.
    """
    from datasets import Dataset, DatasetDict, load_from_disk

    try:
        loaded = load_from_disk(str(path))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read as a saved data set: {error}") from error
    splits: Mapping[Any, Dataset] = loaded if isinstance(loaded, DatasetDict) else {TRAIN: loaded}
    read, notes = parts_among(splits, str(path))
    names, entries = None, []
    for name, part in read.items():
        where = f"{path}/{name}" if isinstance(loaded, DatasetDict) else str(path)
        columns = _columns(splits[name].column_names, where, tags)
        label = splits[name].features["label"]
        names = names or getattr(label, "names", None)
        batches = splits[name].select_columns(columns).with_format("arrow").iter(ROWS_AT_ONCE)
        entries.append(_entries(batches, where, part, path, tags))
    return Undecoded(where=str(path), entries=chain.from_iterable(entries), classes=names, notes=notes)
