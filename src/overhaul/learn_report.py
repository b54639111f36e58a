"""Runs of tasks side by side: what each method knows in the end, what it lost by every definition, and what it took.

overhaul learn report runs/er runs/ewc -o report.html
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import takewhile
from pathlib import Path
from statistics import fmean
from typing import Any

from overhaul import artifact, task_record
from overhaul.errors import UserError
from overhaul.evaluate import wilson_interval
from overhaul.forgetting import AccuracyMatrix
from overhaul.lineage import LineageStep
from overhaul.report.tasks import Learnt
from overhaul.table import Row
from overhaul.task_record import ACCURACY, OVER_ALL, TASKS, TaskRecord, difference, measured
from overhaul.train import FREE_ON_RESUME

VERB = "learn"


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One directory that learnt tasks.

    Attributes:
        path: as it was named.
        record: its `tasks.json`.
        step: of its lineage, the last one that learnt tasks.
        parameters: of the model.
    """

    path: str
    record: TaskRecord
    step: LineageStep
    parameters: int

    @property
    def method(self) -> tuple[str, ...]:
        """What is the same of two runs that differ in their seed alone; tasks are compared by what they hold."""
        chosen = {**self.step.fields, **self.step.options}
        settings = [
            f"{name} {chosen[name]}" for name in sorted(chosen) if name not in ("seed", "tasks", *FREE_ON_RESUME)
        ]
        return (self.step.method, str(self.parameters), *settings)


def learnt_in(path: str) -> Run:
    """One directory, read.

    Raises:
        UserError: there is none, it learnt no tasks, or what it says of them is damaged.
    """
    directory = Path(path).expanduser()
    if not directory.is_dir():
        raise UserError(f"{path} is no directory", allowed="directories that overhaul learn wrote")
    record = task_record.read(directory)
    told = artifact.read_record(directory)
    steps = [LineageStep.from_json(step) for step in told.get("lineage", ()) if step.get("verb") == VERB]
    if not steps:
        raise UserError(
            f"{path} has {TASKS}, but by its record no step learnt tasks", hint="a directory as it was written"
        )
    return Run(path=path, record=record, step=steps[-1], parameters=told["facts"][-1]["parameters"])


def refuse_other_tasks(runs: Sequence[Run]) -> None:
    """Raises `UserError` where two runs learnt different tasks, and names the first difference."""
    for other in runs[1:]:
        if told := tasks_differ(runs[0], other):
            raise UserError(
                f"{runs[0].path} and {other.path} learnt different tasks: {told}",
                allowed="runs of the same tasks in the same order",
            )


def tasks_differ(one: Run, other: Run) -> str:
    """What tells their tasks apart; nothing where they are the same, to the pixel."""
    if told := difference(one.record.matrices["class-IL"], other.record.matrices["class-IL"]):
        return told
    data, theirs = one.step.data, other.step.data
    if data and theirs and data.fingerprint != theirs.fingerprint:
        return f"the same names, but other examples in {data.name} ({data.fingerprint}, {theirs.fingerprint})"
    return ""


def report(directories: Sequence[str]) -> tuple[Learnt, ...]:
    """The methods of several directories; runs that differ in their seed alone are one method.

    Args:
        directories: that learnt the same tasks, each counted once.

    Returns:
        One entry a method, in the order in which the directories are named.

    Raises:
        UserError: a directory cannot be read, or learnt other tasks than the first.
    """
    named = {Path(path).expanduser().resolve(): path for path in reversed(directories)}
    runs = [learnt_in(path) for path in reversed(named.values())]
    if not runs:
        raise UserError("no directory is named", hint="overhaul learn report DIR ...")
    refuse_other_tasks(runs)
    groups = _by_method(runs)
    varied = _varied([group[0].step for group in groups])
    return tuple(
        _learnt(label, group, {name: group[0].step.fields.get(name) for name in varied})
        for label, group in zip(_labels(groups), groups, strict=True)
    )


def _by_method(runs: Sequence[Run]) -> list[list[Run]]:
    """Runs that differ in their seed alone, together.

    A seed may change the model that a run began with as well. Where a seed is there twice, the runs began with
    different models, and each of these is a method of its own; where that does not tell them apart, so is every run.
    """
    groups = []
    for group in _grouped(runs, lambda run: run.method):
        if _has_seed_twice(group):
            groups += _grouped(group, lambda run: run.step.parents[0].hash)
        else:
            groups.append(group)
    return [part for group in groups for part in ([[run] for run in group] if _has_seed_twice(group) else [group])]


def _grouped(runs: Sequence[Run], key: Any) -> list[list[Run]]:
    found: dict[Any, list[Run]] = {}
    for run in runs:
        found.setdefault(key(run), []).append(run)
    return list(found.values())


def _has_seed_twice(runs: Sequence[Run]) -> bool:
    return len({run.step.seed for run in runs}) < len(runs)


def _labels(groups: Sequence[Sequence[Run]]) -> list[str]:
    """How methods are called: by their directory, or by what the names of their directories begin with."""
    places = {run.path: Path(run.path).expanduser().resolve() for group in groups for run in group}
    short = {path: place.name for path, place in places.items()}
    for count in range(2, max(len(place.parts) for place in places.values())):
        if len(set(short.values())) < len(places):
            short = {path: "/".join(place.parts[-count:]) for path, place in places.items()}
    labels = [_shared([short[run.path] for run in group]) or places[group[0].path].parent.name for group in groups]
    twice = {label for label, count in Counter(labels).items() if count > 1}
    return [short[group[0].path] if label in twice else label for label, group in zip(labels, groups, strict=True)]


def _shared(names: Sequence[str]) -> str:
    """What all names begin with, without a seed at its end: `er` of `er-10` and `er-11`."""
    if len(names) == 1:
        return names[0]
    same = takewhile(lambda letters: len(set(letters)) == 1, zip(*names, strict=False))
    return re.sub(r"[\W_]*(seed[\W_]*)?\d*$", "", "".join(letters[0] for letters in same))


def _varied(steps: Sequence[LineageStep]) -> list[str]:
    """The settings that are not the same in all; of one method those that were chosen."""
    if len(steps) == 1:
        return list(steps[0].non_default)
    names = dict.fromkeys(name for step in steps for name in step.fields)
    return [name for name in names if len({str(step.fields.get(name)) for step in steps}) > 1]


def _learnt(label: str, runs: Sequence[Run], settings: Mapping[str, object]) -> Learnt:
    return Learnt(
        label=label,
        runs=tuple(run.record for run in runs),
        paths=tuple(run.path for run in runs),
        seeds=tuple(run.step.seed for run in runs),
        settings=settings,
        rows=tuple(_rows(label, [run.record for run in runs])),
    )


def alone(run: Run, label: str) -> Learnt:
    """One run as a method of its own, with the settings that were chosen."""
    return _learnt(label, [run], {name: run.step.fields[name] for name in run.step.non_default})


def _rows(label: str, records: Sequence[TaskRecord]) -> list[Row]:
    """Every metric: the mean over runs and their lowest and highest; of one run with an interval over examples."""
    rows = []
    for found in zip(*(measured(record) for record in records), strict=True):
        metric, values = found[0][0], [value for _, value in found]
        low, high, count = min(values), max(values), len(records)
        matrix = records[0].matrices[metric.kind]
        # Of a text what is right is a share of each window's tokens, of which there is no such interval.
        whole = all(task.unit != "tokens" for task in records[0].tasks)
        if len(records) == 1 and whole and metric.name in (ACCURACY, OVER_ALL):
            low, high = mean_interval(matrix) if metric.name == ACCURACY else _over_all(values[0], matrix)
            count = sum(matrix.num_examples)
        rows.append(Row(model=label, metric=metric.full_name, value=fmean(values), low=low, high=high, count=count))
    return rows


def _over_all(share: float, matrix: AccuracyMatrix) -> tuple[float, float]:
    count = sum(matrix.num_examples)
    return wilson_interval(round(share * count), count)


def mean_interval(matrix: AccuracyMatrix) -> tuple[float, float]:
    """The 95% interval of the mean accuracy at the end, over examples.

    Each task's interval is Wilson's; that of their mean follows from them by the method of variance estimates recovery
    (Zou and Donner, 2008): the distances from the values to their ends add up as squares. Of one task it is Wilson's.
    """
    below = above = 0.0
    values = [matrix.accuracy(matrix.num_tasks, on) for on in range(1, matrix.num_tasks + 1)]
    for value, count in zip(values, matrix.num_examples, strict=True):
        low, high = wilson_interval(round(value * count), count)
        below += (value - low) ** 2
        above += (high - value) ** 2
    return fmean(values) - below**0.5 / len(values), fmean(values) + above**0.5 / len(values)


def to_json(methods: Sequence[Learnt]) -> dict[str, Any]:
    """Plain data: every metric as a row, and of each method its runs."""
    return {
        "rows": [asdict(row) for one in methods for row in one.rows],
        "methods": [
            {
                "method": one.label,
                "settings": dict(one.settings),
                "runs": [
                    {"directory": path, "seed": seed, **record.to_json()}
                    for path, seed, record in zip(one.paths, one.seeds, one.runs, strict=True)
                ],
            }
            for one in methods
        ],
    }
