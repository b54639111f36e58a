"""Reading a user's rows: text files, JSON lines, Parquet, CSV, `datasets` directories, or standard input.

What is found is reported, never silently dropped: see `Notes`.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from overhaul.errors import UserError, did_you_mean
from overhaul.records import TABLE_SUFFIXES, TEXT_SUFFIXES, NotUtf8Error, Record, directory, file, standard_input

SHAPES = (
    ("text",),
    ("prompt", "completion"),
    ("messages",),
    ("prompt", "chosen", "rejected"),
    ("question", "answer"),
)
"""Columns a row is recognised by; the first that fits wins, other columns are ignored."""
LABELLED = ("text", "label")
"""Columns of a row whose label was asked for; it is content, of which nothing is read."""


class Message(NamedTuple):
    """One turn of a conversation; `role` as the chat template names it: `system`, `user`, `assistant`."""

    role: str
    content: str


@dataclass(frozen=True, slots=True)
class Row(Mapping[str, Any]):
    """One document or example: a frozen mapping with the columns of one of `SHAPES`, or those of `LABELLED`.

    Values are strings, except `messages`: a tuple of `Message`.

    Attributes:
        tags: other columns that were asked for, which are no content: equal rows may have different ones.
        cut_of: id of the row of the corpus that it is a part or another form of; empty where it is one itself.
    """

    columns: tuple[tuple[str, str | tuple[Message, ...]], ...]
    tags: tuple[tuple[str, str], ...] = field(default=(), compare=False)
    cut_of: str = field(default="", compare=False)

    def __getitem__(self, column: str) -> Any:
        for name, value in self.columns:
            if name == column:
                return value
        raise KeyError(column)

    def __iter__(self) -> Iterator[str]:
        return (name for name, _ in self.columns)

    def __len__(self) -> int:
        return len(self.columns)

    @property
    def id(self) -> str:
        """Hash of the content, 16 hex digits: equal rows have equal ids, everywhere and always."""
        content = json.dumps(self.columns, ensure_ascii=False)
        return hashlib.sha256(content.encode("utf-8", "surrogatepass")).hexdigest()[:16]

    @property
    def label(self) -> str:
        """The name of its class, where its columns are those of `LABELLED`."""
        return self["label"]

    @property
    def document(self) -> str:
        """Id of the row as it stands in the corpus, whatever was cut off it since."""
        return self.cut_of or self.id


def text_row(text: str, cut_of: str = "") -> Row:
    """A row that is one plain document, or, with the id of another row, made of that."""
    return Row((("text", text),), cut_of=cut_of)


def labelled_row(text: str, label: str) -> Row:
    """A row that is a text with the name of its class."""
    return Row((("text", text), ("label", label)))


def row_text(row: Row) -> list[tuple[str, bool]]:
    """The row as consecutive pieces of text, each with whether it is trained on.

    Plain text, labelled or not, is all trained on; of the other shapes only the answer: `completion`, `answer`,
    `chosen` and what the assistant says. A question is closed by a newline; prompts and completions are joined as they
    are; the pieces of a conversation are its contents, without the model's chat template.
    """
    match tuple(row):
        case ("text",) | ("text", "label"):
            return [(row["text"], True)]
        case ("messages",):
            return [(message.content, message.role == "assistant") for message in row["messages"]]
        case ("question", "answer"):
            return [(row["question"] + "\n", False), (row["answer"], True)]
        case (prompt, answer, *_):
            return [(row[prompt], False), (row[answer], True)]
        case columns:
            raise ValueError(f"no shape has the columns {columns}")


def as_plain_text(row: Row) -> Row:
    """The row as a document of its own, all of it trained on: a prompt with its answer, a conversation line by line."""
    if tuple(row) == ("text",):
        return row
    between = "\n" if tuple(row) == ("messages",) else ""
    return text_row(between.join(text for text, _ in row_text(row)), cut_of=row.document)


@dataclass(frozen=True, slots=True, kw_only=True)
class Notes:
    """What reading met.

    Attributes:
        empty: rows without any text to train on; dropped.
        undecodable: rows, or whole files of a directory, that are not UTF-8; dropped.
        duplicates: rows equal to an earlier one; kept.
        unsupported: files of a directory with another suffix; not read.
    """

    empty: int = 0
    undecodable: int = 0
    duplicates: int = 0
    unsupported: int = 0

    def sentences(self) -> tuple[str, ...]:
        """One sentence for each count above zero."""
        told = (
            (self.empty, "empty rows dropped"),
            (self.undecodable, "rows or files that are not UTF-8 dropped"),
            (self.duplicates, "exact duplicates kept"),
            (self.unsupported, "files with an unsupported suffix not read"),
        )
        return tuple(f"{count:,} {what}" for count, what in told if count)


@dataclass(frozen=True, slots=True)
class Rows:
    """Rows in the order they were read, and what reading them met."""

    rows: tuple[Row, ...]
    notes: Notes = Notes()


def read_rows(
    path: Path | str, field: str | None = None, limit: int | None = None, *, label: str | None = None
) -> Rows:
    """All rows of a `Reading`, in memory.

    Args:
        path: what to read; `-` is standard input.
        field: the column that holds the text, for rows in none of `SHAPES`.
        limit: read at most this many rows.
        label: the column with the name of a text's class.

    Raises:
        UserError: nothing there, a suffix or columns that are not understood, malformed JSON, or no row left.
        NotUtf8Error: no row can be decoded.
    """
    reading = Reading(path, field, label=label)
    seen: set[str] = set()
    duplicates, rows = 0, []
    for row in islice(reading, limit):
        duplicates += row.id in seen
        seen.add(row.id)
        rows.append(row)
    reading.refuse_nothing()
    return Rows(tuple(rows), replace(reading.notes, duplicates=duplicates))


def read_columns(path: Path | str, names: Sequence[str]) -> list[tuple[str, ...]]:
    """Columns of a table as text, one tuple a row in the order of `names`; other columns are ignored.

    Args:
        path: JSON lines, Parquet or CSV.
        names: of the columns, all of which every row must have, and not empty.

    Raises:
        UserError: nothing is there, it is no table, a column is missing or empty, or there is no row.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path} is no file", allowed=f"a table of {', '.join(names)}: {', '.join(TABLE_SUFFIXES)}")
    rows = []
    for where, columns in file(path, alone=True):
        if isinstance(columns, NotUtf8Error):
            raise columns
        if missing := [name for name in names if name not in columns or not _text(where, name, columns[name]).strip()]:
            raise UserError(
                f"{where} has no {' and no '.join(missing)}; its columns: {', '.join(map(str, columns)) or 'none'}",
                allowed=f"rows with {', '.join(names)}",
            )
        rows.append(tuple(_text(where, name, columns[name]) for name in names))
    if not rows:
        raise UserError(f"{path} is empty", allowed=f"rows with {', '.join(names)}")
    return rows


def json_line(columns: Mapping[str, Any]) -> str:
    """A line of a `.jsonl` file with its end: letters as they are, unless one is half of a surrogate pair."""
    line = json.dumps(columns, ensure_ascii=False)
    return (json.dumps(columns) if any("\ud800" <= letter <= "\udfff" for letter in line) else line) + "\n"


class Reading(Iterator[Row]):
    """The rows of a file, a directory, or standard input, one by one: of a table no more than a piece is in memory.

    A `.txt` file is cut into documents where two or more blank lines stand together; in a directory, which
    is read in sorted order with its subdirectories, each `.txt`, `.md`, `.rst` and `.py` file is one
    document. Standard input is JSON lines if every line starts with `{`, else text.

    Attributes:
        name: what is read, for messages.
    """

    def __init__(
        self, path: Path | str, field: str | None = None, tags: Sequence[str] = (), *, label: str | None = None
    ) -> None:
        """Begins to read.

        Args:
            path: what to read; `-` is standard input.
            field: the column that holds the text, for rows in none of `SHAPES`.
            tags: further columns that every row keeps beside its content.
            label: the column with the name of a text's class: then rows are those of `LABELLED`.

        Raises:
            UserError: nothing is there.
        """
        self.field, self.tags, self.label, self.counts = field, tags, label, Counter[str]()
        self.failures: list[NotUtf8Error] = []
        if str(path) == "-":
            self.name, self._records = "standard input", iter(standard_input())
            return
        path = Path(path)
        if not path.exists():
            raise UserError(f"{path} does not exist", allowed="a file, a directory, or - for standard input")
        self.name = str(path)
        self._records: Iterator[Record | None] = directory(path) if path.is_dir() else file(path, alone=True)

    def __next__(self) -> Row:
        """The next row with text; raises `UserError` for what is not understood."""
        for record in self._records:
            if record is None:
                self.counts["unsupported"] += 1
            elif isinstance(record[1], NotUtf8Error):
                self.counts["undecodable"] += 1
                self.failures = self.failures or [record[1]]
            elif (row := self._row(record[0], record[1])) is None:
                self.counts["empty"] += 1
            else:
                self.counts["rows"] += 1
                return replace(row, tags=_tags(record[0], record[1], self.tags)) if self.tags else row
        raise StopIteration

    def _row(self, where: str, columns: Mapping[str, Any]) -> Row | None:
        if self.label is None:
            return _row(where, columns, self.field)
        return _labelled(where, columns, self.field or LABELLED[0], self.label)

    @property
    def notes(self) -> Notes:
        """What was met so far; duplicates are not looked for."""
        counts = self.counts
        return Notes(empty=counts["empty"], undecodable=counts["undecodable"], unsupported=counts["unsupported"])

    def refuse_nothing(self) -> None:
        """Raises `UserError` where no row was found so far, `NotUtf8Error` where that is why."""
        if self.counts["rows"]:
            return
        if self.failures:
            raise self.failures[0]
        raise UserError(
            f"{self.name} is empty: no row with text ({self.counts['empty']} empty rows, "
            f"{self.counts['unsupported']} other files)",
            allowed=f"files ending in {', '.join(TEXT_SUFFIXES + TABLE_SUFFIXES)}, or a datasets directory",
        )


def _row(where: str, columns: Mapping[str, Any], field: str | None) -> Row | None:
    """The record as a row, None if it holds no text to train on."""
    if field is not None and field in columns:
        row = text_row(_text(where, field, columns[field]))
    else:
        shape = next((s for s in SHAPES if field is None and all(name in columns for name in s)), None)
        if shape is None:
            raise _wrong_columns(where, columns, field)
        row = Row(tuple((name, _value(where, name, columns[name])) for name in shape))
    return row if any(text.strip() for text, trained in row_text(row) if trained) else None


def _labelled(where: str, columns: Mapping[str, Any], text: str, label: str) -> Row | None:
    """The record as a text with its label, None if it holds no text."""
    for column, flag in ((text, "--field"), (label, "--label-field")):
        if column not in columns:
            raise UserError(
                f"{where} has no column {column!r}; its columns: {', '.join(map(str, columns)) or 'none'}",
                hint=did_you_mean(column, columns) or f"{flag} COLUMN",
            )
    name, said = class_name(where, columns[label]), _text(where, text, columns[text])
    if name is None:
        raise UserError(f"{where} has no label in column {label!r}", allowed="a name or a number in every row")
    return labelled_row(said, name) if said.strip() else None


def class_name(where: str, label: Any) -> str | None:
    """What a class is called by its label, a name or a number; None where there is none.

    Args:
        where: the label was found, for the error.
        label: as a table has it.

    Raises:
        UserError: it is neither a name nor a number.
    """
    if label is None or label != label or (isinstance(label, str) and not label.strip()):
        return None
    if not isinstance(label, str | int | float):
        raise UserError(f"{where}: the label is a {type(label).__name__}", allowed="a name or a number")
    return str(label).strip()


def _tags(where: str, columns: Mapping[str, Any], names: Sequence[str]) -> tuple[tuple[str, str], ...]:
    """The values of columns as text; a row may have none in one of them, but for a column that it lacks."""
    if missing := [name for name in names if name not in columns]:
        raise UserError(
            f"{where} has no column {missing[0]!r}; its columns: {', '.join(map(str, columns)) or 'none'}",
            hint="columns that every row has",
        )
    return tuple((name, str(columns[name])) for name in names if columns[name] is not None)


def _value(where: str, name: str, given: Any) -> str | tuple[Message, ...]:
    if name != "messages":
        return _text(where, name, given)
    if not all(isinstance(message, Mapping) and "role" in message for message in given or ()):
        raise UserError(f"{where}: messages = {given!r:.80}", allowed='a list of {"role": ..., "content": ...}')
    return tuple(Message(m["role"], _text(where, "content", m.get("content"))) for m in given or ())


def _text(where: str, name: str, given: Any) -> str:
    if not isinstance(given, str | None):
        raise UserError(f"{where}: column {name!r} holds {type(given).__name__}, not text", hint="--field COLUMN")
    return (given or "").strip("\n")


def _wrong_columns(where: str, columns: Mapping[str, Any], field: str | None) -> UserError:
    found = ", ".join(map(str, columns)) or "none"
    missing = f"no column {field!r}; " if field else ""
    text = next((name for name, value in columns.items() if isinstance(value, str)), "COLUMN")
    return UserError(
        f"{where}: {missing}columns found: {found}",
        allowed=" | ".join("+".join(shape) for shape in SHAPES) + ", or --field",
        hint=f"--field {text}",
    )
