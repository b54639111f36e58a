"""Task sequences of texts: corpora that a language model learns one after the other."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace

from overhaul.corpora import Corpus, open_several
from overhaul.errors import UserError, refuse_twice


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TextTask:
    """What is learnt at one time: a corpus. It has one class, itself."""

    corpus: Corpus

    @property
    def name(self) -> str:
        """The corpus's, which no other one of the sequence has."""
        return self.corpus.name

    @property
    def num_classes(self) -> int:
        """One: tasks weigh alike."""
        return 1


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TextSequence:
    """Corpora in the order in which they are learnt.

    Attributes:
        name: how the user called them.
        tasks: one after the other.
        licence: what the texts may be used under.
        notes: what was dropped, one sentence each.
        fingerprint: hash of all texts, in order.
    """

    name: str
    tasks: tuple[TextTask, ...]
    licence: str
    notes: tuple[str, ...]
    fingerprint: str

    def first(self, count: int) -> TextSequence:
        """The first so many tasks; `UserError` where there are not as many."""
        if count > len(self.tasks):
            raise UserError(f"first_tasks {count} of {self.name}", allowed=f"1 to {len(self.tasks)}")
        return _sequence(self.name, self.tasks[:count])

    def ordered(self, places: Sequence[int]) -> TextSequence:
        """The same tasks in another order."""
        return _sequence(self.name, [self.tasks[place] for place in places])

    def validating(self, share: float) -> TextSequence:
        """The same tasks with the calibration text, which no training reads, in place of the held-out one.

        Raises:
            UserError: there is none of a task.
        """
        for task in self.tasks:
            if not task.corpus.calib:
                raise UserError(f"{task.name} has no text to validate on", allowed="validation 0, or more text")
        return _sequence(
            self.name,
            [TextTask(corpus=replace(task.corpus, heldout=task.corpus.calib, calib=())) for task in self.tasks],
            "validating",
        )


def _sequence(name: str, tasks: Sequence[TextTask], *more: str) -> TextSequence:
    told = [*(task.corpus.fingerprint for task in tasks), *more]
    return TextSequence(
        name=name,
        tasks=tuple(tasks),
        licence="; ".join(dict.fromkeys(task.corpus.licence for task in tasks)),
        notes=tuple(dict.fromkeys(note for task in tasks for note in task.corpus.notes)),
        fingerprint=hashlib.sha256(json.dumps(told).encode()).hexdigest()[:16],
    )


def open_texts(paths: Sequence[str]) -> TextSequence:
    """A sequence of corpora, a task each.

    Raises:
        UserError: none is named, one is named twice, or one cannot be read.
    """
    if not paths:
        raise UserError("no corpus is named", hint="--tasks manpages-de stdlib")
    refuse_twice(paths, "each corpus once")
    return _sequence(" ".join(paths), [TextTask(corpus=corpus) for corpus in open_several(paths).values()])
