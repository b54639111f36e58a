"""What the claims of learning tasks share: networks with random weights or trained on clothes before, and runs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from command import overhaul
from overhaul import task_record
from overhaul.forgetting import AccuracyMatrix, average_accuracy

SEEDS = (0, 1, 2)
SEEN = "fashion-mnist"
"""What networks were trained on before, all its classes at once."""
BEFORE = ("--tasks", SEEN, "--split", "1", "--output-term", "none", "--batch-size", "64", "--optimizer", "adamw",
          "--lr", "0.001")  # fmt: skip
PASSES = {"cnn": 1, "vit": 0.5}
"""Over it; transformers take their time."""
ALWAYS = ("--dtype", "fp32", "--evaluate", "none", "--save-every", "0")

Matrices = dict[str, AccuracyMatrix]


def shared(factory: pytest.TempPathFactory) -> Path:
    """Where networks lie that several files of claims begin with, so that one session trains each once."""
    there = factory.getbasetemp() / "networks"
    there.mkdir(exist_ok=True)
    return there


def blank(shape: str, root: Path, seed: int) -> Path:
    """A network with random weights, for images like those of `SEEN`."""
    if not (out := root / f"{shape}-{seed}").exists():
        done = overhaul("blank", shape, "-o", out, "--images", SEEN, "--seed", seed)
        assert done.code == 0, done.err
    return out


def seen(shape: str, root: Path, seed: int) -> Path:
    """The same after `PASSES` over `SEEN`."""
    if not (out := root / f"{shape}-{seed}-seen").exists():
        learnt("bregman", blank(shape, root, seed), out, seed, (*BEFORE, "--epochs", PASSES[shape]))
    return out


def learnt(method: str, model: Path, out: Path, seed: int, flags: Sequence[object]) -> Matrices:
    """Runs `overhaul learn METHOD` and returns its three matrices of accuracies."""
    done = overhaul("learn", method, model, "-o", out, *ALWAYS, "--seed", seed, *flags)
    assert done.code == 0, done.err
    return dict(task_record.read(out).matrices)


def class_il(runs: Sequence[Matrices]) -> list[float]:
    """Of each run the mean accuracy at the end among all classes, without the task."""
    return [average_accuracy(one["class-IL"]) for one in runs]


def task_il(runs: Sequence[Matrices]) -> list[float]:
    """The same with the task told."""
    return [average_accuracy(one["task-IL"]) for one in runs]


def less(ones: Sequence[float], others: Sequence[float]) -> list[float]:
    """The differences, seed by seed."""
    return [one - other for one, other in zip(ones, others, strict=True)]
