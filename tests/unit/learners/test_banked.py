"""The best pass over a task of images: it is what a shorter run would have ended with, and resuming finds it again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from command import interrupted, overhaul, refused
from images import write_vit
from overhaul import artifact, journal, machine
from overhaul.kinds import Kind
from overhaul.learn.clr import Clr
from overhaul.learn.contracon import ConTraCon
from overhaul.task_data import TaskData
from overhaul.task_scores import logits_of
from overhaul.tasks import open_tasks
from overhaul.train import train
from overhaul.workspace import finish

HOW: dict[str, Any] = {"batch_size": 12, "schedule": "constant", "keep_best": 0.25}


def learnt(model: Path, bars: Path, method: Any, *, ends: bool = True) -> tuple[Any, list[tuple[str, ...]]]:
    """What has learnt two tasks, and which passes it kept."""
    made = artifact.load(model, kinds=(Kind.IMAGE_CLASSIFIER,))
    sequence = open_tasks([str(bars)], split=2)
    data = TaskData(sequence.choosing(0.25), made.processor, 1, seed=0)
    learner = method.learner(made.model, data)
    machine.seed_everything(0)
    with journal.recording() as notes:
        for number in range(2):
            learner.begin(number)
            train(plan := learner.plan(number), method, quiet=True)
            finish(plan)
            learner.learnt(number)
        if ends:
            learner.end()
    return learner, [row for table in notes.tables if table.title.startswith("Which pass") for row in table.rows]


def test_the_bank_that_is_kept_is_that_of_a_run_that_ended_with_the_best_pass(cnn: Path, bars: Path):
    # A rate at which passes are good and bad by turns.
    best, rows = learnt(cnn, bars, Clr(**HOW, lr=0.1, epochs=6.0))
    places = [int(row[1]) for row in rows]
    assert [row[2] for row in rows] == ["6", "6"]
    assert min(places) < 6, "else the last pass would be the best one"
    for number, place in enumerate(places):
        short, _ = learnt(cnn, bars, Clr(**{**HOW, "keep_best": 0.0}, lr=0.1, epochs=float(place)))
        one, other = (learner.banked.banks[number].tensors for learner in (best, short))
        assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())


def test_the_accuracy_is_that_of_the_bank_that_is_kept_on_the_examples_aside(cnn: Path, bars: Path):
    learner, _ = learnt(cnn, bars, Clr(**HOW, lr=0.1, epochs=4.0), ends=False)

    for number in range(2):
        learner.banked.use(number)
        aside = learner.data.aside[number]
        answers_N = logits_of(learner.model, aside, dtype=torch.float32).argmax(dim=1) + 2 * number
        right = sum(answers_N.tolist()[row] == label for row, label in enumerate(aside.labels_N))
        assert max(learner._kept[number].scores) == right / len(aside) > 0.5


def test_a_task_is_done_when_no_pass_is_better_for_long(tmp_path: Path, bars: Path):
    vit = write_vit(tmp_path / "vit")
    how: dict[str, Any] = {**HOW, "kernel": 3, "views": 0, "first_task": "whole", "epochs": 9.0}
    _, rows = learnt(vit, bars, ConTraCon(**how, lr=5e-3, patience=2))

    assert all(int(passes) in (int(kept) + 2, 9) for _, kept, passes, _ in rows)
    assert any(int(passes) < 9 for _, _, passes, _ in rows)


def test_a_run_that_was_stopped_goes_on_to_the_same_bits(cnn: Path, bars: Path, tmp_path: Path):
    how = ("learn", "clr", cnn, "--tasks", bars, "--split", 2, "--batch-size", 12, "--epochs", 4, "--lr", 0.1)
    how = (*how, "--keep-best", 0.25, "--patience", 2, "--save-every", 2)
    assert overhaul(*how, "-o", tmp_path / "whole").code == 0
    # In the second task.
    assert interrupted(lambda seen: seen.count(1) == 2 and seen[-1] == 6, *how, "-o", tmp_path / "cut").code != 0
    done = overhaul(*how, "-o", tmp_path / "cut", "--resume")
    assert done.code == 0, done.err

    for file in ("model.safetensors", "banks/000.safetensors", "banks/001.safetensors"):
        assert (tmp_path / "whole" / file).read_bytes() == (tmp_path / "cut" / file).read_bytes()
    whole, cut = (json.loads((tmp_path / name / "tasks.json").read_text()) for name in ("whole", "cut"))
    assert all(task.pop("seconds") > 0 for told in (whole, cut) for task in told["tasks"])
    assert whole == cut


def test_mistakes(cnn: Path, tiny: Path, bars: Path, tmp_path: Path):
    (tmp_path / "a.txt").write_text("a cat and a dog. " * 40)

    def tried(model: Path, tasks: Path, *more: object) -> Any:
        return overhaul("learn", "clr", model, "-o", tmp_path / "out", "--tasks", tasks, *more)

    refused(tried(cnn, bars, "--patience", 3), "patience is of keep_best")
    refused(tried(cnn, bars, "--keep-best", 1), "keep_best")
    refused(tried(cnn, bars, "--keep-best", 0.9999), "are too few")
    refused(tried(tiny, tmp_path / "a.txt", "--keep-best", 0.1, "--seq-len", 16), "--keep-best is of images")
