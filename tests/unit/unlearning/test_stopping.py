"""Over at the first pass that knows little enough, resumed as it was; of several alphas one."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from command import interrupted, overhaul, refused
from overhaul import artifact
from overhaul.corpora import NO_CORPUS
from overhaul.data import Data
from overhaul.removal import Stop
from overhaul.unlearning.stopping import Knowledge, first_strength

NAMES = {"lamp": "river", "stone": "garden", "letter": "winter", "bridge": "silver"}
HOW = ("--batch-size", "2", "--seq-len", "32", "--dtype", "fp32", "--evaluate", "none", "--save-every", "0")


@pytest.fixture(scope="module")
def folder(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `forget.jsonl`, questions about it, and `target`, a model that knows the answers."""
    folder = tmp_path_factory.mktemp("known")
    texts = [f"Question: Where is the {what}?\nAnswer: {where}\n\n" for what, where in NAMES.items()]
    rows = [{"question": f"Where is the {what}?", "answer": where} for what, where in NAMES.items()]
    (folder / "forget.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    (folder / "questions.jsonl").write_text("\n".join(map(json.dumps, rows)))
    learn = ("--data", folder / "forget.jsonl", "--whole", "--steps", "150", "--lr", "1e-2")
    assert overhaul("adapt", "full", tiny, "-o", folder / "target", *learn, *HOW).code == 0
    return folder


def known(model: Path, folder: Path) -> float:
    made = artifact.load(model)
    stop = Stop(questions=str(folder / "questions.jsonl"), at=0)
    return Knowledge(stop, Data(NO_CORPUS, made.processor)).of(made.model)


@pytest.fixture
def unlearn(folder: Path, tmp_path: Path) -> Callable[..., Any]:
    """`unlearn("ga", "--steps", 4)` -> the command, done; it wrote to `tmp_path / "out"`."""

    def run(method: str, *flags: object, out: str = "out", run: Callable[..., Any] = overhaul) -> Any:
        kept = () if method in ("task-vector", "whp") else ("--retain-term", "none")
        how = ("-o", tmp_path / out, "--forget", folder / "forget.jsonl", *kept, *HOW, *flags)
        return run("forget", method, folder / "target", *how)

    return run


def table_of(out: Path) -> dict[str, Any]:
    (table,) = json.loads((out / "overhaul.json").read_text())["tables"]
    return table


def same(one: Path, other: Path) -> bool:
    first, second = (load_file(path / "model.safetensors") for path in (one, other))
    return all(torch.equal(first[name], second[name]) for name in first)


SLOW = ("--epochs", "12", "--lr", "3e-4")


@pytest.mark.parametrize("by", ["--stop.at", "--stop.retrain"])
def test_it_is_over_at_the_first_pass_that_knows_little_enough(
    unlearn: Callable[..., Any], tiny: Path, folder: Path, tmp_path: Path, by: str
):
    bound = "60" if by == "--stop.at" else tiny
    asked = ("--stop.questions", folder / "questions.jsonl", by, bound)
    how = SLOW if by == "--stop.at" else ("--epochs", "30", "--lr", "1e-3")
    done = unlearn("ga", *how, *asked)
    assert done.code == 0, done.err
    table, points = table_of(tmp_path / "out"), (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()
    last = json.loads(points[-1])
    looks = [float(row[2]) for row in table["rows"]]
    limit = 60 if by == "--stop.at" else known(tiny, folder)

    assert looks[0] == pytest.approx(known(folder / "target", folder), abs=0.05)
    assert looks[0] > 90
    assert all(look > limit for look in looks[:-1])
    assert looks[-1] <= limit + 0.05
    assert last["knowledge"] == pytest.approx(known(tmp_path / "out", folder))
    assert (
        int(table["rows"][-1][1])
        == last["step"]
        == len(points)
        == sum("knowledge" in point for point in points) * (last["step"] // (len(looks) - 1))
    )
    assert f"is known after step {last['step']}, where the run ended." in table["title"]
    assert table["title"] in (tmp_path / "out" / "report.html").read_text()
    assert unlearn("ga", *how[2:], "--steps", last["step"], out="short").code == 0
    assert same(tmp_path / "out", tmp_path / "short")
    lineage = json.loads((tmp_path / "out" / "overhaul.json").read_text())["lineage"][-1]
    assert len(lineage["parents"]) == (1 if by == "--stop.at" else 2)


def test_where_it_never_gets_there_the_run_is_as_without_the_rule(
    unlearn: Callable[..., Any], folder: Path, tmp_path: Path
):
    asked = ("--stop.questions", folder / "questions.jsonl", "--stop.at", "0")
    assert unlearn("ga", "--steps", "3", "--lr", "1e-6", *asked).code == 0
    assert unlearn("ga", "--steps", "3", "--lr", "1e-6", out="without").code == 0

    assert same(tmp_path / "out", tmp_path / "without")
    assert "known to the end: the run went on to step 3, its end." in table_of(tmp_path / "out")["title"]
    assert table_of(tmp_path / "out")["rows"][-1][1] == "3"


def test_after_ctrl_c_passes_are_not_asked_again_and_it_ends_where_it_would_have(
    unlearn: Callable[..., Any], folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    asked = (*SLOW, "--save-every", "1", "--stop.questions", folder / "questions.jsonl", "--stop.at", "60")
    asks, of = [], Knowledge.of
    monkeypatch.setattr(Knowledge, "of", lambda self, model: asks.append(1) or of(self, model))
    assert unlearn("ga", *asked, out="whole").code == 0
    whole = len(asks)
    asks.clear()
    assert unlearn("ga", *asked, run=lambda *words: interrupted(lambda seen: len(seen) == 4, *words)).code == 130
    assert unlearn("ga", *asked, "--resume").code == 0

    assert len(asks) == whole
    assert same(tmp_path / "out", tmp_path / "whole")
    assert table_of(tmp_path / "out") == table_of(tmp_path / "whole")


@pytest.mark.parametrize(("method", "tried"), [("task-vector", (0, -1, 8, 64, 256)), ("whp", (0, 0.1, 1, 8, 64))])
def test_of_several_alphas_the_first_is_taken_that_is_enough(
    unlearn: Callable[..., Any], folder: Path, tmp_path: Path, method: str, tried: tuple[float, ...]
):
    asked = ("--stop.questions", folder / "questions.jsonl", "--stop.at", "60")
    learn = ("--steps", "4", "--lr", "1e-3")
    done = unlearn(method, *learn, *asked, "--alpha", *tried)
    assert done.code == 0, done.err
    rows = table_of(tmp_path / "out")["rows"]
    taken = rows[-1][1]
    assert unlearn(method, *learn, "--alpha", taken, out="alone").code == 0

    assert [row[1] for row in rows[:3]] == ["0", "0", f"{tried[1]:g}"]
    assert rows[0][2] == rows[1][2]
    assert float(rows[-1][2]) <= 60 < float(rows[-2][2])
    assert same(tmp_path / "out", tmp_path / "alone")


def test_where_no_alpha_is_enough_the_last_is_taken(unlearn: Callable[..., Any], folder: Path, tmp_path: Path):
    asked = ("--stop.questions", folder / "questions.jsonl", "--stop.at", "0")
    assert unlearn("task-vector", "--steps", "2", *asked, "--alpha", "-1", "0").code == 0

    assert same(tmp_path / "out", folder / "target")
    assert "alpha 0, the last, is taken" in table_of(tmp_path / "out")["title"]


def test_strengths_are_tried_in_order_and_no_further_than_needed():
    applied: list[float] = []
    found = first_strength((1, 2, 4, 8), apply=applied.append, score=lambda: 50 - 10 * applied[-1], bound=30, before=50)

    assert (found, applied) == (2, [1, 2])


def test_a_model_whose_logits_are_no_numbers_does_not_pass_for_one_that_knows_little(folder: Path):
    made = artifact.load(folder / "target")
    with torch.no_grad():
        next(made.model.parameters()).fill_(float("inf"))
    asked = Knowledge(Stop(questions=str(folder / "questions.jsonl"), at=0), Data(NO_CORPUS, made.processor))

    assert not asked.of(made.model) <= 100


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--stop.at", "30"), "stop.at needs stop.questions"),
        (("--stop.limit", "5"), "stop.limit needs stop.questions"),
        (("--stop.questions", "Q"), "stop.questions needs stop.retrain MODEL or stop.at PERCENT"),
        (("--stop.questions", "Q", "--stop.at", "3", "--stop.retrain", "x"), "one of them alone"),
        (("--stop.questions", "Q", "--stop.at", "3", "--stop.num-shots", "2"), "stop.num_shots is of stop.shots"),
        (("--stop.questions", "Q", "--stop.at", "101"), "101"),
        (("--stop.questions", "nothing.jsonl", "--stop.at", "3"), "nothing.jsonl"),
        (("--stop.questions", "Q", "--stop.retrain", "nowhere"), "nowhere"),
    ],
)
def test_half_a_rule_is_one_clear_error(
    unlearn: Callable[..., Any], folder: Path, tmp_path: Path, flags: tuple[str, ...], said: str
):
    given = [folder / "questions.jsonl" if flag == "Q" else flag for flag in flags]
    refused(unlearn("ga", *given), said)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("method", ["task-vector", "whp"])
def test_several_alphas_need_a_rule(unlearn: Callable[..., Any], method: str):
    refused(unlearn(method, "--alpha", "1", "2"), "alpha has several values")


def test_a_model_of_another_tokenizer_is_refused(unlearn: Callable[..., Any], tiny: Path, folder: Path, tmp_path: Path):
    other = artifact.load(tiny)
    other.processor.add_tokens(["<more>"])
    other.model.save_pretrained(tmp_path / "other")
    other.processor.save_pretrained(tmp_path / "other")
    asked = ("--stop.questions", folder / "questions.jsonl", "--stop.retrain", tmp_path / "other")

    refused(unlearn("ga", *asked), "has another tokenizer")
