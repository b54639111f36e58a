"""One task of a model with banks as a model of its own, which plain transformers reads: the bank goes into weights."""

from __future__ import annotations

import time
from pathlib import Path

import torch

from overhaul import artifact as artifacts
from overhaul import machine, text_banks
from overhaul.artifact import Artifact
from overhaul.banks import Banked
from overhaul.journal import Notes
from overhaul.judge import Judge
from overhaul.kinds import Kind
from overhaul.lineage import LineageStep, Parent
from overhaul.task_record import TASKS
from overhaul.write import write_directory

KINDS = (Kind.IMAGE_CLASSIFIER, Kind.CAUSAL_LM)


def opened(model: str) -> Banked:
    """A model with its banks, one of which is put to use by `banked.use(banked.find(TASK))`.

    Args:
        model: a directory with banks of `learn clr` or `learn contracon`.

    Raises:
        UserError: there are none, or they cannot be read.
    """
    made = artifacts.load(model, kinds=KINDS)
    return text_banks.read(made.model, made.path)


def export(model: str, task: str, out: Path, *, command: str = "") -> tuple[str, ...]:
    """Writes a task's model into a new directory: the weights with its bank in them, and its head and classes, if any.

    Args:
        model: a directory with banks.
        task: the name of one of them.
        out: the new directory.
        command: what was typed, for the record.

    Returns:
        The classes, in the order of the logits; none of a language model.

    Raises:
        UserError: there are no banks, none of that task, or they have no such form, as kernels behind convolutions.
    """
    began = time.perf_counter()
    made = artifacts.load(model, kinds=KINDS)
    judge = Judge(None, None, made.processor, torch.float32)
    before = judge.chain(made)
    # In the precision that they were learnt in: it is the sum that is rounded.
    banked = Banked(made.model, text_banks.sockets_of(made.model, made.path))
    banked.read(made.path)
    artifacts.check_out(out, parent=made.path)
    banked.use(place := banked.find(task))
    changed = made.changed(banked.merge(), _step(made, task, command, time.perf_counter() - began))
    after = judge.after(changed, before, (), "learn", "export")
    write_directory(changed, out, facts=(*before, after), history=None, judge=judge, notes=Notes())
    (out / TASKS).unlink(missing_ok=True)  # it tells of all tasks, and this model knows one
    return banked.banks[place].classes


def _step(made: Artifact, task: str, command: str, seconds: float) -> LineageStep:
    return LineageStep(
        verb="learn",
        method="export",
        fields={"task": task},
        non_default=("task",),
        parents=(Parent(path=str(made.path.resolve()), hash=made.weights_sha256),),
        seconds=round(seconds, 3),
        peak_rss_bytes=machine.peak_rss_bytes(),
        versions=machine.versions(),
        hardware=machine.hardware(next(made.model.parameters()).device),
        command=command,
        date=machine.now(),
    )
