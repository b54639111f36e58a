"""Files as records: columns by name, and where each record stands; what they are as rows is in `documents`."""

from __future__ import annotations

import codecs
import csv
import io
import json
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from overhaul.errors import UserError

TEXT_SUFFIXES = (".txt", ".md", ".rst", ".py")
TABLE_SUFFIXES = (".jsonl", ".jsonl.zst", ".parquet", ".csv")
PIECE_BYTES = 1 << 16
"""Read of a large file at once."""

_BETWEEN_DOCUMENTS = re.compile(r"\n(?:[ \t]*\n){2,}")


class NotUtf8Error(UserError):
    """Bytes that are not UTF-8, with the place of the first."""

    def __init__(self, where: str, offset: int, byte: int) -> None:
        super().__init__(
            f"{where} is not UTF-8: byte 0x{byte:02x} at offset {offset:,}",
            hint="iconv -f latin1 -t utf-8 OLD > NEW",
        )


Record = tuple[str, Mapping[str, Any] | NotUtf8Error]
"""Where a record stands (file, or file:line), and its columns or why they cannot be read."""


def records(path: Path) -> Iterator[Record]:
    """The records of a file or a directory one by one, whatever their columns; files of other kinds are passed over.

    Raises:
        UserError: nothing is there, or it cannot be read as what its suffix says.
    """
    if not path.exists():
        raise UserError(f"{path} does not exist", allowed="a file or a directory")
    found: Iterator[Record | None] = directory(path) if path.is_dir() else file(path, alone=True)
    return (record for record in found if record is not None)


def is_saved_dataset(path: Path) -> bool:
    """Whether `datasets`' `save_to_disk` wrote the directory."""
    return any((path / name).exists() for name in ("dataset_info.json", "dataset_dict.json"))


def directory(path: Path) -> Iterator[Record | None]:
    """Records of every file below; None for a file of another kind."""
    if is_saved_dataset(path):
        yield from _saved_dataset(path)
        return
    for found in sorted(path.rglob("*")):
        if not found.is_file() or any(part.startswith(".") for part in found.relative_to(path).parts):
            continue
        if found.name.lower().endswith(TEXT_SUFFIXES + TABLE_SUFFIXES):
            yield from file(found, alone=False)
        else:
            yield None


def file(path: Path, *, alone: bool) -> Iterator[Record]:
    """Records of one file.

    Args:
        path: of it.
        alone: whether a text is cut into documents where blank lines stand together.

    Raises:
        UserError: its suffix is not known, or it cannot be read as what that says.
    """
    name, where = path.name.lower(), str(path)
    if name.endswith(".jsonl"):
        with path.open("rb") as opened:
            yield from _json_lines(where, opened)
    elif name.endswith(".jsonl.zst"):
        yield from _json_lines(where, _lines(_decompressed(path)))
    elif name.endswith(".csv"):
        yield from _csv(path)
    elif name.endswith(".parquet"):
        yield from _parquet(path)
    elif name.endswith(TEXT_SUFFIXES):
        yield from _documents(where, path.read_bytes(), cut=alone and name.endswith(".txt"))
    else:
        raise UserError(f"{path}: unknown suffix {path.suffix!r}", allowed=", ".join(TEXT_SUFFIXES + TABLE_SUFFIXES))


def standard_input() -> Iterator[Record]:
    """Records of standard input: JSON lines where every line begins with `{`, else text."""
    raw = sys.stdin.buffer.read()
    lines = [line.lstrip() for line in raw.splitlines() if line.strip()]
    if lines and all(line.startswith(b"{") for line in lines):
        yield from _json_lines("standard input", io.BytesIO(raw))
    else:
        yield from _documents("standard input", raw, cut=True)


def _decode(where: str, raw: bytes, start: int = 0) -> str | NotUtf8Error:
    """Text with unix line ends, without a byte order mark; `raw` begins at byte `start` of its file."""
    try:
        return raw.decode("utf-8").removeprefix("\ufeff").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        return NotUtf8Error(where, start + error.start, raw[error.start])


def _documents(where: str, raw: bytes, *, cut: bool) -> Iterator[Record]:
    text = _decode(where, raw)
    if isinstance(text, NotUtf8Error):
        yield where, text
        return
    for document in _BETWEEN_DOCUMENTS.split(text.strip("\n")) if cut else [text]:
        yield where, {"text": document}


def _json_lines(where: str, lines: Iterable[bytes]) -> Iterator[Record]:
    start = 0
    for number, line in enumerate(lines, 1):
        text = _decode(f"{where}:{number}", line, start)
        start += len(line)
        if isinstance(text, NotUtf8Error):
            yield f"{where}:{number}", text
        elif text.strip():
            yield f"{where}:{number}", _json_object(f"{where}:{number}", text)


def _json_object(where: str, line: str) -> Mapping[str, Any]:
    try:
        found = json.loads(line)
    except json.JSONDecodeError as error:
        raise UserError(
            f"{where} is not JSON: {error.msg} at column {error.colno}", allowed="one object a line"
        ) from error
    if not isinstance(found, dict):
        raise UserError(f"{where} is a JSON {type(found).__name__}", allowed='one object a line, {"text": ...}')
    return found


def _decompressed(path: Path) -> Iterator[bytes]:
    """The content piece by piece, frame after frame."""
    import zstandard

    frame = None
    try:
        with path.open("rb") as file:
            while raw := file.read(PIECE_BYTES):
                while raw:
                    frame = frame or zstandard.ZstdDecompressor().decompressobj()
                    yield frame.decompress(raw)
                    raw = frame.unused_data
                    if frame.eof:
                        frame = None
        if frame is not None:  # the library itself returns half a frame without a word
            raise zstandard.ZstdError("the file ends too early")
    except zstandard.ZstdError as error:
        raise UserError(f"{path} cannot be decompressed: {error}", allowed="a file written by zstd") from error


def _lines(pieces: Iterable[bytes]) -> Iterator[bytes]:
    """Lines, with their ends, of what comes in pieces."""
    rest = b""
    for piece in pieces:
        *lines, rest = (rest + piece).split(b"\n")
        yield from (line + b"\n" for line in lines)
    if rest:
        yield rest


def _csv(path: Path) -> Iterator[Record]:
    if (bad := _not_utf8(path)) is not None:
        yield str(path), bad
        return
    csv.field_size_limit(sys.maxsize)
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file, restkey="(more)")
        for record in reader:
            columns = {name: text.replace("\r\n", "\n") if isinstance(text, str) else text
                       for name, text in record.items()}  # fmt: skip
            yield f"{path}:{reader.line_num}", columns


def _not_utf8(path: Path) -> NotUtf8Error | None:
    """The first byte of a file that is not UTF-8."""
    decoder, start = codecs.getincrementaldecoder("utf-8")(), 0
    with path.open("rb") as file:
        while True:
            piece = file.read(PIECE_BYTES)
            held = len(decoder.getstate()[0])
            try:
                decoder.decode(piece, final=not piece)
            except UnicodeDecodeError as error:
                return NotUtf8Error(str(path), start - held + error.start, error.object[error.start])
            if not piece:
                return None
            start += len(piece)


def _parquet(path: Path) -> Iterator[Record]:
    from pyarrow import ArrowInvalid
    from pyarrow.parquet import ParquetFile

    try:
        with ParquetFile(path) as file:
            number = 0
            for batch in file.iter_batches():
                for record in batch.to_pylist():
                    number += 1
                    yield f"{path}:{number}", record
    except ArrowInvalid as error:
        raise UserError(f"{path} is not a Parquet file: {error}") from error


def _saved_dataset(path: Path) -> Iterator[Record]:
    """What `datasets`' `save_to_disk` wrote; of a dictionary of splits, all of them."""
    from datasets import Dataset, DatasetDict, load_from_disk

    loaded = load_from_disk(str(path))
    splits: Mapping[Any, Dataset] = loaded if isinstance(loaded, DatasetDict) else {"": loaded}
    for name, split in splits.items():
        for number, record in enumerate(split, 1):
            yield f"{path / str(name)}:{number}", record  # pyright: ignore[reportReturnType]
