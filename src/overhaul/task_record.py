"""What is known of a run of tasks: accuracies after each, and what each took; `tasks.json` beside the weights."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal

from overhaul import forgetting
from overhaul.errors import UserError
from overhaul.forgetting import AccuracyMatrix

TASKS = "tasks.json"
"""The file beside the weights."""
FORMAT = 1
CLASS_IL, TASK_IL, AS_LEARNT = KINDS = ("class-IL", "task-IL", "as learnt")
"""The matrices of a run: see `overhaul.forgetting`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskCost:
    """What one task took.

    Attributes:
        name: of the task.
        steps: of the optimizer.
        images: read in them, or what `unit` says; one that is read twice counts twice, one from a memory not at all.
        unit: `images`, labelled `texts`, or `tokens`.
        seconds: of training, and of what the method took note of afterwards; measuring is not in it.
        trained_parameters: how many.
        kept_bytes: by what it is, what was held of this task and those before when it was learnt, beside the model.
    """

    name: str
    steps: int
    images: int
    seconds: float
    trained_parameters: int
    kept_bytes: Mapping[str, int]
    unit: str = "images"

    @property
    def all_kept_bytes(self) -> int:
        """The sum of `kept_bytes`."""
        return sum(self.kept_bytes.values())


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TaskRecord:
    """A run of tasks.

    Attributes:
        matrices: of accuracies, one of each of `KINDS`, all of the same tasks.
        tasks: what each took, in the order in which they were learnt.
    """

    matrices: Mapping[str, AccuracyMatrix]
    tasks: tuple[TaskCost, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain data: `{"format": 1, "matrices": {kind: matrix}, "tasks": [...]}`."""
        return {
            "format": FORMAT,
            "matrices": {kind: matrix.to_json() for kind, matrix in self.matrices.items()},
            "tasks": [asdict(task) for task in self.tasks],
        }

    @classmethod
    def from_json(cls, stored: Any) -> TaskRecord:
        """Reads what `to_json` wrote.

        Raises:
            UserError: something is missing, or cannot be.
        """
        wanted = ("format", "matrices", "tasks")
        if not isinstance(stored, Mapping) or (missing := [name for name in wanted if name not in stored]):
            what = "no JSON object" if not isinstance(stored, Mapping) else f"without {', '.join(missing)}"
            raise UserError(f"a record of tasks: {what}", allowed=", ".join(wanted))
        if stored["format"] != FORMAT:
            raise UserError(f"a record of tasks in format {stored['format']!r}", allowed=f"format {FORMAT}")
        matrices, tasks = stored["matrices"], stored["tasks"]
        if not isinstance(matrices, Mapping) or any(not isinstance(matrices.get(kind), Mapping) for kind in KINDS):
            raise UserError("a record of tasks without all matrices", allowed=", ".join(KINDS))
        made = cls(
            matrices={kind: AccuracyMatrix.from_json(matrices[kind]) for kind in KINDS},
            tasks=tuple(_cost(task) for task in (tasks if isinstance(tasks, list) else ())),
        )
        _refuse_unlike(made)
        return made


def _cost(stored: Any) -> TaskCost:
    """One entry of `tasks`.

    Raises:
        UserError: a field is missing, or no count.
    """
    wanted = [field.name for field in fields(TaskCost) if field.name != "unit"]
    if not isinstance(stored, Mapping) or (missing := [name for name in wanted if name not in stored]):
        raise UserError(
            f"a task without {', '.join(missing if isinstance(stored, Mapping) else wanted)}",
            allowed=", ".join(wanted),
        )
    kept = stored["kept_bytes"]
    counts = [stored[name] for name in ("steps", "images", "seconds", "trained_parameters")]
    if not isinstance(kept, Mapping) or not all(
        isinstance(count, int | float) and count >= 0 for count in (*counts, *kept.values())
    ):
        raise UserError(f"costs of task {stored['name']!r} that are no numbers from 0")
    return TaskCost(**{name: stored[name] for name in wanted}, unit=str(stored.get("unit", "images")))


def _refuse_unlike(record: TaskRecord) -> None:
    """Raises `UserError` for matrices of different tasks, costs of others, or a gap that no finished run has."""
    first = record.matrices[KINDS[0]]
    for kind, matrix in record.matrices.items():
        for what in ("names", "num_classes", "num_examples"):
            if getattr(matrix, what) != getattr(first, what):
                raise UserError(f"{what} of the tasks differ: {KINDS[0]} {getattr(first, what)}, "
                                f"{kind} {getattr(matrix, what)}", allowed="matrices of one run")  # fmt: skip
        for after in range(1, matrix.num_tasks + 1):
            for on in range(1, after + 1):
                matrix.accuracy(after, on)  # raises where it is missing
    names = tuple(task.name for task in record.tasks)
    if names != first.names:
        raise UserError(f"costs of tasks {list(names)}", allowed=f"of {list(first.names)}, as in the matrices")


def read(directory: Path) -> TaskRecord:
    """The record of a directory that learnt tasks.

    Raises:
        UserError: it has none, or one that is damaged.
    """
    path = directory / TASKS
    if not path.is_file():
        raise UserError(
            f"{directory} has no {TASKS}",
            allowed="directories that overhaul learn wrote",
            hint="overhaul learn bregman MODEL -o DIR --tasks IMAGES",
        )
    try:
        return TaskRecord.from_json(json.loads(path.read_text("utf-8")))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not valid JSON: {error}", hint="the same run once more") from error
    except UserError as error:
        raise UserError(f"{path} is damaged: {error.given}", allowed=error.allowed, hint=error.hint) from error


@dataclass(frozen=True, slots=True, kw_only=True)
class Metric:
    """One definition, of one kind of matrix.

    Attributes:
        name: of the definition, the same for all kinds.
        kind: one of `KINDS`.
        better: which way it improves.
        of: the definition; it raises `UserError` where an entry that it needs is missing.
        needs_two: whether there must be two tasks.
    """

    name: str
    kind: str
    better: Literal["more", "less"]
    of: Callable[[AccuracyMatrix], float]
    needs_two: bool = True

    @property
    def full_name(self) -> str:
        """The name with the kind."""
        return f"{self.name}, {self.kind}"

    def applies(self, matrix: AccuracyMatrix) -> bool:
        """Whether there are enough tasks, and forward transfer was measured."""
        if self.needs_two and matrix.num_tasks < 2:
            return False
        later = range(2, matrix.num_tasks + 1)
        return self.of is not forgetting.forward_transfer or all(
            matrix.has(0, task) and matrix.has(task - 1, task) for task in later
        )


ACCURACY = "average accuracy"
OVER_ALL = "accuracy over all examples"


def _definitions() -> Iterator[Metric]:
    for kind in (CLASS_IL, TASK_IL):
        yield Metric(name=ACCURACY, kind=kind, better="more", of=forgetting.average_accuracy, needs_two=False)
        yield Metric(
            name=OVER_ALL,
            kind=kind,
            better="more",
            of=lambda matrix: forgetting.average_accuracy(matrix, weighted=True),
            needs_two=False,
        )
        yield Metric(
            name="average incremental accuracy",
            kind=kind,
            better="more",
            of=forgetting.average_incremental_accuracy,
            needs_two=False,
        )
        yield Metric(
            name="learning accuracy", kind=kind, better="more", of=forgetting.learning_accuracy, needs_two=False
        )
        yield Metric(name="backward transfer", kind=kind, better="more", of=forgetting.backward_transfer)
        yield Metric(name="forgetting", kind=kind, better="less", of=forgetting.forgetting)
        yield Metric(name="forgetting since learnt", kind=kind, better="less", of=forgetting.forgetting_since_learnt)
    yield Metric(name="forward transfer", kind=TASK_IL, better="more", of=forgetting.forward_transfer)
    yield Metric(name="global forgetting", kind=AS_LEARNT, better="less", of=forgetting.global_forgetting)
    yield Metric(name="local forgetting", kind=TASK_IL, better="more", of=forgetting.local_forgetting)
    yield Metric(name="consecutive forgetting", kind=AS_LEARNT, better="less", of=forgetting.consecutive_forgetting)
    yield Metric(name="consecutive forgetting", kind=CLASS_IL, better="less", of=forgetting.consecutive_forgetting)


METRICS = tuple(_definitions())
"""Every definition that a single run can be measured by; intransigence needs other runs to compare with."""


def measured(record: TaskRecord) -> list[tuple[Metric, float]]:
    """Every metric that the run has, in the order of `METRICS`."""
    return [(metric, metric.of(matrix)) for metric in METRICS if metric.applies(matrix := record.matrices[metric.kind])]


def accuracy_so_far(matrix: AccuracyMatrix) -> list[float]:
    """The mean accuracy on tasks 1 to t after task t, for each t."""
    times = range(1, matrix.num_tasks + 1)
    return [sum(matrix.accuracy(t, on) for on in range(1, t + 1)) / t for t in times]


def difference(one: AccuracyMatrix, other: AccuracyMatrix) -> str:
    """What tells the tasks of two runs apart, in a few words; nothing where they look alike."""
    if one.num_tasks != other.num_tasks:
        return f"{one.num_tasks} and {other.num_tasks} tasks"
    for number, (name, theirs) in enumerate(zip(one.names, other.names, strict=True), 1):
        if name != theirs:
            return f"task {number} is {name} and {theirs}"
    whats: Sequence[tuple[str, str]] = (("num_classes", "classes"), ("num_examples", "held-out examples"))
    for what, told in whats:
        pairs = zip(one.names, getattr(one, what), getattr(other, what), strict=True)
        for name, count, their_count in pairs:
            if count != their_count:
                return f"task {name} has {count} and {their_count} {told}"
    return ""
