"""What is drawn and said of tasks: every entry of a matrix, a curve for each task, methods side by side."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from overhaul.forgetting import AccuracyMatrix
from overhaul.report.facts import Facts, Report
from overhaul.report.html import html_learnt, html_report
from overhaul.report.sentences import comparison_sentence, verdict
from overhaul.report.tasks import (
    Learnt,
    as_points,
    average_figures,
    cost_notes,
    costs_note,
    course_figure,
    kept_notes,
    lines,
    matrix_figure,
    metric_rows,
    metrics_note,
    sentence,
)
from overhaul.table import Row
from overhaul.task_record import KINDS, METRICS, TaskCost, TaskRecord, measured

NAMES = ("zero & one", "two")
BEFORE = [[0.5, 0.5], [1.0, np.nan], [0.25, 0.75]]


def matrix(values: Any = BEFORE, names: tuple[str, ...] = NAMES) -> AccuracyMatrix:
    return AccuracyMatrix(names, np.array(values), (2,) * len(names), (100,) * len(names))


def record(values: Any = BEFORE, *, seconds: float = 1.0) -> TaskRecord:
    cost: dict[str, Any] = {"steps": 10, "images": 320, "trained_parameters": 78_570}
    tasks = tuple(
        TaskCost(name=name, seconds=seconds, kept_bytes={"memory": 1000 * place}, **cost)
        for place, name in enumerate(NAMES)
    )
    return TaskRecord(matrices=dict.fromkeys(KINDS, matrix(values)), tasks=tasks)


def learnt(label: str, *runs: TaskRecord) -> Learnt:
    rows = tuple(
        Row(model=label, metric=metric.full_name, value=value, low=value - 0.1, high=value + 0.1, count=200)
        for metric, value in measured(runs[0])
    )
    seeds = tuple(range(len(runs)))
    return Learnt(label=label, runs=runs, paths=(label,), seeds=seeds, settings={"alpha": 0.5}, rows=rows)


def test_a_matrix_is_drawn_entry_for_entry():
    drawn = matrix_figure(matrix(), "class-IL")

    assert re.findall(r'fill-opacity="([\d.]+)"', drawn.svg) == ["0.500", "0.500", "1.000", "0.250", "0.750"]
    assert "<title>after 2: two, zero &amp; one: 25.0%</title>" in drawn.svg
    assert drawn.title == "class-IL: 50.0% at the end, from 25.0% (zero & one) to 75.0% (two)"
    assert drawn.rows[1] == ("after 1: zero & one", "100%", "")
    assert drawn.csv.splitlines()[-1] == "after 2: two,0.25,0.75"


def test_what_was_before_any_task_has_no_row_where_it_was_not_measured():
    assert len(matrix_figure(matrix(BEFORE[1:]), "task-IL").rows) == 2


@pytest.mark.parametrize("count", [2, 20])
def test_names_that_do_not_fit_above_their_column_are_numbers(count: int):
    names = tuple(f"permute={number}" for number in range(count))
    values = np.where(np.tril(np.ones((count, count))) > 0, 0.5, np.nan)

    svg = matrix_figure(matrix(values, names), "class-IL").svg

    assert ">1</text>" in svg
    assert svg.count('class="strong"') == count * (count + 1) / 2, "dark text on pale cells"
    assert svg.count(">permute=0</text>") == 0
    assert svg.count('class="cell"') == count * (count + 1) / 2


def test_a_task_has_a_curve_from_when_it_was_learnt():
    drawn = course_figure(matrix(), "class-IL")

    assert drawn.title == "class-IL: zero & one lost most, from 100% to 25.0%"
    assert drawn.header == ("tasks learnt", *NAMES)
    assert drawn.rows == (("1", "1.000", "n/a"), ("2", "0.2500", "0.7500"))
    assert ">1.5</text>" not in drawn.svg, "there is no time between two tasks"


def test_nothing_lost_and_one_task_are_said():
    assert course_figure(matrix([[0.5, np.nan], [0.6, 0.7]]), "task-IL").title.endswith("no task is below what it was "
                                                                                       "when learnt")  # fmt: skip
    assert course_figure(matrix([[0.5]], ("one",)), "class-IL").svg.count("<circle") == 1


def test_every_definition_and_every_cost_has_its_place():
    metrics, costs = metrics_note(record()), costs_note(record())

    assert {row[0] for row in metrics.rows} == {metric.name for metric in METRICS} - {"forward transfer"}
    assert ("forgetting", "75.0%", "75.0%", "", "lower") in metrics.rows
    assert ("local forgetting", "", "-75.0%", "", "higher") in metrics.rows
    assert costs.rows[1] == ("two", "10", "320", "1.0 s", "78.57 K", "1.00 kB", "memory 1.00 kB")
    assert costs.rows[-1] == ("all", "20", "640", "2.0 s", "", "", "")


def test_several_seeds_are_drawn_by_their_mean():
    two = learnt("er", record(seconds=1.0), record([[0.5, np.nan], [0.75, 0.25]], seconds=3.0))

    assert two.matrix("class-IL").values[1].tolist() == [0.5, 0.5]
    assert two.per_task(lambda task: task.seconds) == [2.0, 2.0]


def test_methods_stand_side_by_side():
    one, other = learnt("er", record()), learnt("none", record([[1.0, np.nan], [0.0, 0.75]]))

    by_class, by_task = average_figures([one, other])
    rows = {name: [row and row.value for row in found] for name, found, _ in metric_rows([one, other])}
    times = {note.title: note for note in cost_notes([one, other])}["Time"]

    assert by_class.header == by_task.header == ("tasks learnt", "er", "none")
    assert by_class.title == "class-IL: er ends at 50.0%"
    assert rows["average accuracy, class-IL"] == [0.5, 0.375]
    assert rows["forgetting, task-IL"] == [0.75, 1.0]
    assert times.rows[-1] == ("all", "2.0 s", "2.0 s")
    assert sentence([other, one]) == "er knows 50.0% of all tasks at the end, none 37.5%."
    (kept,) = kept_notes([one, other])
    assert kept.rows == (("er", "1.00 kB"), ("none", "1.00 kB"))


def test_few_methods_have_a_column_in_the_terminal_and_many_a_row():
    few, many = (lines([learnt(f"m{number}", record()) for number in range(count)]) for count in (4, 5))

    assert few[0].split() == ["m0", "m1", "m2", "m3"]
    assert few[1].split("  ")[0] == "average accuracy, class-IL"
    assert few[1].count("50.0% [40.0%, 60.0%]") == 4
    assert len(few) == 1 + len(measured(record())) + 3
    assert [line.split()[0] for line in many[1:]] == ["m0", "m1", "m2", "m3", "m4"]


def test_the_page_of_several_methods_has_every_number():
    methods = [learnt("a <b>", record(), record(seconds=2.0)), learnt("none", record([[1.0, np.nan], [0.0, 0.75]]))]

    page = html_learnt(methods, command="overhaul learn report", environment={"torch": "2"})

    assert "<b>" not in page
    assert page.count("%]</small></td>") == sum(len(one.rows) for one in methods)
    assert "<td>37.5%<small>[27.5%, 47.5%]</small></td>" in page
    assert page.count("<figure>") == 2 + 2 * 2
    assert "a &lt;b&gt; (2 seeds)" in page
    assert "of several seeds the lowest and the highest" in page
    assert "http" not in page.replace("http://www.w3.org", "")


def test_what_rounds_to_nothing_has_no_sign():
    assert [as_points(value) for value in (-1e-9, -0.125, 1.0)] == ["0.0%", "-12.5%", "100.0%"]


def test_the_report_of_a_run_has_its_tasks_and_says_what_is_known():
    known = Row(model="m", metric="accuracy, class-IL", value=0.5, low=0.4, high=0.6, count=200)
    facts = tuple(
        Facts(label=label, path=label, parameters=9, kind="image classifier") for label in ("dense", "learnt")
    )
    facts = (facts[0], replace(facts[1], metrics=(known,)))
    page = html_report(Report(title="t", facts=facts, tasks=record()))

    assert 'id="tasks"' in page
    assert page.count("What each task took") == 2, "a heading, and a name for screen readers"
    assert "Prefill" not in page
    assert verdict(facts) == "After all tasks the accuracy of learnt is 50.0% class-IL."
    assert comparison_sentence(facts) == "learnt knows most of the tasks: 50.0% class-IL."
    assert comparison_sentence(facts[:1] * 2).startswith("2 classifiers are shown side by side; no record")
