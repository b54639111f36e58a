"""One task of a model with banks as a model of its own, which plain transformers reads: the bank goes into weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from overhaul import artifact as artifacts
from overhaul import banks, catalog
from overhaul.artifact import Artifact
from overhaul.banks import Banked
from overhaul.kinds import Kind
from overhaul.task_record import TASKS


def opened(model: str) -> Banked:
    """A model with its banks, one of which is put to use by `banked.use(banked.find(TASK))`.

    Args:
        model: a directory with banks of `learn clr` or `learn contracon`.

    Raises:
        UserError: there are none, or they cannot be read.
    """
    return _opened(model)[1]


def _opened(model: str) -> tuple[Artifact, Banked]:
    made = artifacts.load(model, kinds=(Kind.IMAGE_CLASSIFIER,))
    name, settings = banks.made_with(made.path)
    method: Any = catalog.find("learn", name).load()(**settings)
    banked = Banked(made.model, method.sockets())
    banked.read(made.path)
    return made, banked


def export(model: str, task: str, out: Path) -> tuple[str, ...]:
    """Writes a task's model into a new directory: the weights with its bank in them, its head, its classes by name.

    Args:
        model: a directory with banks.
        task: the name of one of them.
        out: the new directory.

    Returns:
        The classes, in the order of the logits.

    Raises:
        UserError: there are no banks, none of that task, or they have no such form, as those of learn clr.
    """
    made, banked = _opened(model)
    artifacts.check_out(out, parent=made.path)
    banked.use(place := banked.find(task))
    banked.merge()
    with artifacts.stage(out) as directory:
        artifacts.write_model(made, directory)
        (directory / TASKS).unlink(missing_ok=True)  # it tells of all tasks, and this model knows one
        artifacts.write_record(made, directory, {"task": task, "exported_from": str(made.path.resolve())})
    return banked.banks[place].classes
