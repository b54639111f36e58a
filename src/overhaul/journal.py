"""What a method says about each layer it changed, for the report: kept only where somebody is recording.

with recording() as notes:
    model = method.apply(model, calib)
notes[0].layer, notes[0].sparsity, notes[0].error
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class LayerNote:
    """One changed layer.

    Attributes:
        layer: its qualified name in the model.
        sparsity: share of its weights that the mask removes, from 0 to 1.
        error: norm of the change over norm of the original, of the weights for criteria without data, of the
            layer's output, as far as the method's statistic tells, for the others.
    """

    layer: str
    sparsity: float
    error: float


_notes: ContextVar[list[LayerNote] | None] = ContextVar("overhaul_journal", default=None)


@contextmanager
def recording() -> Iterator[list[LayerNote]]:
    """Collects the notes made inside, in order; an inner recording hides the outer one."""
    notes: list[LayerNote] = []
    token = _notes.set(notes)
    try:
        yield notes
    finally:
        _notes.reset(token)


def note_layer(layer: str, *, sparsity: float, error: float) -> None:
    """Adds one note to the recording in progress; does nothing when there is none."""
    notes = _notes.get()
    if notes is not None:
        notes.append(LayerNote(layer, sparsity, error))
