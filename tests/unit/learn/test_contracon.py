"""ConTraCon task after task: what is frozen, what is kept, where a task begins, which one an example is taken for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForImageClassification

from command import overhaul, refused
from images import write_cnn, write_vit
from overhaul import artifact, banks, journal, machine, task_record
from overhaul.banks import Banked, fingerprint
from overhaul.journal import Notes
from overhaul.kinds import Kind
from overhaul.learn.clr import Clr
from overhaul.learn.contracon import ConTraCon
from overhaul.learners.banked import BankLearner
from overhaul.task_data import TaskData
from overhaul.task_scores import logits_of
from overhaul.tasks import open_tasks
from overhaul.train import train
from overhaul.workspace import finish

HOW: dict[str, Any] = {"batch_size": 16, "lr": 5e-3, "epochs": 2.0, "kernel": 5, "views": 2}


def learn(model: Path, bars: Path, **settings: Any) -> tuple[BankLearner, Notes, list[list[Tensor]]]:
    """What has learnt two tasks, what it noted, and after each task what its model said of all tasks so far."""
    made = artifact.load(model, kinds=(Kind.IMAGE_CLASSIFIER,))
    data = TaskData(open_tasks([str(bars)], split=2), made.processor, 1, seed=0)
    method = ConTraCon(**{**HOW, **settings})
    learner: Any = method.learner(made.model, data)
    said: list[list[Tensor]] = []
    machine.seed_everything(0)
    with journal.recording() as notes:
        for number in range(2):
            learner.begin(number)
            train(plan := learner.plan(number), method, quiet=True)
            finish(plan)
            learner.learnt(number)
            said.append([_said(learner, data, task) for task in range(number + 1)])
        learner.end()
    return learner, notes, said


def _said(learner: BankLearner, data: TaskData, task: int) -> Tensor:
    learner.banked.use(task)
    return logits_of(learner.model, data.heldout[task], dtype=torch.float32)


@pytest.mark.parametrize("first_task", ["whole", "frozen"])
def test_of_an_older_task_nothing_is_forgotten(vit: Path, bars: Path, first_task: str):
    learner, _, said = learn(vit, bars, first_task=first_task)

    assert torch.equal(said[0][0], said[1][0]), "to the bit"
    assert fingerprint(learner.model) == learner.banked.fingerprint


def test_the_first_task_trains_the_whole_model_or_none_of_it(vit: Path, bars: Path):
    given = fingerprint(artifact.load(vit, kinds=(Kind.IMAGE_CLASSIFIER,)).model)
    whole, _, said = learn(vit, bars, first_task="whole")
    frozen, _, _ = learn(vit, bars, first_task="frozen")

    assert frozen.banked.fingerprint == given != whole.banked.fingerprint
    inner: Any = whole.model
    stock = logits_of(inner, whole.data.heldout[0], dtype=torch.float32)
    assert torch.equal(stock, said[0][0]), "the model beside the banks is that of the first task"
    assert inner.config.id2label == {0: "0", 1: "1"}


def test_a_task_begins_as_the_first_one_or_as_the_one_that_is_most_like_it(vit: Path, bars: Path):
    first, _, _ = learn(vit, bars, first_task="frozen")
    similar, notes, _ = learn(vit, bars, parent="most_similar")

    assert [bank.parent for bank in first.banked.banks] == [None, "0, 1"]
    assert [bank.parent for bank in similar.banked.banks] == [None, "0, 1"]
    (table,) = [table for table in notes.tables if "began" in table.title]
    assert table.columns == ("", "began as", "0, 1")
    assert [row[:2] for row in table.rows] == [("0, 1", "the whole model"), ("2, 3", "0, 1")]
    assert table.rows[0][2] == ""
    assert table.rows[1][2].endswith("%")


def test_a_task_that_was_seen_before_begins_as_itself(vit: Path, bars: Path):
    """Of two banks the one of the same classes tells them apart best."""
    made = artifact.load(vit, kinds=(Kind.IMAGE_CLASSIFIER,))
    data = TaskData(open_tasks([str(bars)], variants=["permute=1", "plain", "permute=2"]), made.processor, 1, seed=0)
    method = ConTraCon(**{**HOW, "lr": 5e-3, "epochs": 20.0}, parent="most_similar")
    learner: Any = method.learner(made.model, data)
    machine.seed_everything(0)
    for number in range(2):
        learner.begin(number)
        train(learner.plan(number), method, quiet=True)
        learner.learnt(number)

    assert learner._parent_of(1) == 1
    assert learner._parent_of(0) == 0


def test_views_of_a_policy_that_changes_nothing_tell_what_one_view_tells(
    vit: Path, bars: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("overhaul.learners.banked.augmented", lambda images, how, seed: images)
    learner, notes, _ = learn(vit, bars, views=3)

    for number in range(2):
        one, several = (learner.identified(number, (0, 1), by_views=by) for by in (False, True))
        assert torch.equal(one, several)
        assert torch.equal(learner._doubts[number, 1, False], learner._doubts[number, 1, True])
    one, several = notes.metrics
    assert (one.metric, several.metric) == ("tasks told, one view", "tasks told, 9 views")
    assert one.value == several.value


def test_the_report_has_one_view_and_several_side_by_side(vit: Path, bars: Path):
    learner, notes, _ = learn(vit, bars)
    _, alone, _ = learn(vit, bars, views=0)

    (table,) = [table for table in notes.tables if "taken for" in table.title]
    assert table.title.endswith(": by one view / by 8 views")
    assert all(len(cell.split(" / ")) == 2 for row in table.rows for cell in row[1:])
    counts = [learner._taken_for(number, True) for number in range(2)]
    assert notes.metrics[1].value == (counts[0][0] + counts[1][1]) / notes.metrics[1].count
    assert [row.metric for row in alone.metrics] == ["tasks told, one view"]
    assert " / " not in next(table for table in alone.tables if "taken for" in table.title).rows[0][1]
    assert not torch.equal(learner._doubts[0, 0, True], learner._doubts[0, 0, False])


def test_clr_can_look_at_several_views_too(tmp_path: Path, bars: Path):
    made = artifact.load(write_cnn(tmp_path / "cnn"), kinds=(Kind.IMAGE_CLASSIFIER,))
    data = TaskData(open_tasks([str(bars)], split=2), made.processor, 1, seed=0)
    learner: Any = (method := Clr(views=2, batch_size=16, steps=2)).learner(made.model, data)
    for number in range(2):
        learner.begin(number)
        train(learner.plan(number), method, quiet=True)
        learner.learnt(number)

    assert learner.identified(1, (0, 1)).tolist() == learner.identified(1, (0, 1)).tolist()
    assert learner._view(1, 0).images_NCHW.dtype == data.heldout[1].images_NCHW.dtype
    assert (learner._view(1, 0).images_NCHW != learner._view(1, 1).images_NCHW).any()


# The command.


@pytest.fixture(scope="module")
def learnt(vit: Path, bars: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("contracon") / "out"
    flags = ("--tasks", bars, "--variants", "plain", "invert", "--epochs", "2", "--batch-size", "16", "--lr", "0.005")
    done = overhaul("learn", "contracon", vit, "-o", out, *flags, "--kernel", "5", "--views", "1", "--dtype", "fp32")
    assert done.code == 0, done.err
    return out


def test_a_directory_has_the_first_tasks_model_and_a_bank_for_each(learnt: Path):
    assert banks.tasks_of(learnt) == ["plain", "invert"]
    assert banks.made_with(learnt) == ("contracon", {"form": "both", "kernel": 5, "dilation": 1, "norms": True})
    with safe_open(banks.files(learnt)[1], framework="pt") as stored:
        assert json.loads(stored.metadata()["overhaul"])["parent"] == "plain"
    record = artifact.read_record(learnt)
    assert {"tasks told, one view", "tasks told, 7 views"} <= {row["metric"] for row in record["facts"][-1]["metrics"]}
    accuracy = task_record.read(learnt).matrices
    assert (accuracy["class-IL"].values[-1] <= accuracy["task-IL"].values[-1]).all()


def test_a_further_run_adds_a_bank_and_leaves_the_model(learnt: Path, bars: Path, tmp_path: Path):
    flags = ("--tasks", bars, "--variants", "rotate=90", "--steps", "2", "--kernel", "5", "--dtype", "fp32")
    done = overhaul("learn", "contracon", learnt, "-o", tmp_path / "more", *flags, "--parent", "most_similar")
    assert done.code == 0, done.err

    assert banks.tasks_of(tmp_path / "more") == ["plain", "invert", "rotate=90"]
    for one, other in zip(banks.files(learnt), banks.files(tmp_path / "more"), strict=False):
        assert one.read_bytes() == other.read_bytes()
    one, other = load_file(learnt / "model.safetensors"), load_file(tmp_path / "more" / "model.safetensors")
    assert all(torch.equal(one[name], other[name]) for name in one.keys() | other.keys())


def test_an_exported_task_is_a_stock_model(learnt: Path, tmp_path: Path):
    done = overhaul("learn", "export", learnt, "--task", "invert", "-o", tmp_path / "one")
    assert done.code == 0, done.err
    made = artifact.load(learnt, kinds=(Kind.IMAGE_CLASSIFIER,))
    banked = Banked(made.model, ConTraCon(kernel=5).sockets())
    banked.read(learnt)
    banked.use(1)
    images = {"pixel_values": torch.randn(8, 1, 8, 8)}
    called: Any = banked.model

    stock = AutoModelForImageClassification.from_pretrained(tmp_path / "one")

    assert torch.allclose(stock(**images).logits, called(**images).logits, atol=1e-6)
    assert stock.config.id2label == {0: "0", 1: "1", 2: "2", 3: "3"}
    assert not (tmp_path / "one" / "tasks.json").exists()
    assert not (tmp_path / "one" / "banks").exists()
    assert artifact.verify(tmp_path / "one")
    step = artifact.read_record(tmp_path / "one")["lineage"][-1]
    assert (step["verb"], step["method"], step["fields"]) == ("learn", "export", {"task": "invert"})
    card = (tmp_path / "one" / "README.md").read_text()
    assert "learn export with task invert" in card
    assert "AutoModelForImageClassification" in card


def test_what_cannot_be_exported(learnt: Path, vit: Path, bars: Path, tmp_path: Path):
    out = ("-o", tmp_path / "out")
    refused(overhaul("learn", "export", learnt, "--task", "inverse", *out), "no task 'inverse'", "invert")
    refused(overhaul("learn", "export", vit, "--task", "plain", *out), "has no banks")
    refused(overhaul("learn", "export", learnt, "--task", "plain", "-o", learnt), "inside the model that is read")
    flags = ("--tasks", bars, "--variants", "plain", "--steps", "1", "--batch-size", "8")
    cnn = write_cnn(tmp_path / "cnn")
    assert overhaul("learn", "clr", cnn, "-o", tmp_path / "clr", *flags).code == 0
    refused(overhaul("learn", "export", tmp_path / "clr", "--task", "plain", *out), "banks of clr cannot be put into")
    assert not (tmp_path / "out").exists()


def test_mistakes(learnt: Path, vit: Path, bars: Path, tmp_path: Path):
    how = ("-o", tmp_path / "out", "--tasks", bars)
    refused(overhaul("learn", "contracon", vit, *how, "--kernel", "4"), "kernel 4 has no middle; use 3 or 5")
    refused(overhaul("learn", "contracon", vit, *how, "--kernel", "17"), "larger than a slice of 16")
    refused(overhaul("learn", "contracon", write_cnn(tmp_path / "cnn"), *how), "has no attention with query")
    refused(overhaul("learn", "contracon", learnt, *how, "--kernel", "7"), "learnt with kernel 5, and this is 7")
    refused(overhaul("learn", "clr", learnt, *how), "is a bank of contracon", "banks of clr")
    refused(overhaul("learn", "contracon", vit, *how, "--form", "gates", "--init", "parent"), "use init drawn")
    assert not (tmp_path / "out").exists()


def test_a_model_in_bf16(bars: Path, tmp_path: Path):
    vit = write_vit(tmp_path / "vit", dtype="bfloat16")
    flags = ("--tasks", bars, "--split", "2", "--steps", "3", "--batch-size", "8", "--kernel", "3", "--views", "1")
    done = overhaul("learn", "contracon", vit, "-o", tmp_path / "out", *flags)
    assert done.code == 0, done.err

    made = artifact.load(tmp_path / "out", kinds=(Kind.IMAGE_CLASSIFIER,), dtype=torch.float32)
    banked = Banked(made.model, ConTraCon(kernel=3).sockets())
    banked.read(tmp_path / "out")
    assert made.dtype == torch.bfloat16
    assert len(banked.banks) == 2
