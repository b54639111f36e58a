"""Runs of tasks side by side: which runs are one method, intervals, and which directories are refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from command import overhaul, refused
from images import write_bars, write_cnn
from overhaul import learn_report
from overhaul.evaluate import wilson_interval
from overhaul.forgetting import AccuracyMatrix
from overhaul.learn_report import mean_interval, report
from overhaul.task_record import METRICS

HOW = ("--split", "2", "--batch-size", "8", "--epochs", "1", "--dtype", "fp32")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def bars(root: Path) -> Path:
    return write_bars(root / "bars.npz")


def learn(out: Path, bars: Path, *flags: object, seed: int = 0, begin: int = 0, how: tuple[str, ...] = HOW) -> Path:
    cnn = out.parent / f"cnn-{begin}"
    if not cnn.exists():
        write_cnn(cnn, seed=begin)
    done = overhaul("learn", "bregman", cnn, "-o", out, "--tasks", bars, "--seed", seed, *how, *flags)
    assert done.code == 0, done.err
    return out


@pytest.fixture(scope="module")
def made(root: Path, bars: Path) -> dict[str, str]:
    """`er-0` and `er-1` differ in the seed, and in the model they began with; `none` is another method."""
    runs = {
        "er-0": learn(root / "er-0", bars, "--output-term", "er", seed=0),
        "er-1": learn(root / "er-1", bars, "--output-term", "er", seed=1, begin=1),
        "none": learn(root / "none", bars, "--output-term", "none"),
    }
    return {name: str(path) for name, path in runs.items()}


def damaged(made: dict[str, str], tmp_path: Path) -> Path:
    return shutil.copytree(made["none"], tmp_path / "damaged")


# Which runs are one method.


def test_seeds_of_one_method_are_joined(made: dict[str, str]):
    er, none = report(list(made.values()))

    assert (er.label, er.seeds, er.paths) == ("er", (0, 1), (made["er-0"], made["er-1"]))
    assert (none.label, none.seeds) == ("none", (0,))
    assert er.settings == {"output_term": "er"}
    assert none.settings == {"output_term": "none"}


def test_a_metric_of_several_seeds_is_their_mean_lowest_and_highest(made: dict[str, str]):
    (one,), (other,) = report([made["er-0"]]), report([made["er-1"]])
    (both,) = report([made["er-0"], made["er-1"]])

    for row, first, second in zip(both.rows, one.rows, other.rows, strict=True):
        assert row.value == pytest.approx((first.value + second.value) / 2)
        assert {row.low, row.high} == {min(first.value, second.value), max(first.value, second.value)}
        assert row.count == 2
    assert {row.metric for row in both.rows} <= {metric.full_name for metric in METRICS}


def test_the_same_seed_on_another_model_is_another_method(root: Path, bars: Path, made: dict[str, str]):
    other = str(learn(root / "er-other", bars, "--output-term", "er", seed=0, begin=1))

    found = report([made["er-0"], other, made["er-1"]])

    assert [one.paths for one in found] == [(made["er-0"],), (other, made["er-1"])]
    assert [one.label for one in found] == ["er-0", "er"]


def test_a_run_that_was_copied_is_not_a_seed_and_one_named_twice_counts_once(made: dict[str, str], tmp_path: Path):
    copy = str(shutil.copytree(made["none"], tmp_path / "copy"))

    assert [one.label for one in report([made["none"], copy])] == ["none", "copy"]
    assert len(report([made["none"], made["none"]])) == 1


def test_directories_of_one_name_are_told_apart(made: dict[str, str], tmp_path: Path):
    places = [tmp_path / method / seed for method, seed in (("er", "0"), ("er", "1"), ("none", "0"))]
    for place, run in zip(places, made.values(), strict=True):
        shutil.copytree(run, place)

    assert [one.label for one in report(list(map(str, places)))] == ["er", "none/0"]


# Intervals.


def test_the_interval_of_one_task_is_wilsons_and_that_of_equal_tasks_shrinks():
    def equal(count: int) -> AccuracyMatrix:
        values = np.where(np.tril(np.ones((count, count))) > 0, 0.8, np.nan)
        return AccuracyMatrix(tuple(map(str, range(count))), values, (2,) * count, (100,) * count)

    low, high = wilson_interval(80, 100)
    assert mean_interval(equal(1)) == pytest.approx((low, high))
    # Of n equal independent values the mean's distances are 1 / sqrt(n) of each one's.
    assert mean_interval(equal(4)) == pytest.approx((0.8 - (0.8 - low) / 2, 0.8 + (high - 0.8) / 2))


# The command.


def test_the_command_writes_a_page_and_prints_every_metric(made: dict[str, str], tmp_path: Path):
    done = overhaul("learn", "report", *made.values(), "-o", tmp_path / "page.html")

    assert done.code == 0, done.err
    assert done.out.splitlines()[0].split() == ["er", "(2", "seeds)", "none"]
    assert "global forgetting, as learnt" in done.out
    assert "time, all tasks" in done.out
    page = (tmp_path / "page.html").read_text()
    assert page.count("<figure>") == 2 + 4
    assert "er (2 seeds)" in page


def test_json_has_every_row_and_every_run(made: dict[str, str], tmp_path: Path):
    done = overhaul("learn", "report", *made.values(), "-o", tmp_path / "page.html", "--json")
    told = json.loads(done.out)

    methods = report(list(made.values()))
    assert told == json.loads(json.dumps(learn_report.to_json(methods)))
    assert len(told["rows"]) == sum(len(one.rows) for one in methods)
    assert [run["directory"] for one in told["methods"] for run in one["runs"]] == list(made.values())


def test_help_names_it_beside_the_methods():
    assert "report" in overhaul("learn").out
    assert "learn report" in overhaul("--help").out


def test_directories_that_cannot_be_compared_are_one_clear_error(
    made: dict[str, str], root: Path, bars: Path, tmp_path: Path
):
    def told(*paths: object) -> Any:
        return overhaul("learn", "report", *paths, "-o", tmp_path / "page.html")

    refused(told(root / "cnn-0"), "cnn-0 has no tasks.json", "directories that overhaul learn wrote")
    refused(told(tmp_path / "nowhere"), "nowhere is no directory")
    refused(told(), "no directory is named")
    four = learn(root / "four", bars, how=("--split", "4", *HOW[2:]))
    refused(told(made["none"], four), "learnt different tasks: 2 and 4 tasks")
    order = learn(root / "order", bars, "--order", "3")
    refused(told(made["none"], order), "learnt different tasks: task 1 is")
    pixels = learn(root / "pixels", write_bars(root / "others.npz", seed=1))
    refused(told(made["none"], pixels), "the same names, but other examples in")
    broken = damaged(made, tmp_path)
    (broken / "tasks.json").write_text('{"format": 1')
    refused(told(broken), "is not valid JSON")
    (broken / "tasks.json").write_text('{"class-IL": {}}')
    refused(told(made["none"], broken), "tasks.json is damaged: a record of tasks: without format, matrices, tasks")
    assert not (tmp_path / "page.html").exists()


def test_a_record_without_a_learning_step_is_refused(made: dict[str, str], tmp_path: Path):
    broken = damaged(made, tmp_path)
    record = json.loads((broken / "overhaul.json").read_text())
    (broken / "overhaul.json").write_text(json.dumps({**record, "lineage": []}))

    refused(overhaul("learn", "report", broken, "-o", tmp_path / "page.html"), "no step learnt tasks")
    (broken / "overhaul.json").unlink()
    refused(overhaul("learn", "report", broken, "-o", tmp_path / "page.html"), "has no overhaul.json")


def test_nothing_is_overwritten(made: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    assert overhaul("learn", "report", made["none"]).code == 0

    refused(overhaul("learn", "report", made["none"]), "-o report.html exists")
    refused(overhaul("learn", "report", made["none"], "-o", tmp_path / "no" / "page.html"), "there is no directory")
