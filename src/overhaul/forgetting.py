"""What is kept and lost of a sequence of tasks, learnt one after the other: metrics of a matrix of accuracies.

`A[t, i]` is the accuracy on task i's held-out examples after task t was learnt, both counted from 1; row 0 is before
any training. There are three such matrices of one run, told apart by the classes among which the model may choose:

- task-IL: those of task i only, so that the task has to be known;
- class-IL: those of all tasks 1 to t that were learnt by then, without knowing the task;
- as learnt, R: those of tasks 1 to i, which were there when task i was learnt, however many came later.

Nothing here looks at a model.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import numpy as np

from overhaul.errors import UserError


@dataclass(frozen=True, slots=True, eq=False)
class AccuracyMatrix:
    """Accuracies on T tasks, in the order in which they were learnt.

    Attributes:
        names: of the tasks, all different.
        values: `(T, T)`, or `(T + 1, T)` with what was measured before any training as row 0; shares from 0 to 1, NaN
            where nothing was measured. Copied, and read-only afterwards.
        num_classes: of each task.
        num_examples: held-out ones of each task.

    Raises:
        UserError: shapes, counts or values that cannot be; what is wrong in one sentence.
    """

    names: tuple[str, ...]
    values: np.ndarray
    num_classes: tuple[int, ...]
    num_examples: tuple[int, ...]

    def __post_init__(self) -> None:
        names = tuple(self.names)
        if not names or len(set(names)) < len(names) or not all(isinstance(name, str) for name in names):
            raise UserError(f"tasks {list(names)}", allowed="one or more, each with a name of its own")
        object.__setattr__(self, "names", names)
        object.__setattr__(self, "values", _checked(self.values, len(names)))
        for what in ("num_classes", "num_examples"):
            object.__setattr__(self, what, _counts(getattr(self, what), len(names), what))

    @property
    def num_tasks(self) -> int:
        """T."""
        return len(self.names)

    def has(self, after: int, on: int) -> bool:
        """Whether A[after, on] was measured; IndexError for an entry that no such matrix has."""
        if not (0 <= after <= self.num_tasks and 1 <= on <= self.num_tasks):
            raise IndexError(f"entry ({after}, {on}) of a matrix of {self.num_tasks} tasks")
        row = after - self.num_tasks - 1  # from the end, as row 0 need not be there
        return row >= -len(self.values) and not np.isnan(self.values[row, on - 1])

    def accuracy(self, after: int, on: int) -> float:
        """A[after, on], both counted from 1; `after` 0 is before any training.

        Raises:
            UserError: it was not measured.
        """
        if not self.has(after, on):
            when = f"after task {after} ({self.names[after - 1]})" if after else "before any training"
            raise UserError(
                f"the accuracy on task {on} ({self.names[on - 1]}) {when} is missing",
                hint=f"measure it: it is entry A[{after}, {on}] of the matrix",
            )
        return float(self.values[after - self.num_tasks - 1, on - 1])

    def to_json(self) -> dict[str, Any]:
        """Plain data under the names of the attributes, None where nothing was measured."""
        return {
            "names": list(self.names),
            "values": [[None if np.isnan(value) else float(value) for value in row] for row in self.values],
            "num_classes": list(self.num_classes),
            "num_examples": list(self.num_examples),
        }

    @classmethod
    def from_json(cls, stored: Mapping[str, Any]) -> AccuracyMatrix:
        """Reads what `to_json` wrote.

        Raises:
            UserError: something is missing, or cannot be.
        """
        wanted = ("names", "values", "num_classes", "num_examples")
        if missing := [name for name in wanted if name not in stored]:
            raise UserError(f"a matrix of accuracies without {', '.join(missing)}", allowed=", ".join(wanted))
        return cls(*(stored[name] for name in wanted))


def average_accuracy(matrix: AccuracyMatrix, *, weighted: bool = False) -> float:
    """ACC, the mean accuracy after the last task: 1/T sum_i A[T, i] (Lopez-Paz and Ranzato, 2017).

    Args:
        matrix: of any kind.
        weighted: by each task's held-out examples, which gives the accuracy over all of them.

    Returns:
        From 0 to 1; higher is better.

    Raises:
        UserError: an entry of the last row is missing.
    """
    return _accuracy_after(matrix, matrix.num_tasks, weighted=weighted)


def average_incremental_accuracy(matrix: AccuracyMatrix, *, weighted: bool = False) -> float:
    """The mean over time of the mean accuracy until then: 1/T sum_t 1/t sum_{i <= t} A[t, i] (Rebuffi et al., 2017).

    Args:
        matrix: of any kind.
        weighted: by each task's held-out examples in the inner mean, as in iCaRL, where tasks differ in size.

    Returns:
        From 0 to 1; higher is better.

    Raises:
        UserError: an entry on or below the diagonal is missing.
    """
    return fmean(_accuracy_after(matrix, t, weighted=weighted) for t in _tasks(matrix))


def learning_accuracy(matrix: AccuracyMatrix) -> float:
    """The mean accuracy on each task when it was just learnt: 1/T sum_i A[i, i] (Riemer et al., 2019).

    Returns:
        From 0 to 1; higher is better.

    Raises:
        UserError: an entry of the diagonal is missing.
    """
    return fmean(matrix.accuracy(i, i) for i in _tasks(matrix))


def backward_transfer(matrix: AccuracyMatrix) -> float:
    """BWT, what later tasks did to earlier ones: 1/(T-1) sum_{i < T} (A[T, i] - A[i, i]) (Lopez-Paz and Ranzato, 2017).

    Returns:
        From -1 to 1; negative is forgetting.

    Raises:
        UserError: one task only, or an entry of the diagonal or the last row is missing.
    """
    last = _at_least_two(matrix, "backward transfer")
    return fmean(matrix.accuracy(last, i) - matrix.accuracy(i, i) for i in range(1, last))


def forward_transfer(matrix: AccuracyMatrix) -> float:
    """FWT, what earlier tasks did for later ones before those were learnt (Lopez-Paz and Ranzato, 2017).

    1/(T-1) sum_{i > 1} (A[i-1, i] - A[0, i]). Row 0 is that of an untrained model. It means something where a task's
    classes can be predicted before it was learnt, as in task-IL.

    Returns:
        From -1 to 1; positive is help.

    Raises:
        UserError: one task only, or an entry of row 0 or just above the diagonal is missing.
    """
    last = _at_least_two(matrix, "forward transfer")
    return fmean(matrix.accuracy(i - 1, i) - matrix.accuracy(0, i) for i in range(2, last + 1))


def forgetting(matrix: AccuracyMatrix) -> float:
    """F, how far each earlier task is below its best: 1/(T-1) sum_{j < T} (max_l A[l, j] - A[T, j]), j <= l < T.

    Chaudhry et al. (2018) take the maximum over 1 <= l < T. Here it begins at l = j: before a task is learnt there is
    nothing of it to forget, and nothing has to be measured. It is never below `forgetting_since_learnt`.

    Returns:
        From -1 to 1; positive is forgetting. Negative: the last task made earlier ones better than ever.

    Raises:
        UserError: one task only, or an entry on or below the diagonal is missing.
    """
    last = _at_least_two(matrix, "forgetting")
    return fmean(
        max(matrix.accuracy(row, j) for row in range(j, last)) - matrix.accuracy(last, j) for j in range(1, last)
    )


def forgetting_since_learnt(matrix: AccuracyMatrix) -> float:
    """How far each earlier task is below what it was when just learnt: 1/(T-1) sum_{j < T} (A[j, j] - A[T, j]).

    This is -BWT, and what avalanche-lib calls forgetting.

    Returns:
        From -1 to 1; positive is forgetting.

    Raises:
        UserError: one task only, or an entry of the diagonal or the last row is missing.
    """
    last = _at_least_two(matrix, "forgetting since learnt")
    return fmean(matrix.accuracy(j, j) - matrix.accuracy(last, j) for j in range(1, last))


def global_forgetting(as_learnt: AccuracyMatrix) -> float:
    """F^G, what was lost since each task was learnt, averaged over time as well (Smith et al., 2023).

    1/(N-1) sum_{i=2..N} sum_{n < i} |T_n|/|T_{1:i}| (R[n, n] - R[i, n]), with |T_n| the number of classes of task n and
    |T_{1:i}| that of tasks 1 to i together. The weights of a time sum to less than 1, as the task just learnt has one
    too, and has lost nothing: equal tasks weigh 1/i each.

    Args:
        as_learnt: R, task n's accuracy when predicted among the classes of tasks 1 to n, at every time.

    Returns:
        Between -1 and 1; positive is forgetting.

    Raises:
        UserError: one task only, or an entry on or below the diagonal is missing.
    """
    last = _at_least_two(as_learnt, "global forgetting")
    at_each_time = []
    for i in range(2, last + 1):
        lost = [as_learnt.accuracy(n, n) - as_learnt.accuracy(i, n) for n in range(1, i)]
        at_each_time.append(float(np.dot(as_learnt.num_classes[: i - 1], lost)) / sum(as_learnt.num_classes[:i]))
    return fmean(at_each_time)


def local_forgetting(task_il: AccuracyMatrix) -> float:
    """F^L, what was lost within tasks: 1/(N-1) sum_{n < N} (A[N, n] - A[n, n]) of task-IL (Smith et al., 2023).

    The sign is the paper's and the opposite of `global_forgetting`'s; it is the backward transfer of task-IL.

    Args:
        task_il: task n's accuracy when predicted among its own classes.

    Returns:
        From -1 to 1; negative is forgetting.

    Raises:
        UserError: one task only, or an entry of the diagonal or the last row is missing.
    """
    return backward_transfer(task_il)


def consecutive_forgetting(matrix: AccuracyMatrix) -> float:
    """The mean drop from each time to the next: 1/(N-1) sum_{i=2..N} 1/(i-1) sum_{n < i} (R[i-1, n] - R[i, n]).

    The rule of CODA-Prompt's code (Smith et al., 2023), `calc_forgetting`, which takes tasks to be of equal size.

    Args:
        matrix: R, or class-IL.

    Returns:
        From -1 to 1; positive is forgetting.

    Raises:
        UserError: one task only, or an entry on or below the diagonal is missing.
    """
    last = _at_least_two(matrix, "consecutive forgetting")
    return fmean(
        fmean(matrix.accuracy(i - 1, n) - matrix.accuracy(i, n) for n in range(1, i)) for i in range(2, last + 1)
    )


def intransigence(matrix: AccuracyMatrix, joint: Sequence[float]) -> float:
    """How much worse a task is learnt than by a model that sees all tasks so far at once (Chaudhry et al., 2018).

    1/T sum_k (joint[k] - A[k, k]); the paper gives the summand of the last task.

    Args:
        matrix: of the kind that the references were measured as.
        joint: accuracy on each task k of a model trained on tasks 1 to k together; T shares from 0 to 1.

    Returns:
        From -1 to 1; positive is worse than joint training.

    Raises:
        UserError: the references are not T shares, or an entry of the diagonal is missing.
    """
    if len(joint) != matrix.num_tasks or not all(0 <= accuracy <= 1 for accuracy in joint):
        raise UserError(f"references {list(joint)}", allowed=f"{matrix.num_tasks} accuracies from 0 to 1, one a task")
    return fmean(joint[k - 1] - matrix.accuracy(k, k) for k in _tasks(matrix))


def summary(
    task_il: AccuracyMatrix, class_il: AccuracyMatrix | None = None, as_learnt: AccuracyMatrix | None = None
) -> list[tuple[str, float]]:
    """The metrics of one run, for a table.

    What needs two tasks is left out where there is one, and forward transfer where it was not measured. Metrics that
    equal one in the list, or its opposite, are left out too.

    Args:
        task_il, class_il, as_learnt: matrices of the same tasks, of the kinds that the module's docstring explains.

    Returns:
        (name, value), in the order to be read.

    Raises:
        UserError: the matrices are of different tasks, or an entry on or below a diagonal is missing.
    """
    for other in (class_il, as_learnt):
        if other is not None:
            _check_same_tasks(task_il, other)
    rows = _of_one("task-IL", task_il)
    if task_il.num_tasks > 1 and all(
        task_il.has(0, i) and task_il.has(i - 1, i) for i in range(2, task_il.num_tasks + 1)
    ):
        rows.append(("task-IL forward transfer", forward_transfer(task_il)))
    if class_il is not None:
        rows += _of_one("class-IL", class_il)
    if as_learnt is not None and as_learnt.num_tasks > 1:
        rows.append(("global forgetting", global_forgetting(as_learnt)))
        rows.append(("consecutive forgetting", consecutive_forgetting(as_learnt)))
    return rows


def _of_one(kind: str, matrix: AccuracyMatrix) -> list[tuple[str, float]]:
    """What is said of task-IL and class-IL alike."""
    rows = [
        (f"{kind} average accuracy", average_accuracy(matrix)),
        (f"{kind} accuracy over all examples", average_accuracy(matrix, weighted=True)),
        (f"{kind} average incremental accuracy", average_incremental_accuracy(matrix)),
        (f"{kind} learning accuracy", learning_accuracy(matrix)),
    ]
    if matrix.num_tasks > 1:
        rows.append((f"{kind} backward transfer", backward_transfer(matrix)))
        rows.append((f"{kind} forgetting", forgetting(matrix)))
    return rows


def _tasks(matrix: AccuracyMatrix) -> range:
    return range(1, matrix.num_tasks + 1)


def _accuracy_after(matrix: AccuracyMatrix, t: int, *, weighted: bool) -> float:
    """The mean of A[t, 1] to A[t, t]."""
    accuracies = [matrix.accuracy(t, i) for i in range(1, t + 1)]
    return fmean(accuracies, matrix.num_examples[:t] if weighted else None)


def _at_least_two(matrix: AccuracyMatrix, metric: str) -> int:
    """T, where it is two or more."""
    if matrix.num_tasks < 2:
        raise UserError(f"{metric} of one task ({matrix.names[0]})", allowed="two tasks or more, one after the other")
    return matrix.num_tasks


def _check_same_tasks(one: AccuracyMatrix, other: AccuracyMatrix) -> None:
    for what in ("names", "num_classes", "num_examples"):
        if getattr(one, what) != getattr(other, what):
            raise UserError(
                f"matrices of different tasks: {what} {getattr(one, what)} and {getattr(other, what)}",
                allowed="matrices of one run",
            )


def _checked(values: Any, count: int) -> np.ndarray:
    """The values as a read-only fp64 copy; None becomes NaN."""
    shapes = f"({count}, {count}) or ({count + 1}, {count})"
    try:
        checked = np.array(values, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise UserError(f"accuracies that are no matrix of numbers: {error}", allowed=f"shape {shapes}") from None
    if checked.shape not in {(count, count), (count + 1, count)}:
        raise UserError(f"accuracies of shape {checked.shape} for {count} tasks", allowed=shapes)
    wrong = checked[(checked < 0) | (checked > 1)]
    if wrong.size:
        raise UserError(f"an accuracy of {wrong[0]:g}", allowed="shares from 0 to 1, NaN where nothing was measured")
    checked.setflags(write=False)
    return checked


def _counts(given: Any, count: int, what: str) -> tuple[int, ...]:
    """Positive integers, one a task."""
    try:
        counts = tuple(operator.index(number) for number in given)
    except TypeError:
        counts = ()
    if len(counts) != count or min(counts) < 1:
        raise UserError(f"{what} {given!r} for {count} tasks", allowed="positive integers, one a task")
    return counts
