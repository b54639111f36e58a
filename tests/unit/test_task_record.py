"""The record of a run of tasks: there and back, every definition, and what is said of a damaged one."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from overhaul import task_record
from overhaul.errors import UserError
from overhaul.forgetting import AccuracyMatrix
from overhaul.task_record import KINDS, TaskCost, TaskRecord, accuracy_so_far, difference, measured

BY_HAND = [[0.5, 0.3, 0.2], [0.8, 0.4, 0.2], [0.9, 0.7, 0.3], [0.6, 0.6, 0.9]]


def matrix(values: Any = BY_HAND, names: tuple[str, ...] = ("digits", "letters", "signs")) -> AccuracyMatrix:
    count = len(names)
    return AccuracyMatrix(names, np.array(values), (2, 3, 5)[:count], (100, 100, 200)[:count])


def record(**matrices: AccuracyMatrix) -> TaskRecord:
    first = next(iter(matrices.values()), matrix())
    cost: dict[str, Any] = {"steps": 4, "images": 32, "seconds": 1.5, "trained_parameters": 10}
    tasks = tuple(TaskCost(name=name, kept_bytes={"memory": 7, "old model": 5}, **cost) for name in first.names)
    return TaskRecord(matrices=dict.fromkeys(KINDS, first), tasks=tasks)


def named(run: TaskRecord) -> dict[str, float]:
    return {metric.full_name: value for metric, value in measured(run)}


def test_there_and_back(tmp_path: Path):
    stored = record().to_json()
    (tmp_path / "tasks.json").write_text(json.dumps(stored))

    read = task_record.read(tmp_path)

    assert read.to_json() == stored
    assert read.tasks == record().tasks
    assert read.tasks[0].all_kept_bytes == 12


def test_definitions_that_say_the_same_agree():
    found = named(record())

    for kind in ("class-IL", "task-IL"):
        assert found[f"forgetting since learnt, {kind}"] == -found[f"backward transfer, {kind}"]
    assert found["local forgetting, task-IL"] == found["backward transfer, task-IL"]
    assert accuracy_so_far(matrix())[-1] == pytest.approx(found["average accuracy, class-IL"])


def test_values_are_those_of_the_worked_example():
    found = named(record())

    wanted = {
        "average accuracy, class-IL": 0.7,
        "accuracy over all examples, task-IL": 0.75,
        "forward transfer, task-IL": 0.1,
        "forgetting, class-IL": 0.2,
        "global forgetting, as learnt": 0.015,
        "consecutive forgetting, as learnt": 0.05,
    }
    assert {name: found[name] for name in wanted} == pytest.approx(wanted)
    assert len(found) == len(task_record.METRICS)


def test_what_was_not_measured_or_needs_two_tasks_is_left_out():
    one = named(record(only=matrix([[0.9]], ("digits",))))
    below = named(record(below=matrix([[0.8, np.nan, np.nan], [0.9, 0.7, np.nan], [0.6, 0.6, 0.9]])))

    assert {name.split(",")[0] for name in one} == {
        "average accuracy", "accuracy over all examples", "average incremental accuracy", "learning accuracy",
    }  # fmt: skip
    assert "forward transfer, task-IL" not in below
    assert len(below) == len(task_record.METRICS) - 1


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda told: told.pop("matrices"), "without matrices"),
        (lambda told: told.update(format=0), "in format 0"),
        (lambda told: told["matrices"].pop("task-IL"), "without all matrices"),
        (lambda told: told["matrices"]["class-IL"].pop("values"), "without values"),
        (lambda told: told["matrices"]["class-IL"]["values"][3].__setitem__(0, 2.0), "an accuracy of 2"),
        (lambda told: told["matrices"]["task-IL"]["values"][3].__setitem__(0, None), "is missing"),
        (lambda told: told["matrices"]["as learnt"].update(num_classes=[2, 3, 4]), "num_classes of the tasks differ"),
        (lambda told: told["tasks"].pop(), "costs of tasks"),
        (lambda told: told["tasks"][1].pop("steps"), "a task without steps"),
        (lambda told: told["tasks"][1].update(seconds="long"), "no numbers"),
        (lambda told: told["tasks"][1].update(kept_bytes={"memory": -1}), "no numbers"),
        (lambda told: told.update(tasks="none"), "costs of tasks"),
    ],
)
def test_a_damaged_record_is_one_clear_error(damage: Callable[[Any], Any], says: str, tmp_path: Path):
    told = json.loads(json.dumps(record().to_json()))
    damage(told)
    (tmp_path / "tasks.json").write_text(json.dumps(told))

    with pytest.raises(UserError, match=f"tasks.json is damaged.*{says}"):
        task_record.read(tmp_path)


def test_no_record_and_no_json_are_told_apart(tmp_path: Path):
    with pytest.raises(UserError, match=r"has no tasks\.json"):
        task_record.read(tmp_path)
    (tmp_path / "tasks.json").write_text("{")
    with pytest.raises(UserError, match="is not valid JSON"):
        task_record.read(tmp_path)
    (tmp_path / "tasks.json").write_text("[]")
    with pytest.raises(UserError, match="no JSON object"):
        task_record.read(tmp_path)


def test_the_difference_of_two_runs_is_named():
    other = AccuracyMatrix(matrix().names, matrix().values, (2, 3, 5), (100, 90, 200))

    assert difference(matrix(), matrix()) == ""
    assert difference(matrix(), matrix([[0.9]], ("digits",))) == "3 and 1 tasks"
    assert difference(matrix(), matrix(names=("digits", "marks", "signs"))) == "task 2 is letters and marks"
    assert difference(matrix(), other) == "task letters has 100 and 90 held-out examples"
