"""Rehearsal-free learning of classes (Smith et al., 2023): Split MNIST, five tasks of two classes, no example kept.

From random weights, and from the same network after a pass over Fashion-MNIST. What is compared is the accuracy among
all ten classes at the end, without the task (class-IL). The rate and the weights of the terms were chosen on training
examples that were kept back (`--validation 0.2`), with seeds 0 and 1.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

import pytest
from bench import results
from bench.results import Row, Target

from claims.tasks_learnt import BEFORE, PASSES, SEEDS, Matrices, blank, class_il, learnt, less, seen, shared, task_il
from overhaul.forgetting import global_forgetting

pytestmark = [pytest.mark.slow, pytest.mark.timeout(2 * 3600)]

HOW = ("--tasks", "mnist", "--split", "5", "--epochs", "1", "--batch-size", "32", "--optimizer", "adamw",
       "--lr", "0.001")  # fmt: skip
NOTHING = ("--predictions", "0")
EWC = (*NOTHING, "--weight-term", "ewc", "--weights", "100")
L2 = ("--weight-term", "l2", "--weights", "0.03")
METHODS: dict[str, tuple[str, tuple[str, ...]]] = {
    "finetune": ("softmax head, nothing held", (*NOTHING, "--head", "softmax")),
    "ewc-softmax": ("softmax head, EWC alone", (*EWC, "--head", "softmax")),
    "ewc": ("binary head, EWC alone", EWC),
    "features": ("binary head, FeatKD alone", (*NOTHING, "--features", "1")),
    "predictions": ("binary head, PredKD", ()),
    "l2": ("binary head, PredKD and L2", L2),
    "qkv": ("binary head, PredKD, only queries, keys and values trained", ("--train", "qkv")),
    "qkv-l2": ("binary head, PredKD and L2, only queries, keys and values trained", (*L2, "--train", "qkv")),
}
SOME = SEEDS[:1]
"""Of the transformer, which takes minutes for each."""
LITTLE, AHEAD, FLIP = 0.35, 0.1, 0.03
SCRATCH, AFTER = "random weights", "trained before"
SETTINGS = {
    "tasks": "mnist, 5 x 2",
    "flags": " ".join(HOW[4:]),
    "before": " ".join(BEFORE[1:]),
    "passes before": PASSES,
}

Learnt = Callable[..., list[Matrices]]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("free")


@pytest.fixture(scope="module")
def run(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Learnt:
    """`run("ewc", SCRATCH)` -> the matrices of each seed, recorded the first time."""
    networks = shared(tmp_path_factory)

    @cache
    def of(name: str, begun: str, shape: str = "cnn", seeds: Sequence[int] = SEEDS) -> list[Matrices]:
        told, flags = METHODS[name]
        begin = blank if begun == SCRATCH else seen
        found = [
            learnt("rehearsal-free", begin(shape, networks, seed), root / _slug(name, begun, shape, seed), seed,
                   (*HOW, *flags))
            for seed in seeds
        ]  # fmt: skip
        slug, what = _slug(name, begun, shape), f"{shape}, {begun}, {told}"
        results.record([
            _row(f"{slug}-class", f"Accuracy after five tasks, {what}, class-IL", class_il(found)),
            _row(f"{slug}-task", f"Accuracy after five tasks, {what}, task-IL", task_il(found)),
            _row(f"{slug}-forgetting", f"Global forgetting, {what}",
                 [global_forgetting(one["as learnt"]) for one in found]),
        ])  # fmt: skip
        return found

    return of


def _slug(*parts: object) -> str:
    return "-".join(str(part).replace(" ", "-") for part in parts)


def test_from_scratch_only_distilled_predictions_keep_old_classes(run: Learnt):
    """The paper's table without pre-training; a softmax over all classes answers with the last task's two."""
    predictions, ewc = class_il(run("predictions", SCRATCH)), class_il(run("ewc", SCRATCH))
    finetune = class_il(run("finetune", SCRATCH))
    results.hold(
        _row("finetune", "Softmax head, nothing held, class-IL", finetune, Target("<", 0.25)),
        _row("ewc-softmax", "Softmax head, EWC alone, class-IL", class_il(run("ewc-softmax", SCRATCH)),
             Target("<", LITTLE)),
        _row("features", "Binary head, FeatKD alone, class-IL", class_il(run("features", SCRATCH)),
             Target("<", LITTLE)),
        _row("ewc", "Binary head, EWC alone, class-IL", ewc, Target("<", LITTLE)),
        _row("ahead-softmax", "Binary head, PredKD, above EWC alone with a softmax head, class-IL",
             less(predictions, class_il(run("ewc-softmax", SCRATCH))), Target(">=", AHEAD)),
        _row("ahead", "Binary head, PredKD, above EWC alone, class-IL", less(predictions, ewc), Target(">=", AHEAD)),
    )  # fmt: skip


def test_l2_helps_a_network_that_was_trained_before_and_no_other(run: Learnt):
    gains = [less(class_il(run("l2", begun)), class_il(run("predictions", begun))) for begun in (AFTER, SCRATCH)]
    results.hold(
        _row("l2-seen", "cnn, trained before: what L2 adds to PredKD, class-IL", gains[0], Target(">=", FLIP)),
        _row("l2-scratch", "cnn, random weights: what L2 adds to PredKD, class-IL", gains[1], Target("<=", 0.0)),
    )


@pytest.mark.parametrize("begun", [SCRATCH, AFTER])
def test_late_layers_move_more_than_early_ones(run: Learnt, root: Path, begun: str):
    """By linear CKA on the first task's held-out examples, after the last task against after the first."""
    run("predictions", begun)
    alike = [_alike(root / _slug("predictions", begun, "cnn", seed)) for seed in SEEDS]
    layers, slug = ("first block", "second block", "what the head reads"), _slug("cka", begun)
    results.record([
        _row(f"{slug}-{place}", f"Likeness (CKA) after five tasks, PredKD, cnn, {begun}: {layer}",
             [one[place] for one in alike], unit="")
        for place, layer in enumerate(layers)
    ])  # fmt: skip
    gaps = [one[0] - one[-1] for one in alike]
    results.hold(_row(slug, f"{begun}: likeness of the first block above that of what the head reads", gaps,
               Target(">", 0), unit=""))  # fmt: skip


def test_the_projections_of_attention_alone_are_measured(run: Learnt):
    """A vision transformer that was trained before: the paper's best, L2 on queries, keys and values."""
    found = {name: class_il(run(name, AFTER, "vit", SOME)) for name in ("predictions", "l2", "qkv", "qkv-l2")}
    results.record([
        _row("vit-qkv-l2", "vit, trained before: L2 on queries, keys and values above PredKD on all weights, class-IL",
             less(found["qkv-l2"], found["predictions"])),
        _row("vit-l2", "vit, trained before: what L2 adds to PredKD, all weights, class-IL",
             less(found["l2"], found["predictions"])),
    ])  # fmt: skip
    assert all(0 < value < 1 for values in found.values() for value in values)


def _alike(directory: Path) -> list[float]:
    """Of each layer, the early ones first, how alike its features are after the last task and after the first."""
    tables = json.loads((directory / "overhaul.json").read_text())["tables"]
    (told,) = [table for table in tables if "linear CKA" in table["title"]]
    return [float(value) for value in told["rows"][-1][1:]]


def _row(name: str, what: str, values: Sequence[float], target: Target | None = None, unit: str = "share") -> Row:
    return Row(id=f"learn-rehearsal-free/{name}", kind="claim", what=what, values=tuple(values), unit=unit,
               target=target, seeds=SEEDS[: len(values)], settings=SETTINGS)  # fmt: skip
