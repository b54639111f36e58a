"""What became of tasks that were learnt one after the other: heat maps, curves, every metric, costs."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean

import numpy as np

from overhaul.forgetting import AccuracyMatrix
from overhaul.journal import TableNote
from overhaul.report.facts import ACCURACY_OF
from overhaul.report.figures import grid_map
from overhaul.report.findings import Figure, as_csv, curve_figure
from overhaul.report.numbers import MISSING, as_count, as_duration, as_percent, as_place, as_size
from overhaul.report.tables import MOST_SIDE_BY_SIDE, aligned
from overhaul.table import Curve, Row
from overhaul.task_record import (
    ACCURACY,
    CLASS_IL,
    KINDS,
    METRICS,
    OVER_ALL,
    TASK_IL,
    TaskCost,
    TaskRecord,
    accuracy_so_far,
    measured,
)

MEANINGS = {
    CLASS_IL: "The model chooses among the classes of all tasks until then.",
    TASK_IL: "The model is told the task, and chooses among its classes.",
}
BETTER = {"more": "higher", "less": "lower"}
TIMES = "tasks learnt"
MOST_BESIDE = 10
"""Heat maps of more tasks are too small beside each other."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Learnt:
    """A method that learnt the tasks, once or with several seeds.

    Attributes:
        label: of its column.
        runs: one record a seed, all of the same tasks.
        paths, seeds: of the runs.
        settings: those in which the methods of a report differ.
        rows: every metric under its full name; the interval is that over seeds, lowest to highest, where there are
            several, else over examples, where one is known.
    """

    label: str
    runs: tuple[TaskRecord, ...]
    paths: tuple[str, ...]
    seeds: tuple[int | None, ...]
    settings: Mapping[str, object]
    rows: tuple[Row, ...]

    def matrix(self, kind: str) -> AccuracyMatrix:
        """The mean over runs; of what was measured before any training nothing."""
        first = self.runs[0].matrices[kind]
        values = np.mean([run.matrices[kind].values[-first.num_tasks :] for run in self.runs], axis=0)
        return AccuracyMatrix(first.names, values, first.num_classes, first.num_examples)

    def row(self, full_name: str) -> Row | None:
        """One metric; None where it was not measured."""
        return next((row for row in self.rows if row.metric == full_name), None)

    def per_task(self, number: Callable[[TaskCost], float]) -> list[float]:
        """The mean over runs of a cost of each task."""
        return [fmean(map(number, costs)) for costs in zip(*(run.tasks for run in self.runs), strict=True)]


COSTS: tuple[tuple[str, Callable[[TaskCost], float], Callable[[float | None], str]], ...] = (
    ("steps", lambda task: task.steps, lambda value: as_place(value or 0)),
    ("read", lambda task: task.images, lambda value: as_place(value or 0)),
    ("time", lambda task: task.seconds, as_duration),
    ("trained parameters", lambda task: task.trained_parameters, as_count),
    ("kept from then on", lambda task: task.all_kept_bytes, as_size),
)
"""Of each task: what it is called, where it stands, how it is written."""
ADDED = ("steps", "read", "time")
"""Costs whose sum over tasks means something."""


def cost_name(name: str, record: TaskRecord) -> str:
    """A cost's name; what was read is told by what it is."""
    return f"{record.tasks[0].unit} read" if name == "read" and record.tasks else name


def matrix_figure(matrix: AccuracyMatrix, kind: str, label: str = "") -> Figure:
    """The heat map of a matrix: a row for each time, a column for each task."""
    numbered = [f"{number}: {name}" for number, name in enumerate(matrix.names, 1)]
    times = [number for number in range(matrix.num_tasks + 1) if any(_measured(matrix, number))]
    values_RC = [
        [matrix.accuracy(after, on) if matrix.has(after, on) else None for on in range(1, matrix.num_tasks + 1)]
        for after in times
    ]
    rows = [f"after {numbered[after - 1]}" if after else "before any" for after in times]
    header = ("", *matrix.names)
    return Figure(
        title=f"{label}: {kind}" if label else _finding(matrix, kind),
        caption=f"{MEANINGS[kind]} Accuracy in percent on the task of the column, at the time of the row.",
        svg=grid_map(values_RC, rows, matrix.names, title=f"{label} {kind}: accuracy on tasks over time", corner="on"),
        header=header,
        rows=tuple((row, *(_shown(value) for value in values)) for row, values in zip(rows, values_RC, strict=True)),
        csv=as_csv(header, [(row, *("" if value is None else repr(value) for value in values))
                            for row, values in zip(rows, values_RC, strict=True)]),
        file_name=re.sub(r"[^\w.]+", "-", f"{label} {kind}".strip()) + ".csv",
    )  # fmt: skip


def _measured(matrix: AccuracyMatrix, after: int) -> list[bool]:
    return [matrix.has(after, on) for on in range(1, matrix.num_tasks + 1)]


def _shown(value: float | None) -> str:
    return "" if value is None else as_percent(value)


def _finding(matrix: AccuracyMatrix, kind: str) -> str:
    """Where the accuracies are in the end."""
    last = {name: matrix.accuracy(matrix.num_tasks, on) for on, name in enumerate(matrix.names, 1)}
    mean = f"{kind}: {as_percent(fmean(last.values()))} at the end"
    if len(last) == 1:
        return mean
    worst, best = min(last, key=lambda name: last[name]), max(last, key=lambda name: last[name])
    return f"{mean}, from {as_percent(last[worst])} ({worst}) to {as_percent(last[best])} ({best})"


def course_figure(matrix: AccuracyMatrix, kind: str) -> Figure:
    """A curve for each task: the accuracy on it from when it was learnt."""
    last = matrix.num_tasks
    curves = []
    for on, name in enumerate(matrix.names, 1):
        times = range(on, last + 1)
        x, y = tuple(map(float, times)), tuple(matrix.accuracy(after, on) for after in times)
        curves.append(Curve(name=name, x=x, y=y, x_label=TIMES, y_label=f"accuracy, {kind}", title=_fall(matrix, kind)))
    return curve_figure(curves)


def _fall(matrix: AccuracyMatrix, kind: str) -> str:
    """Which task lost most since it was learnt."""
    last = matrix.num_tasks
    lost = {on: matrix.accuracy(on, on) - matrix.accuracy(last, on) for on in range(1, last)}
    worst = max(lost, key=lambda on: lost[on], default=None)
    if worst is None or lost[worst] <= 0:
        return f"{kind}: no task is below what it was when learnt"
    then, now = as_percent(matrix.accuracy(worst, worst)), as_percent(matrix.accuracy(last, worst))
    return f"{kind}: {matrix.names[worst - 1]} lost most, from {then} to {now}"


def metrics_note(record: TaskRecord) -> TableNote:
    """Every definition of one run: a column for each kind of matrix."""
    found = {(metric.name, metric.kind): value for metric, value in measured(record)}
    names = {metric.name: BETTER[metric.better] for metric in METRICS}
    rows = tuple(
        (name, *(as_points(found[name, kind]) if (name, kind) in found else "" for kind in KINDS), better)
        for name, better in names.items()
        if any((name, kind) in found for kind in KINDS)
    )
    return TableNote(title="What was kept and what was forgotten", columns=("", *KINDS, "better"), rows=rows)


def costs_note(record: TaskRecord) -> TableNote:
    """What each task took, and what is kept from then on."""
    rows = [
        (task.name, *(text(number(task)) for _, number, text in COSTS), _kept(task.kept_bytes)) for task in record.tasks
    ]
    totals = ("all", *(text(sum(map(number, record.tasks))) if name in ADDED else "" for name, number, text in COSTS))
    columns = ("task", *(cost_name(name, record) for name, _, _ in COSTS), "of it")
    return TableNote(title="What each task took", columns=columns, rows=(*rows, (*totals, "")))


def _kept(kept_bytes: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {as_size(size)}" for name, size in kept_bytes.items())


# Several methods side by side.


def average_figures(methods: Sequence[Learnt]) -> list[Figure]:
    """The mean accuracy over the tasks so far, a curve for each method; once by class and once by task."""
    figures = []
    for kind in MEANINGS:
        at_end = {one.label: accuracy_so_far(one.matrix(kind))[-1] for one in methods}
        best = max(at_end, key=lambda label: at_end[label])
        title = f"{kind}: {best} ends at {as_percent(at_end[best])}"
        curves = []
        for one in methods:
            y = tuple(accuracy_so_far(one.matrix(kind)))
            x = tuple(float(time) for time in range(1, len(y) + 1))
            label = f"{ACCURACY}, {kind}"
            curves.append(Curve(name=one.label, x=x, y=y, x_label=TIMES, y_label=label, title=title))
        figures.append(curve_figure(curves))
    return figures


def metric_rows(methods: Sequence[Learnt]) -> list[tuple[str, list[Row | None], str]]:
    """(metric, its row of each method, which way is better) of every metric that one of them has."""
    found = [
        (metric.full_name, [one.row(metric.full_name) for one in methods], BETTER[metric.better]) for metric in METRICS
    ]
    return [(name, rows, better) for name, rows, better in found if any(rows)]


def as_points(value: float) -> str:
    """`83.0%`, `-12.5%`; what rounds to nothing has no sign."""
    return f"{value:.1%}".replace("-0.0%", "0.0%")


def metrics_table(methods: Sequence[Learnt]) -> TableNote:
    """Every metric with a column for each method."""
    rows = tuple(
        (name, *(as_points(row.value) if row else MISSING for row in found), better)
        for name, found, better in metric_rows(methods)
    )
    columns = ("", *(one.label for one in methods), "better")
    return TableNote(title="What was kept and what was forgotten", columns=columns, rows=rows)


def accuracy_rows(one: Learnt) -> tuple[Row, ...]:
    """The accuracies over all examples, as the table of a run calls them."""
    found = {kind: one.row(f"{OVER_ALL}, {kind}") for kind in MEANINGS}
    return tuple(replace(row, metric=f"{ACCURACY_OF}{kind}") for kind, row in found.items() if row)


def points_ends(row: Row) -> str:
    """`[78.8%, 86.5%]`, or nothing where there is no interval."""
    return "" if row.low == row.value == row.high else f"[{as_points(row.low)}, {as_points(row.high)}]"


def as_share(row: Row | None) -> str:
    """`83.0% [78.8%, 86.5%]`."""
    return MISSING if row is None else f"{as_points(row.value)} {points_ends(row)}".rstrip()


def cost_notes(methods: Sequence[Learnt]) -> list[TableNote]:
    """For each cost a table with a row for each task and a column for each method; means over seeds."""
    notes = []
    for name, number, text in COSTS:
        columns = [one.per_task(number) for one in methods]
        rows = [
            (task, *(text(round(costs[place], 3)) for costs in columns))
            for place, task in enumerate(methods[0].matrix(CLASS_IL).names)
        ]
        if name in ADDED:
            rows.append(("all", *(text(sum(costs)) for costs in columns)))
        called = cost_name(name, methods[0].runs[0])
        title = f"{called[0].upper()}{called[1:]}"
        notes.append(TableNote(title=title, columns=("task", *(one.label for one in methods)), rows=tuple(rows)))
    return notes


def kept_notes(methods: Sequence[Learnt]) -> list[TableNote]:
    """A table of what each method holds in the end, by what it is, means over seeds; none where all hold nothing."""
    held = [[run.tasks[-1].kept_bytes for run in one.runs] for one in methods]
    kinds = list(dict.fromkeys(kind for runs in held for kept in runs for kind in kept))
    rows = tuple(
        (one.label, *(as_size(fmean(kept.get(kind, 0) for kept in runs)) for kind in kinds))
        for one, runs in zip(methods, held, strict=True)
    )
    return [TableNote(title="Kept after the last task", columns=("method", *kinds), rows=rows)] if kinds else []


def runs_note(methods: Sequence[Learnt]) -> TableNote:
    """Which directories each method is, and how it was run."""
    rows = tuple(
        (
            one.label,
            ", ".join("n/a" if seed is None else str(seed) for seed in one.seeds),
            ", ".join(f"{name} {value}" for name, value in one.settings.items()),
            "; ".join(one.paths),
        )
        for one in methods
    )
    return TableNote(title="How each method was run", columns=("method", "seeds", "settings", "directories"), rows=rows)


def sentence(methods: Sequence[Learnt]) -> str:
    """Which method knows most in the end, and what the others do."""
    name = f"{ACCURACY}, {CLASS_IL}"
    known = sorted(((row, one) for one in methods if (row := one.row(name))), key=lambda pair: -pair[0].value)
    row, best = known[0]
    lead = f"{best.label} knows {as_points(row.value)} of all tasks at the end"
    if len(known) == 1:
        told = best.row(f"{ACCURACY}, {TASK_IL}")
        return f"{lead}, {as_points(told.value)} where the task is told." if told else f"{lead}."
    lowest, worst = known[-1]
    if len(known) == 2:
        return f"{lead}, {worst.label} {as_points(lowest.value)}."
    return f"{lead}, most of {len(known)} methods; {worst.label} knows least, {as_points(lowest.value)}."


def lines(methods: Sequence[Learnt]) -> list[str]:
    """The comparison as aligned text: a row for each metric and cost, a column for each method.

    Beyond four methods a row is a method, and only what is read first has a column.
    """
    metrics = [(name, [as_share(row) for row in rows]) for name, rows, _ in metric_rows(methods)]
    costs = [("time, all tasks", [as_duration(sum(one.per_task(lambda task: task.seconds))) for one in methods])]
    for name, number, text in COSTS[3:]:
        costs.append((f"{name}, last task", [text(one.per_task(number)[-1]) for one in methods]))
    heading = ("", [called(one) for one in methods])
    if len(methods) <= MOST_SIDE_BY_SIDE:
        return aligned([[name, *texts] for name, texts in (heading, *metrics, *costs)])
    first = [(name, texts) for name, texts in metrics if name.startswith((f"{ACCURACY},", "forgetting,"))]
    return aligned(list(zip(*([name, *texts] for name, texts in (heading, *first, *costs)), strict=True)))


def called(one: Learnt) -> str:
    """The label, with the number of seeds where there are several."""
    return f"{one.label} ({len(one.runs)} seeds)" if len(one.runs) > 1 else one.label
