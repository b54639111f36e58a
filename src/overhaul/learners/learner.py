"""What a method of learning tasks keeps from one to the next, and how its model answers what it has learnt."""

from __future__ import annotations

import fnmatch
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from overhaul.errors import UserError
from overhaul.interop.attention import is_qkv
from overhaul.learners.answering import Answering, ByClass
from overhaul.learners.text import ByWord
from overhaul.objective import Objective
from overhaul.optim.build import build
from overhaul.progress import say
from overhaul.schedules import schedule
from overhaul.stream import Stream
from overhaul.task_data import TaskData
from overhaul.text_task_data import TextTaskData
from overhaul.train import Plan
from overhaul.watch import InEvaluation, KeepZeros

if TYPE_CHECKING:
    from overhaul.learning import SharedLearning


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

    def right(self, number: int, tasks: Sequence[int]) -> Tensor:
        """`(N,)` bool: whether each of a task's held-out examples is answered rightly, among the classes of tasks."""
        labels_N = torch.from_numpy(self.data.heldout[number].labels_N)
        return self.answers(number, tasks).argmax(dim=1) == labels_N

    def begin(self, number: int) -> None:  # noqa: B027 - not every method has to
        """Makes room for a task before it is learnt."""

    @abstractmethod
    def plan(self, number: int) -> Plan:
        """How the model learns a task; there is room for it by then."""

    def plans(self, number: int) -> Iterator[Plan]:
        """All that is trained of a task, one after the other: `plan` for most."""
        yield self.plan(number)

    @abstractmethod
    def learnt(self, number: int) -> None:
        """Takes note of the model as it is after a task: what a later one is held to."""

    def answers(self, number: int, tasks: Sequence[int]) -> Tensor:
        """What the model says of a task's held-out examples when it may choose among the classes of some tasks.

        Args:
            number: of the task whose examples they are.
            tasks: among whose classes; one alone is the task, told.

        Returns:
            `(N, C)` float32 on the CPU, one column for each class of the sequence: the largest is the answer. Classes
            of no such task are at minus infinity.
        """
        raise NotImplementedError("a method whose model answers otherwise says what is right by itself")

    def kept_bytes(self) -> Mapping[str, int]:
        """How much it holds for later tasks beside the model, by what it is, such as `memory`."""
        return {}

    def end(self) -> None:  # noqa: B027 - not every method has to
        """After the last task: what is left in the model is what will be written."""


class SharedLearner(Learner):
    """One set of weights for all tasks, which answers with one head for them, or with words.

    Attributes:
        answering: with what, and what follows from it.
        head: names of the head's parameters, which are trained whatever was asked for; a language model has none.
        trained: names of the parameters that are trained; the head's are always among them.
    """

    def __init__(self, method: SharedLearning, model: nn.Module, data: TaskData) -> None:
        super().__init__(model, data)
        self.shared = method
        with_what: Any = ByWord if isinstance(data, TextTaskData) else ByClass
        self.answering: Answering = with_what(method, model, data)
        self.answers_beforehand = self.answering.beforehand
        self.head: frozenset[str] = frozenset()
        self.trained: frozenset[str] = frozenset()

    def begin(self, number: int) -> None:
        self.head = frozenset(self.answering.begin(number))
        self.trained = self.head.union(parameters_like(self.model, self.shared.train))

    def plan(self, number: int) -> Plan:
        """How the model learns a task: `objective`, `stream` and `optimizer` are the method's."""
        self.answering.forget()
        self.prepare()
        self.free()
        method, objective = self.shared, self.objective(number)
        return Plan(
            model=self.model,
            objective=objective,
            stream=self.stream(number),
            optimizer=self.optimizer(number, objective),
            schedule=schedule(method.schedule, method.warmup),
            watchers=(InEvaluation(self._still()), KeepZeros()),
            finish=self.finish,
            steps=method.steps_of(self.data, number),
            unit=self.answering.unit,
        )

    def prepare(self) -> None:
        """Gives the model the form that it is trained in."""

    def finish(self, model: nn.Module) -> nn.Module:
        """Gives it back the form that is kept."""
        return model

    def free(self) -> None:
        """Marks what is trained, and freezes the rest."""
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(name in self.trained)

    def _still(self) -> list[nn.BatchNorm2d]:
        """Batch normalisations of which nothing is trained: their statistics stay too."""
        found = [
            module
            for name, module in self.model.named_modules()
            if isinstance(module, nn.BatchNorm2d) and not {f"{name}.weight", f"{name}.bias"} & self.trained
        ]
        if found:
            say(f"note: {len(found)} batch normalisations that are not trained keep their running statistics")
        return found

    @abstractmethod
    def objective(self, number: int) -> Objective:
        """What is minimised in a task."""

    def stream(self, number: int) -> Stream:
        """The batches of a task, as the model is shown them."""
        return self.answering.shown(self.answering.stream(number), number)

    def optimizer(self, number: int, objective: Objective) -> torch.optim.Optimizer:
        """The update rule of a task, which begins anew."""
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        return build(self.shared, trained, model=self.model)

    def right(self, number: int, tasks: Sequence[int]) -> Tensor:
        return self.answering.right(number, tasks)

    def learnt(self, number: int) -> None:
        self.answering.learnt(number)

    def end(self) -> None:
        self.answering.end()


ALL, QKV = "all", "qkv"


def parameters_like(model: nn.Module, patterns: Sequence[str]) -> list[str]:
    """The names of the parameters that patterns select, in the model's order.

    Args:
        model: any.
        patterns: `all`, `qkv` for the projections of attention to queries, keys and values, or shell patterns of names.

    Raises:
        UserError: one of them selects nothing.
    """
    names = [name for name, _ in model.named_parameters()]
    found: set[str] = set()
    for pattern in patterns:
        if pattern == QKV:
            chosen = [name for name in names if is_qkv(name)]
        else:
            chosen = names if pattern == ALL else fnmatch.filter(names, pattern)
        if not chosen:
            raise UserError(
                f"no parameter is like {pattern!r}",
                allowed=f"{ALL}, {QKV}, or a pattern of names such as {names[0]}, {names[len(names) // 2]}",
                hint="'*weight' selects all weights",
            )
        found |= set(chosen)
    return [name for name in names if name in found]
