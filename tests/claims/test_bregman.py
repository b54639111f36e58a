"""Continual learning under one objective (Wang et al., 2024), on Split Fashion-MNIST: five tasks of two classes.

A small convolutional network from random weights, one pass over each task, 500 remembered examples. What is compared is
the accuracy among all ten classes at the end, without the task (class-IL).
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

import pytest
from bench import results
from bench.results import Row, Target

from command import overhaul
from overhaul import task_record
from overhaul.forgetting import AccuracyMatrix, average_accuracy, forgetting

pytestmark = [pytest.mark.slow, pytest.mark.timeout(2 * 3600)]

SEEDS = (0, 1, 2)
PAIRED = (0, 1, 2, 3, 4)
"""Seeds of what refresh learning is held against, one by one."""
HOW = ("--tasks", "fashion-mnist", "--split", "5", "--epochs", "1", "--batch-size", "10", "--memory", "500",
       "--dtype", "fp32", "--evaluate", "none", "--save-every", "0")  # fmt: skip
METHODS: dict[str, tuple[str, tuple[str, ...]]] = {
    "finetune": ("nothing held", ("--output-term", "none")),
    "er": ("ER", ("--output-term", "er", "--alpha", "1")),
    "der": ("DER", ("--output-term", "der", "--alpha", "0.5")),
    "der++": ("DER++", ("--output-term", "der++", "--alpha", "0.5", "--label-weight", "0.5")),
    "fdr": ("FDR", ("--output-term", "fdr", "--alpha", "1")),
    "lwf": ("LwF", ("--output-term", "lwf", "--alpha", "1")),
    "ewc": ("EWC", ("--output-term", "none", "--weight-term", "ewc", "--beta", "100")),
    "cpr": ("CPR on EWC", ("--output-term", "cpr", "--alpha", "0.5", "--weight-term", "ewc", "--beta", "100")),
    "vcl": ("VCL", ("--output-term", "none", "--weight-term", "vcl")),
}
REFRESHED = ("--refresh.every", "2")
SETTINGS = {"model": "cnn, blank", "tasks": "fashion-mnist, 5 x 2", "flags": " ".join(HOW[4:])}

Matrices = dict[str, AccuracyMatrix]


@pytest.fixture(scope="module")
def blanks(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    found = {seed: tmp_path_factory.mktemp("blank") / str(seed) for seed in PAIRED}
    for seed, out in found.items():
        done = overhaul("blank", "cnn", "-o", out, "--images", "fashion-mnist", "--seed", seed)
        assert done.code == 0, done.err
    return found


def _learnt(blank: Path, out: Path, seed: int, flags: Sequence[str]) -> Matrices:
    done = overhaul("learn", "bregman", blank, "-o", out, *HOW, "--seed", seed, *flags)
    assert done.code == 0, done.err
    return dict(task_record.read(out).matrices)


@pytest.fixture(scope="module")
def learnt(blanks: dict[int, Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], list[Matrices]]:
    """`learnt("er")` -> the matrices of each seed, recorded the first time."""
    root = tmp_path_factory.mktemp("learnt")

    @cache
    def of(name: str) -> list[Matrices]:
        told, flags = METHODS[name]
        found = [_learnt(blanks[seed], root / f"{name}-{seed}", seed, flags) for seed in SEEDS]
        results.record([
            _row(f"{kind}-{name}", f"Accuracy after five tasks, {told}, {kind}",
                 [average_accuracy(one[kind]) for one in found])
            for kind in ("class-IL", "task-IL")
        ] + [_row(f"forgetting-{name}", f"Forgetting, {told}, class-IL",
                  [forgetting(one["class-IL"]) for one in found])])  # fmt: skip
        return found

    return of


def _class_il(of: Sequence[Matrices]) -> list[float]:
    return [average_accuracy(one["class-IL"]) for one in of]


def test_a_memory_is_worth_35_points(learnt: Callable[[str], list[Matrices]]):
    pairs = zip(_class_il(learnt("der++")), _class_il(learnt("finetune")), strict=True)
    rows = (
        _row("ahead", "DER++ above nothing held, class-IL", [held - free for held, free in pairs], Target(">=", 0.35)),
        _row("der++", "DER++, class-IL", _class_il(learnt("der++")), Target(">", 0.65)),
        _row("er", "ER, class-IL", _class_il(learnt("er")), Target(">", 0.6)),
    )
    results.record(rows)
    for row in rows:
        results.hold(row)


@pytest.mark.parametrize("name", ["der", "fdr", "lwf", "ewc", "cpr", "vcl"])
def test_the_others_are_measured(learnt: Callable[[str], list[Matrices]], name: str):
    """No accuracy is asked of them; no task is chosen better among all classes than among its own."""
    assert all(average_accuracy(one["class-IL"]) <= average_accuracy(one["task-IL"]) for one in learnt(name))


def test_refresh_learning_costs_no_more_than_half_a_point(
    blanks: dict[int, Path], learnt: Callable[[str], list[Matrices]], tmp_path_factory: pytest.TempPathFactory
):
    root, flags = tmp_path_factory.mktemp("refreshed"), METHODS["der++"][1]
    plain = _class_il(learnt("der++"))
    rest = [_learnt(blanks[s], root / f"plain-{s}", s, flags) for s in PAIRED[len(SEEDS) :]]
    plain += _class_il(rest)
    fresh = _class_il([_learnt(blanks[s], root / f"fresh-{s}", s, (*flags, *REFRESHED)) for s in PAIRED])
    differences = [one - other for one, other in zip(fresh, plain, strict=True)]
    error = statistics.stdev(differences) / len(differences) ** 0.5
    rows = (
        _row("refresh", "DER++ with refresh learning, released form, class-IL", fresh, seeds=PAIRED),
        _row("refresh-gain", "The same less DER++, seed by seed", differences, seeds=PAIRED),
        _row("refresh-error", "Standard error of the mean of these differences", [error], seeds=()),
        _row("refresh-mean", "Mean of these differences", [statistics.fmean(differences)], Target(">=", -0.005), ()),
    )
    results.record(rows)
    for row in rows:
        results.hold(row)


def _row(
    name: str, what: str, values: Sequence[float], target: Target | None = None, seeds: Sequence[int] = SEEDS
) -> Row:
    return Row(id=f"learn-bregman/{name}", kind="claim", what=what, values=tuple(values), unit="share", target=target,
               seeds=tuple(seeds), settings=SETTINGS)  # fmt: skip
