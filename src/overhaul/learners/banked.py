"""Learning tasks of images with a bank for each: nothing of an older task is touched, so nothing of it is forgotten."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from overhaul import journal
from overhaul.augment import augmented
from overhaul.banks import Sockets
from overhaul.checkpoint import trained_tensors
from overhaul.identify import entropies, over_views
from overhaul.interop.classifier import set_classes
from overhaul.learners.keeping import BankKeeper, Parent
from overhaul.learners.similarity import similarity
from overhaul.objective import ClassCrossEntropy, Objective, ParameterNorms
from overhaul.optim.build import build
from overhaul.schedules import schedule
from overhaul.stream import Stream
from overhaul.task_scores import logits_of
from overhaul.train import Plan
from overhaul.watch import InEvaluation, KeepBest, Watcher

if TYPE_CHECKING:
    from overhaul.banking import BankLearning
    from overhaul.task_data import Examples, TaskData


class BankLearner(BankKeeper):
    """Trains a bank for each task of images.

    Args:
        method: how.
        model: the frozen model, into which the sockets go.
        data: the tasks.
        sockets: where banks go.
        whole_first: whether the first task of a model trains all of it, and the model is frozen then.
        parent: the bank that a task begins as: none, but the frozen model; the first one; or the one whose features
            tell the task's classes apart best, the older of two that do it equally well.

    Raises:
        UserError: the model has no place for them, or its directory has a bank for a task of the same name.
    """

    nearness_is = "how well its classes lie apart in each model"

    def __init__(
        self,
        method: BankLearning,
        model: nn.Module,
        data: TaskData,
        sockets: Sockets,
        *,
        whole_first: bool = False,
        parent: Parent = "none",
    ) -> None:
        super().__init__(method, model, data, sockets, parent=parent)
        self.whole_first = whole_first and not self.before
        self._said: dict[tuple[int, int], Tensor] = {}
        self._kept: dict[int, KeepBest] = {}

    def begin(self, number: int) -> None:
        """Puts new tensors in; what is drawn at random until the next task begins is the task's own."""
        sequence = self.data.sequence
        torch.manual_seed(self._seed(number))
        classes = tuple(sequence.classes[place] for place in sequence.tasks[number].classes)
        if self._is_whole(number):
            self.banked.restore()
            set_classes(self.model, classes)
        else:
            self.banked.begin(classes, self._parent_of(number))

    def nearness(self, number: int) -> float:
        how: Any = {"dtype": self.data.dtype, "seed": self.data.seed}
        return similarity(self.model, self.data.train[number], **how)

    def shown(self, nearness: float) -> str:
        return f"{nearness:.1%}"

    def plan(self, number: int) -> Plan:
        """Cross-entropy among the task's own classes, on what is its own, or on the whole model."""
        method, whole = self.method, self._is_whole(number)
        trained = list(self.model.parameters()) if whole else self.banked.parameters()
        self.model.requires_grad_(False)
        for parameter in trained:
            parameter.requires_grad_(True)
        objective: Objective = ClassCrossEntropy(smoothing=method.label_smoothing)
        if method.norm_penalty:
            objective += method.norm_penalty * ParameterNorms(trained)
        return Plan(
            model=self.model,
            objective=objective,
            stream=self._stream(number),
            optimizer=build(method, trained, model=self.model),
            schedule=schedule(method.schedule, method.warmup),
            watchers=self._watchers(number),
            steps=method.steps_of(self.data, number),
            unit="images",
        )

    def _stream(self, number: int) -> Stream:
        """The batches of a task, whose labels are places among its own classes."""
        method, seed = self.method, self._seed(number)
        how: Any = {"own_labels": True, "as_bytes": method.augment != "none", "seed": seed}
        batches = self.data.batches(number, batch_size=method.batch_size, **how)
        return batches if method.augment == "none" else self.data.augmented(batches, number, method.augment, seed=seed)

    def _watchers(self, number: int) -> tuple[Watcher, ...]:
        """What keeps statistics of the frozen model, and the best pass where that is kept."""
        method = self.method
        still = () if self._is_whole(number) else (InEvaluation(self._frozen_statistics()),)
        if not method.keep_best:
            return still
        self._kept[number] = KeepBest(
            partial(self._right_aside, number),
            trained_tensors,
            every=self.data.steps(number, passes=1, batch_size=method.batch_size * method.accumulate),
            steps=method.steps_of(self.data, number),
            patience=method.patience,
        )
        return (*still, self._kept[number])

    def _right_aside(self, number: int, model: nn.Module) -> float:
        """The share of a task's examples aside that the model answers rightly, among the task's own classes."""
        examples, classes = self.data.aside[number], torch.tensor(self.data.sequence.tasks[number].classes)
        answers_N = classes[logits_of(model, examples, dtype=self.data.dtype).argmax(dim=1)]
        return float((answers_N == torch.from_numpy(examples.labels_N)).double().mean())

    def end(self) -> None:
        super().end()
        if not self._kept:
            return
        names = [task.name for task in self.data.sequence.tasks]
        rows = [
            (names[number], str(kept.place + 1), str(len(kept.scores)), f"{max(kept.scores):.1%}")
            for number, kept in self._kept.items()
        ]
        title = "Which pass over a task was kept, by examples that were not trained on"
        journal.note_table(title, ("", "pass", "of", "accuracy on them"), rows)

    def _frozen_statistics(self) -> list[nn.Module]:
        """Normalisations whose running statistics are the frozen model's."""
        own = set(self.banked.sockets.names(self.model))
        return [
            module
            for name, module in self.model.named_modules()
            if isinstance(module, nn.BatchNorm2d) and f"{name}.running_mean" not in own
        ]

    def learnt(self, number: int) -> None:
        if self._is_whole(number):
            self._freeze()
        self.banked.keep(self.data.sequence.tasks[number].name)

    def _freeze(self) -> None:
        """From here on the model is as it will be written: later tasks are learnt on these very numbers."""
        inner: Any = self.model
        for parameter in self.model.parameters():
            parameter.data = parameter.data.to(inner.config.dtype or parameter.dtype).to(parameter.dtype)
        self.banked.freeze()

    def answers(self, number: int, tasks: Sequence[int]) -> Tensor:
        """Each example's, by the bank of the task among `tasks` that is the least in doubt about it."""
        logits_NC = self._of_bank(number, tasks[0])
        if len(tasks) > 1:
            chosen_N = self.identified(number, tasks)
            for task in tasks[1:]:
                logits_NC = torch.where((chosen_N == task)[:, None], self._of_bank(number, task), logits_NC)
        return logits_NC

    def _of_bank(self, number: int, task: int) -> Tensor:
        """`(N, C)` of the sequence's classes, those of other tasks at minus infinity."""
        own_NC = self._logits(number, task)
        logits_NC = own_NC.new_full((len(own_NC), len(self.data.sequence.classes)), -torch.inf)
        logits_NC[:, list(self.data.sequence.tasks[task].classes)] = own_NC
        return logits_NC

    def _logits(self, number: int, task: int) -> Tensor:
        # A bank never changes, and neither do the examples: what it says of them is asked once.
        if (number, task) not in self._said:
            self.banked.use(self.before + task)
            self._said[number, task] = logits_of(self.model, self.data.heldout[number], dtype=self.data.dtype)
        return self._said[number, task]

    def doubt(self, number: int, task: int, by_views: bool) -> Tensor:
        logits_NC = self._logits(number, task)
        if by_views:
            self.banked.use(self.before + task)
            others = (self._view(number, view) for view in range(self.method.views))
            made = (logits_of(self.model, view, dtype=self.data.dtype) for view in others)
            logits_NC = over_views(logits_NC, made, self.method.plain_views)
        return entropies(logits_NC, self.method.temperature)

    def _view(self, number: int, view: int) -> Examples:
        """A task's held-out examples, augmented in ways that every bank is shown alike."""
        examples, count = self.data.heldout[number], len(self.data.sequence.tasks)
        seed = (self.data.seed * count + number) * self.method.views + view
        images_NCHW = torch.from_numpy(examples.images_NCHW)
        how = self.data.policy(number, self.method.augment_views)
        return replace(examples, images_NCHW=augmented(images_NCHW, how, seed=seed).numpy())
