"""What a method says about each part it changed, for the report: kept only where somebody is recording.

with recording() as notes:
    model = method.apply(model, calib)
notes.layers[0].name, notes.layers[0].sparsity, notes.layers[0].error
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

    from overhaul.table import Row
    from overhaul.task_record import TaskRecord


@dataclass(frozen=True, slots=True)
class LayerNote:
    """One changed layer.

    Attributes:
        name: its qualified name in the model.
        sparsity: share of its weights that the mask removes, from 0 to 1.
        error: norm of the change over norm of the original, of the weights for criteria without data, of the
            layer's output, as far as the method's statistic tells, for the others.
    """

    name: str
    sparsity: float
    error: float


@dataclass(frozen=True, slots=True)
class PartNote:
    """One reconstructed part: the mean squared difference from its dense self's output, before and after."""

    name: str
    before: float
    after: float


@dataclass(frozen=True, slots=True, kw_only=True)
class TableNote:
    """A table for the report: what a method compared before it chose.

    Attributes:
        title: the finding, as a sentence.
        columns: their titles.
        rows: cells as text, in the order of the columns.
    """

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorsNote:
    """Tensors that a later step may ask for, written to `file` beside the weights with `metadata`."""

    file: str
    tensors: Mapping[str, Tensor]
    metadata: Mapping[str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class StateNote:
    """What a run that goes on needs, written to `file` beside the weights as torch does: tensors and plain data."""

    file: str
    state: Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class RowsNote:
    """Records for anyone to read, written to `file` beside the weights as JSON lines."""

    file: str
    rows: tuple[Mapping[str, Any], ...]


@dataclass(frozen=True, slots=True)
class TextNote:
    """What belongs to the model and is neither weights nor records, written to `file` beside the weights as it is."""

    file: str
    text: str


@dataclass(frozen=True, slots=True)
class FilesNote:
    """What writes files of its own beside the weights, when it is given the directory that is being written."""

    write: Callable[[Path], None]


@dataclass(frozen=True, slots=True)
class AnsweringNote:
    """A context in which the model answers with what will lie beside it, for measuring."""

    inside: Callable[[], AbstractContextManager[None]]


@dataclass(frozen=True, slots=True)
class Notes:
    """The notes of one recording, in the order they were made."""

    layers: list[LayerNote] = field(default_factory=list)
    parts: list[PartNote] = field(default_factory=list)
    tables: list[TableNote] = field(default_factory=list)
    tensors: list[TensorsNote] = field(default_factory=list)
    rows: list[RowsNote] = field(default_factory=list)
    texts: list[TextNote] = field(default_factory=list)
    states: list[StateNote] = field(default_factory=list)
    files: list[FilesNote] = field(default_factory=list)
    answering: list[AnsweringNote] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    metrics: list[Row] = field(default_factory=list)
    tasks: list[TaskRecord] = field(default_factory=list)

    @contextmanager
    def answering_as_written(self) -> Iterator[None]:
        """Inside, the model answers with what will lie beside it."""
        with ExitStack() as inside:
            for note in self.answering:
                inside.enter_context(note.inside())
            yield

    @property
    def num_tokens(self) -> int:
        """Tokens that were read, by those methods that say so themselves."""
        return sum(self.tokens)


_notes: ContextVar[Notes | None] = ContextVar("overhaul_journal", default=None)


@contextmanager
def recording() -> Iterator[Notes]:
    """Collects the notes made inside; an inner recording hides the outer one."""
    notes = Notes()
    token = _notes.set(notes)
    try:
        yield notes
    finally:
        _notes.reset(token)


def note_layer(name: str, *, sparsity: float, error: float) -> None:
    """Adds a layer to the recording in progress; does nothing when there is none."""
    if (notes := _notes.get()) is not None:
        notes.layers.append(LayerNote(name, sparsity, error))


def note_part(name: str, *, before: float, after: float) -> None:
    """Adds a reconstructed part to the recording in progress; does nothing when there is none."""
    if (notes := _notes.get()) is not None:
        notes.parts.append(PartNote(name, before, after))


def note_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Adds a table to the recording in progress; does nothing when there is none."""
    if (notes := _notes.get()) is not None:
        notes.tables.append(TableNote(title=title, columns=tuple(columns), rows=tuple(map(tuple, rows))))


def note_tensors(file: str, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Adds a file of tensors to the recording in progress; does nothing when there is none."""
    if (notes := _notes.get()) is not None:
        notes.tensors.append(TensorsNote(file=file, tensors=tensors, metadata=metadata))


def note_rows(file: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """Adds a file of records to the recording in progress; does nothing when there is none."""
    if (notes := _notes.get()) is not None:
        notes.rows.append(RowsNote(file=file, rows=tuple(rows)))


def note_text(file: str, text: str) -> None:
    """Adds a file of text to the recording in progress; does nothing when there is none."""
    if (notes := _notes.get()) is not None:
        notes.texts.append(TextNote(file, text))


def note_state(file: str, state: Mapping[str, Any]) -> None:
    """Adds what a run that goes on needs to the recording in progress; does nothing when there is none."""
    if (notes := _notes.get()) is not None:
        notes.states.append(StateNote(file=file, state=state))


def note_files(write: Callable[[Path], None]) -> None:
    """Adds what writes files of its own to the recording in progress; does nothing when there is none.

    Args:
        write: called with the directory that is being written.
    """
    if (notes := _notes.get()) is not None:
        notes.files.append(FilesNote(write))


def note_answering(inside: Callable[[], AbstractContextManager[None]]) -> None:
    """Adds how the model is measured to the recording in progress; does nothing when there is none.

    Args:
        inside: makes a context in which the model answers with what will lie beside it.
    """
    if (notes := _notes.get()) is not None:
        notes.answering.append(AnsweringNote(inside))


def note_metric(row: Row) -> None:
    """Adds a number about the result, for its tables, to the recording in progress; does nothing when there is none."""
    if (notes := _notes.get()) is not None:
        notes.metrics.append(row)


def note_tasks(record: TaskRecord) -> None:
    """Adds what is known of a run of tasks to the recording in progress; does nothing when there is none."""
    if (notes := _notes.get()) is not None:
        notes.tasks.append(record)


def note_tokens(count: int) -> None:
    """Adds tokens that a method of several steps has taken from its corpus; does nothing when nobody is recording."""
    if (notes := _notes.get()) is not None:
        notes.tokens.append(count)
