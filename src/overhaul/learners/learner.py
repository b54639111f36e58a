"""What a method of learning tasks keeps from one to the next, and how its model answers what it has learnt."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from overhaul.interop.classifier import classes_of, set_classes
from overhaul.objective import only
from overhaul.progress import say
from overhaul.task_data import TaskData
from overhaul.task_scores import logits_of
from overhaul.train import Plan


class Learner(ABC):
    """One run through a sequence of tasks, which are counted from 0.

    Args:
        model: what learns them.
        data: the tasks, as the model reads them.
    """

    answers_beforehand: bool = False
    """Whether it can be asked of tasks that it has not learnt."""

    def __init__(self, model: nn.Module, data: TaskData) -> None:
        self.model, self.data = model, data

    def begin(self, number: int) -> None:  # noqa: B027 - not every method has to
        """Makes room for a task before it is learnt."""

    @abstractmethod
    def plan(self, number: int) -> Plan:
        """How the model learns a task; there is room for it by then."""

    @abstractmethod
    def learnt(self, number: int) -> None:
        """Takes note of the model as it is after a task: what a later one is held to."""

    @abstractmethod
    def answers(self, number: int, tasks: Sequence[int]) -> Tensor:
        """What the model says of a task's held-out examples when it may choose among the classes of some tasks.

        Args:
            number: of the task whose examples they are.
            tasks: among whose classes; one alone is the task, told.

        Returns:
            `(N, C)` float32 on the CPU, one column for each class of the sequence: the largest is the answer. Classes
            of no such task are at minus infinity.
        """

    def kept_bytes(self) -> Mapping[str, int]:
        """How much it holds for later tasks beside the model, by what it is, such as `memory`."""
        return {}

    def end(self) -> None:  # noqa: B027 - not every method has to
        """After the last task: what is left in the model is what will be written."""


class SharedLearner(Learner):
    """One set of weights and one head for all tasks.

    Args:
        whole: whether the head has a row for every class of the sequence from the start, or gets those of a task with
            it.
    """

    def __init__(self, model: nn.Module, data: TaskData, *, whole: bool) -> None:
        super().__init__(model, data)
        self.answers_beforehand = whole
        self._asked: dict[int, Tensor] = {}

    def begin(self, number: int) -> None:
        """Gives the head the rows that it needs; classes that it knows by name keep theirs."""
        self._asked.clear()
        sequence = self.data.sequence
        there = len(sequence.classes) if self.answers_beforehand else sequence.num_classes(number + 1)
        if classes_of(self.model) != (wanted := sequence.classes[:there]) and (gone := set_classes(self.model, wanted)):
            say(f"note: {len(gone)} classes that no task has are left out of the head, such as {gone[0]}")

    def plan(self, number: int) -> Plan:
        """That of `training`; what was said before it no longer holds."""
        self._asked.clear()
        return self.training(number)

    @abstractmethod
    def training(self, number: int) -> Plan:
        """How the model learns a task."""

    def answers(self, number: int, tasks: Sequence[int]) -> Tensor:
        if number not in self._asked:
            self._asked[number] = logits_of(self.model, self.data.heldout[number], dtype=self.data.dtype)
        return only(self._asked[number], torch.tensor(self.data.sequence.classes_of(tasks)))
