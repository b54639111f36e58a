"""What a method says about each part it changed, for the report: kept only where somebody is recording.

with recording() as notes:
    model = method.apply(model, calib)
notes.layers[0].name, notes.layers[0].sparsity, notes.layers[0].error
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field


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


@dataclass(frozen=True, slots=True)
class Notes:
    """The notes of one recording, in the order they were made."""

    layers: list[LayerNote] = field(default_factory=list)
    parts: list[PartNote] = field(default_factory=list)


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
