"""What a model knows of each task: three matrices of accuracies from one pass over the held-out examples.

`class-IL` chooses among all classes that the model has met; `task-IL` is told the task, and chooses among its classes;
`as learnt` chooses among the classes of the tasks up to the one that the example is of, so that what a task loses
later is no matter of more classes to choose from (Smith et al., 2023).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn

from overhaul import journal, machine
from overhaul.evaluate import wilson_interval
from overhaul.forgetting import AccuracyMatrix, average_accuracy
from overhaul.interop.classifier import classified
from overhaul.table import Row
from overhaul.task_data import Batched, TaskData
from overhaul.task_record import KINDS, TaskCost, TaskRecord
from overhaul.text_task_data import TextTaskData


@torch.no_grad()
def logits_of(model: nn.Module, examples: Batched, *, dtype: torch.dtype) -> Tensor:
    """`(N, C)` float32 on the CPU, of all examples in their order; the model is left in evaluation mode."""
    device = next(model.parameters()).device
    model.eval()
    found = []
    for batch in examples.in_order():
        with machine.autocast(device, dtype):
            found.append(classified(model, {name: tensor.to(device) for name, tensor in batch.items()}).logits)
    return torch.cat(found).float().cpu()


@dataclass
class Scores:
    """Accuracies after every task so far.

    Attributes:
        data: the tasks.
        rows: by kind, one row `(T,)` after each task; NaN where nothing was measured.
        has_before: whether the first is before any task.
        last: by kind, how far each example was right when tasks were measured last, `(N,)`.
    """

    data: TaskData | TextTaskData
    has_before: bool = False
    rows: dict[str, list[list[float]]] = field(default_factory=lambda: {kind: [] for kind in KINDS})
    last: dict[str, Tensor] = field(default_factory=dict)

    def take(self, right: Callable[[int, Sequence[int]], Tensor], learnt: int, *, ahead: bool = False) -> None:
        """Measures a model after so many tasks; 0 before any: then of all tasks, which tells what they start from.

        Args:
            right: how far what the model says of a task's held-out examples is right, `(N,)` from 0 to 1, when it may
                choose among the classes of some tasks.
            learnt: tasks.
            ahead: whether the next task is measured too, as task-IL: what those before have done for it.
        """
        sequence = self.data.sequence
        self.has_before |= learnt == 0
        measured = len(sequence.tasks) if learnt == 0 else learnt
        rows = {kind: [float("nan")] * len(sequence.tasks) for kind in KINDS}
        each: dict[str, list[Tensor]] = {kind: [] for kind in KINDS}
        next_one = learnt if ahead and 0 < learnt < len(sequence.tasks) else None
        for number in [*range(measured), *([] if next_one is None else [next_one])]:
            choices = {"class-IL": range(measured), "task-IL": (number,), "as learnt": range(number + 1)}
            for kind, among in choices.items():
                if number == next_one and kind != "task-IL":
                    continue
                right_N = right(number, among).double()
                rows[kind][number] = float(right_N.mean())
                if number != next_one:
                    each[kind].append(right_N)
        self.last = {kind: torch.cat(parts) for kind, parts in each.items()}
        for kind in KINDS:
            self.rows[kind].append(rows[kind])

    def matrix(self, kind: str) -> AccuracyMatrix:
        """The accuracies so far; of tasks that are not yet learnt there are none.

        Args:
            kind: one of `KINDS`.
        """
        sequence, rows = self.data.sequence, self.rows[kind]
        wanted = len(sequence.tasks) + (1 if self.has_before else 0)
        missing = [[float("nan")] * len(sequence.tasks)] * (wanted - len(rows))
        return AccuracyMatrix(
            names=tuple(task.name for task in sequence.tasks),
            values=np.array([*rows, *missing]),
            num_classes=tuple(task.num_classes for task in sequence.tasks),
            num_examples=tuple(map(self.data.num_heldout, range(len(sequence.tasks)))),
        )


def note_scores(scores: Scores, costs: Sequence[TaskCost]) -> None:
    """Tells the report, and the directory, what was measured after each task, and what each took."""
    record = TaskRecord(matrices={kind: scores.matrix(kind) for kind in KINDS}, tasks=tuple(costs))
    journal.note_tasks(record)
    for kind in ("class-IL", "task-IL"):
        _note_accuracy(scores, record.matrices[kind], kind)


def _note_accuracy(scores: Scores, matrix: AccuracyMatrix, kind: str) -> None:
    """The mean over tasks at the end, with an interval over examples."""
    right_N, value = scores.last[kind], average_accuracy(matrix, weighted=True)
    count = len(right_N)
    if bool(((right_N == 0) | (right_N == 1)).all()):
        low, high = wilson_interval(round(value * count), count)
    else:  # shares of tokens, of one window each
        apart = 1.96 * float(right_N.std(correction=1 if count > 1 else 0)) / count**0.5
        low, high = max(value - apart, 0.0), min(value + apart, 1.0)
    row = Row(model=scores.data.model, metric=f"accuracy, {kind}", value=value, low=low, high=high, count=count)
    journal.note_metric(row)
