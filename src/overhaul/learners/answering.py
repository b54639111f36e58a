"""What a model that learns tasks answers with: the classes of a head, or words; and what follows from that."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from overhaul.continual import OldModel, Replayed
from overhaul.fisher import Labels, diagonal
from overhaul.interop.classifier import classes_of, head_of, set_classes
from overhaul.objective import ClassCrossEntropy, Term, only
from overhaul.progress import say
from overhaul.stream import Stream
from overhaul.task_data import TaskData
from overhaul.task_scores import logits_of

if TYPE_CHECKING:
    from overhaul.learning import SharedLearning


class Answering(ABC):
    """One model with one set of weights for all tasks, which are counted from 0.

    Args:
        method: how tasks are learnt.
        model: what learns them.
        data: the tasks, as the model reads them.

    Attributes:
        unit: what is counted of the examples.
        beforehand: whether the model can be asked of tasks that it has not learnt.
    """

    unit: str
    beforehand: bool

    def __init__(self, method: SharedLearning, model: nn.Module, data: Any) -> None:
        self.method, self.model, self.data = method, model, data

    @abstractmethod
    def begin(self, number: int) -> tuple[str, ...]:
        """Makes room for a task; the names of the parameters that are trained whatever was asked for."""

    @abstractmethod
    def forget(self) -> None:
        """The model is another one from now on."""

    @abstractmethod
    def right(self, number: int, tasks: Sequence[int]) -> Tensor:
        """As in `Learner`."""

    def learnt(self, number: int) -> None:  # noqa: B027 - only words have more to tell than what is right
        """Takes note of what the model says after a task."""

    def end(self) -> None:  # noqa: B027
        """Tells the report what was noted."""

    @abstractmethod
    def stream(self, number: int) -> Stream:
        """The batches of a task, as a memory is offered them."""

    def shown(self, source: Stream, number: int, *, offers: bool = False) -> Stream:
        """The batches of a task as the model is shown them.

        Args:
            source: those of `stream`, with draws from a memory where there is one.
            number: of the task.
            offers: whether a memory is offered them.
        """
        return source

    @abstractmethod
    def loss(self, passes: int = 1) -> Term:
        """Cross-entropy.

        Args:
            passes: of each micro-batch, over which it is averaged.
        """

    @abstractmethod
    def replayed(self, draw: int = 1) -> Term:
        """That of remembered examples, of the draw of this number."""

    @abstractmethod
    def old_model(self, old: nn.Module, number: int, temperature: float) -> Term:
        """The divergence from the model before a task, on the task's examples."""

    @abstractmethod
    def information(self, number: int, labels: Labels, count: int) -> dict[str, Tensor]:
        """The diagonal of the Fisher information of what is trained, from some of a task's training examples.

        Args:
            number: of the task.
            labels: over which labels.
            count: examples, at most.
        """


class ByClass(Answering):
    """A head with a row for each class: of all tasks from the beginning, or of those so far."""

    data: TaskData

    def __init__(self, method: SharedLearning, model: nn.Module, data: TaskData) -> None:
        super().__init__(method, model, data)
        self.unit, self.beforehand = data.sequence.unit, method.classifier == "whole"
        self._asked: dict[int, Tensor] = {}

    def begin(self, number: int) -> tuple[str, ...]:
        """Gives the head the rows that it needs; classes that it knows by name keep theirs. The head is trained."""
        self.forget()
        sequence = self.data.sequence
        there = len(sequence.classes) if self.beforehand else sequence.num_classes(number + 1)
        if classes_of(self.model) != (wanted := sequence.classes[:there]) and (gone := set_classes(self.model, wanted)):
            say(f"note: {len(gone)} classes that no task has are left out of the head, such as {gone[0]}")
        where, head = head_of(self.model)
        return tuple(f"{where}.{name}" for name, _ in head.named_parameters())

    def forget(self) -> None:
        self._asked.clear()

    def right(self, number: int, tasks: Sequence[int]) -> Tensor:
        if number not in self._asked:
            self._asked[number] = logits_of(self.model, self.data.heldout[number], dtype=self.data.dtype)
        among_NC = only(self._asked[number], torch.tensor(self.data.sequence.classes_of(tasks)))
        return among_NC.argmax(dim=1) == torch.from_numpy(self.data.heldout[number].labels_N)

    def stream(self, number: int) -> Stream:
        return self.data.batches(number, batch_size=self.method.batch_size, as_bytes=self.method.augment != "none")

    def shown(self, source: Stream, number: int, *, offers: bool = False) -> Stream:
        how = self.method.augment
        return source if how == "none" else self.data.augmented(source, number, how, offers=offers)

    def loss(self, passes: int = 1) -> Term:
        return ClassCrossEntropy(passes=passes)

    def replayed(self, draw: int = 1) -> Term:
        return Replayed(draw)

    def old_model(self, old: nn.Module, number: int, temperature: float) -> Term:
        return OldModel(old, self.data.sequence.num_classes(number), temperature)

    def information(self, number: int, labels: Labels, count: int) -> dict[str, Tensor]:
        """From examples that the seed chooses."""
        examples = self.data.train[number]
        places = np.random.default_rng((self.data.seed, number)).permutation(len(examples))[:count]
        return diagonal(self.model.eval(), examples.in_order(places), labels=labels, seed=self.data.seed)
