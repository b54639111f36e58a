"""ConTraCon (Roy et al., 2023) on Fashion-MNIST: as it is, turned, and with its pixels permuted.

A vision transformer of three layers from random weights, 64 wide, in patches of 7 x 7, learns these three tasks of ten
classes from 200 images of each class; 50 are held out. What is compared is the accuracy with the task told (task-IL) on
the tasks behind the first, which trains the whole model in any case, and how often the entropy of predictions tells an
example's task.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from bench import results
from bench.results import Row, Target
from transformers import ViTConfig, ViTForImageClassification
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from command import overhaul
from overhaul import artifact, task_record
from overhaul.images import open_images

pytestmark = [pytest.mark.slow, pytest.mark.timeout(2 * 3600)]

SEEDS = (0, 1, 2)
TASKS = ("plain", "rotate=90", "permute=0")
EACH, EPOCHS = 250, 20
"""Images of a class, a fifth of which is held out; passes over those of a task."""
HOW = ("--epochs", str(EPOCHS), "--batch-size", "50", "--lr", "0.002", "--dtype", "fp32",
       "--save-every", "0")  # fmt: skip
FORMS = {
    "both": "kernels, gates, norms and head",
    "kernels": "kernels, norms and head",
    "gates": "gates, norms and head",
    "none": "norms and head",
}
SETTINGS = {"model": "ViT, 3 layers, 64 wide, blank", "tasks": "fashion-mnist, " + " ".join(TASKS),
            "images": f"{EACH} a class", "flags": " ".join(HOW)}  # fmt: skip

Told = dict[str, float]


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The first images of each class."""
    whole = open_images("fashion-mnist").train
    chosen = np.concatenate([np.flatnonzero(whole.labels_N == label)[:EACH] for label in range(10)])
    path = tmp_path_factory.mktemp("images") / "fashion.npz"
    np.savez(path, images=whole.images_NHWC[chosen], labels=whole.labels_N[chosen])
    return path


@pytest.fixture(scope="module")
def blanks(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    found = {}
    for seed in SEEDS:
        torch.manual_seed(seed)
        config = ViTConfig(hidden_size=64, num_hidden_layers=3, num_attention_heads=2, intermediate_size=128,
                           image_size=28, patch_size=7, num_channels=1, num_labels=10)  # fmt: skip
        found[seed] = tmp_path_factory.mktemp("blank") / str(seed)
        ViTForImageClassification(config).save_pretrained(found[seed])
        processor = ViTImageProcessorPil(size={"height": 28, "width": 28}, image_mean=[0.286], image_std=[0.353])
        processor.save_pretrained(found[seed])
    return found


def _run(blank: Path, images: Path, out: Path, seed: int, tasks: Sequence[str], *flags: str) -> Told:
    """Accuracies of a run: `task-IL` of tasks behind the first or of the only one, `class-IL`, `tasks told, ...`."""
    how = (*HOW, "--seed", str(seed), "--variants", *tasks)
    done = overhaul("learn", "contracon", blank, "-o", out, "--tasks", images, *how, *flags)
    assert done.code == 0, done.err
    last = {kind: matrix.values[-1] for kind, matrix in task_record.read(out).matrices.items()}
    assert (last["class-IL"] <= last["task-IL"]).all(), "a right class of a wrong task is wrong"
    told = {row["metric"]: row["value"] for row in artifact.read_record(out)["facts"][-1]["metrics"]}
    later = last["task-IL"][1:] if len(tasks) > 1 else last["task-IL"]
    return told | {"task-IL": float(later.mean()), "class-IL": float(last["class-IL"].mean())}


@pytest.fixture(scope="module")
def learnt(
    blanks: dict[int, Path], images: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], list[Told]]:
    """`learnt("both")` -> what was measured with each seed, recorded the first time."""
    root = tmp_path_factory.mktemp("learnt")

    @cache
    def of(form: str) -> list[Told]:
        # Views are looked at once: what they are worth does not depend on the form.
        flags = ("--form", form, *(() if form == "both" else ("--views", "0")))
        seeds = SEEDS if form in ("both", "none") else SEEDS[:1]
        found = [_run(blanks[seed], images, root / f"{form}-{seed}", seed, TASKS, *flags) for seed in seeds]
        results.record([_row(form, f"Accuracy on later tasks, {FORMS[form]}", _each(found, "task-IL"), seeds=seeds)])
        return found

    return of


def _each(found: Sequence[Told], name: str) -> list[float]:
    return [one[name] for one in found]


def test_later_tasks_are_learnt_as_well_as_by_models_of_their_own(
    blanks: dict[int, Path], images: Path, learnt: Callable[[str], list[Told]], tmp_path_factory: pytest.TempPathFactory
):
    root, alone = tmp_path_factory.mktemp("alone"), []
    for seed in SEEDS:
        own = [_run(blanks[seed], images, root / f"{n}-{seed}", seed, [task], "--views", "0")["task-IL"]
               for n, task in enumerate(TASKS[1:])]  # fmt: skip
        alone.append(sum(own) / len(own))
    differences = [ours - theirs for ours, theirs in zip(_each(learnt("both"), "task-IL"), alone, strict=True)]
    results.hold(
        _row("alone", "Accuracy on later tasks, a model of its own for each", alone),
        _row("against-alone", "Banks less models of their own, later tasks", differences, Target(">=", -0.03)),
    )


def test_kernels_are_worth_two_points_over_norms_and_head(learnt: Callable[[str], list[Told]]):
    pairs = zip(_each(learnt("both"), "task-IL"), _each(learnt("none"), "task-IL"), strict=True)
    results.hold(_row("against-norms", "All less norms and head alone, later tasks", [a - b for a, b in pairs],
               Target(">=", 0.02)))  # fmt: skip


@pytest.mark.parametrize("form", ["kernels", "gates"])
def test_the_parts_are_measured(learnt: Callable[[str], list[Told]], form: str):
    """Nothing is asked of them but that they are measured."""
    assert all(0.1 < value <= 1 for value in _each(learnt(form), "task-IL"))


def test_views_tell_tasks_better_than_one_does(learnt: Callable[[str], list[Told]]):
    one, several = (_each(learnt("both"), f"tasks told, {way}") for way in ("one view", "16 views"))
    results.hold(
        _row("told-one", "Tasks told by entropy, one view", one, Target(">", 0.4)),
        _row("told-views", "Tasks told by entropy, 16 views", several),
        _row("views", "16 views less one view, tasks told", [b - a for a, b in zip(one, several, strict=True)],
             Target(">=", 0.02)),
        _row("class-IL", "Accuracy, class-IL, the task told by 16 views", _each(learnt("both"), "class-IL")),
    )  # fmt: skip


def _row(
    name: str, what: str, values: Sequence[float], target: Target | None = None, seeds: Sequence[int] = SEEDS
) -> Row:
    return Row(id=f"learn-contracon/{name}", kind="claim", what=what, values=tuple(values), unit="share", target=target,
               seeds=tuple(seeds), settings=SETTINGS)  # fmt: skip
