"""Channel-wise reprogramming (Ge et al., ICCV 2023): six tasks of ten classes each, far from what was seen before.

A small convolutional network is trained on Fashion-MNIST for one epoch and frozen. The tasks are digits, and clothes
that look otherwise: inverted, turned, with their pixels in another order. All arms have the same steps and schedule;
the rate of each is the best of two or three on training examples that were kept back (`--validation 0.2`), with seed 0.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from statistics import fmean

import numpy as np
import pytest
from bench import results
from bench.results import Row, Target

from claims.tasks_learnt import BEFORE, SEEDS, Matrices, class_il, learnt, less, seen, shared, task_il
from overhaul import artifact, banks
from overhaul.banks import fingerprint
from overhaul.forgetting import backward_transfer, forgetting
from overhaul.kinds import Kind
from overhaul.tasks import open_tasks

pytestmark = [pytest.mark.slow, pytest.mark.timeout(2 * 3600)]

TASKS = (("mnist", "plain"), ("fashion-mnist", "invert"), ("digits", "plain"), ("fashion-mnist", "rotate=90"),
         ("mnist", "permute=0"), ("mnist", "invert"))  # fmt: skip
SIZE, TRAINED, HELD_OUT = (28, 28), 4000, 1000
"""Of each task's examples, at most."""
STEPS = ("--steps", "300", "--batch-size", "32", "--optimizer", "adamw", "--schedule", "cosine")
CLR: dict[str, tuple[str, tuple[str, ...]]] = {
    "clr": ("CLR", ("--lr", "0.03")),
    "norms": ("normalisations and head", ("--behind", "none", "--lr", "0.03")),
    "probe": ("head alone", ("--behind", "none", "--no-norms", "--lr", "0.1")),
}
FREE = ("--lr", "0.003", "--output-term", "none")
SHARED = {
    "finetune": ("nothing held", FREE),
    "ewc": ("EWC", (*FREE, "--weight-term", "ewc", "--beta", "100", "--fisher", "weighted")),
}
SETTINGS = {"model": "cnn, trained before: one pass, " + " ".join(BEFORE[1:]), "tasks": ", ".join(map(" ".join, TASKS)),
            "examples": f"{TRAINED} and {HELD_OUT} held out", "flags": " ".join(STEPS)}  # fmt: skip

Learnt = Callable[[str], list[Matrices]]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("clr")


@pytest.fixture(scope="module")
def networks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return shared(tmp_path_factory)


@pytest.fixture(scope="module")
def sets(root: Path) -> list[Path]:
    """The tasks, each as a file of images with classes of its own."""
    found = []
    for name, variant in TASKS:
        (task,) = open_tasks([name], variants=[variant], size=SIZE).tasks
        parts = [(task.train, TRAINED), (task.heldout, HELD_OUT)]
        chosen = [np.random.default_rng(0).permutation(len(part))[:most] for part, most in parts]
        found.append(root / f"{name}-{variant.replace('=', '-')}.npz")
        np.savez(
            found[-1],
            images=np.concatenate([part.images_NHWC[places] for (part, _), places in zip(parts, chosen, strict=True)]),
            labels=np.concatenate([part.labels_N[places] for (part, _), places in zip(parts, chosen, strict=True)]),
            heldout=np.repeat([False, True], [len(places) for places in chosen]),
        )
    return found


@pytest.fixture(scope="module")
def run(root: Path, networks: Path, sets: list[Path]) -> Learnt:
    """`run("clr")` -> the matrices of each seed, recorded the first time."""

    @cache
    def of(name: str) -> list[Matrices]:
        told, flags = (CLR | SHARED)[name]
        method = "clr" if name in CLR else "bregman"
        found = [
            learnt(
                method, seen("cnn", networks, seed), root / f"{name}-{seed}", seed, ("--tasks", *sets, *STEPS, *flags)
            )
            for seed in SEEDS
        ]
        rows = [_row(f"task-IL-{name}", f"Accuracy after six tasks, {told}, task-IL", task_il(found))]
        if name not in ("norms", "probe"):
            rows.append(_row(f"class-IL-{name}", f"The same among all classes, {told}, class-IL", class_il(found)))
        results.record(rows)
        return found

    return of


@pytest.fixture(scope="module")
def alone(root: Path, networks: Path, sets: list[Path]) -> list[list[float]]:
    """Of each seed and task, the accuracy of a copy of the network that learnt this task alone, all of it trained."""

    def accuracy(seed: int, task: Path) -> float:
        flags = ("--tasks", task, *STEPS, *FREE)
        return task_il([learnt("bregman", seen("cnn", networks, seed), root / f"{task.stem}-{seed}", seed, flags)])[0]

    found = [[accuracy(seed, task) for task in sets] for seed in SEEDS]
    results.record([_row("alone", "Accuracy, a fine-tuned copy for each task", [fmean(one) for one in found])])
    return found


def _last(matrices: Matrices) -> list[float]:
    """Of each task the accuracy at the end, with the task told."""
    return [matrices["task-IL"].accuracy(len(TASKS), task) for task in range(1, len(TASKS) + 1)]


def test_each_task_is_learnt_better_than_with_a_head_alone(run: Learnt):
    pairs = list(zip(run("clr"), run("probe"), strict=True))
    gains = np.array([less(_last(one), _last(other)) for one, other in pairs])
    rows = [
        _row(f"gain-{name}-{variant.replace('=', '-')}", f"CLR above a head alone, {name} {variant}",
             gains[:, place].tolist(), Target(">=", 0.03))
        for place, (name, variant) in enumerate(TASKS)
    ]  # fmt: skip
    rows.append(_row("gain-norms", "CLR above normalisations and head, mean of the tasks",
                     less(task_il(run("clr")), task_il(run("norms")))))  # fmt: skip
    results.record(rows)
    for row in rows:
        results.hold(row)


def test_most_of_what_fine_tuning_gains_is_gained(run: Learnt, alone: list[list[float]]):
    probe, clr = task_il(run("probe")), task_il(run("clr"))
    whole = less([fmean(one) for one in alone], probe)
    shares = [gained / most for gained, most in zip(less(clr, probe), whole, strict=True)]
    results.hold(_row("gain-share", "CLR's gain over a head alone, of a fine-tuned copy's", shares, Target(">=", 0.9)))


def test_nothing_is_forgotten(run: Learnt, root: Path, networks: Path):
    """The banks answer at the end what they answered at first, and the frozen network is the one that was given."""
    found = [one["task-IL"] for one in run("clr")]
    rows = (
        _row("bwt", "Backward transfer, CLR, task-IL", [backward_transfer(one) for one in found], Target("==", 0)),
        _row("forgetting", "Forgetting, CLR, task-IL", [forgetting(one) for one in found], Target("==", 0)),
    )
    results.record(rows)
    for seed in SEEDS:
        one, other = (
            artifact.load(path, kinds=(Kind.IMAGE_CLASSIFIER,)).model
            for path in (seen("cnn", networks, seed), root / f"clr-{seed}")
        )
        assert fingerprint(one) == fingerprint(other)
        assert len(banks.tasks_of(root / f"clr-{seed}")) == len(TASKS)
    for row in rows:
        results.hold(row)


@pytest.mark.parametrize("name", SHARED)
def test_in_shared_weights_tasks_are_forgotten(run: Learnt, name: str):
    values = [backward_transfer(one["task-IL"]) for one in run(name)]
    results.hold(_row(f"bwt-{name}", f"Backward transfer, {SHARED[name][0]}, task-IL", values, Target("<", 0)))


def test_a_bank_of_the_small_network_is_measured(run: Learnt, root: Path, networks: Path):
    """Far more than half a per cent: where there are few channels, kernels are a larger part than in a ResNet-50."""
    run("clr")
    model = artifact.load(seen("cnn", networks, 0), kinds=(Kind.IMAGE_CLASSIFIER,)).model
    backbone = sum(p.numel() for name, p in model.named_parameters() if not name.startswith("classifier"))
    _, tensors = banks._read(banks.files(root / "clr-0")[0])
    own = sum(t.numel() for name, t in tensors.items() if t.is_floating_point() and not name.startswith("classifier"))
    results.record([_row("share-cnn", "Kernels and normalisations of a bank in this network's weights",
                         [own / backbone], seeds=())])  # fmt: skip
    assert own < 0.1 * backbone


def _row(
    name: str, what: str, values: Sequence[float], target: Target | None = None, seeds: Sequence[int] = SEEDS
) -> Row:
    return Row(id=f"learn-clr/{name}", kind="claim", what=what, values=tuple(values), unit="share", target=target,
               seeds=tuple(seeds), settings=SETTINGS)  # fmt: skip
