"""Learning with a bank for each task: nothing of an older task is touched, so nothing of it is forgotten."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from overhaul import journal
from overhaul.augment import augmented, policy
from overhaul.banks import Banked, Sockets
from overhaul.errors import UserError
from overhaul.evaluate import wilson_interval
from overhaul.identify import entropies, over_views
from overhaul.interop.classifier import set_classes
from overhaul.learners.learner import Learner
from overhaul.learners.similarity import similarity
from overhaul.objective import ClassCrossEntropy, Objective, ParameterNorms
from overhaul.optim.build import build
from overhaul.schedules import schedule
from overhaul.table import Row
from overhaul.task_scores import logits_of
from overhaul.train import Plan
from overhaul.watch import InEvaluation

if TYPE_CHECKING:
    from overhaul.banking import BankLearning
    from overhaul.task_data import Examples, TaskData

Parent = Literal["none", "first", "most_similar"]


class BankLearner(Learner):
    """Trains a bank for each task, and finds the task of an example that comes without it.

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
        super().__init__(model, data)
        self.method, self.parent, self.banked = method, parent, Banked(model, sockets)
        if (start := method.start) is not None:
            self.banked.read(start)
        self.before = len(self.banked.banks)
        there = {bank.name for bank in self.banked.banks}
        if twice := [task.name for task in data.sequence.tasks if task.name in there]:
            raise UserError(f"there is a bank for a task named {twice[0]} already", allowed="tasks with other names")
        self.whole_first = whole_first and not self.before
        self._said: dict[tuple[int, int], Tensor] = {}
        self._doubts: dict[tuple[int, int, bool], Tensor] = {}
        self._similar: dict[int, list[float]] = {}

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

    def _is_whole(self, number: int) -> bool:
        return self.whole_first and number == 0

    def _parent_of(self, number: int) -> int | None:
        """The place of the bank that a task begins as."""
        there = range(len(self.banked.banks))
        if self.parent == "none" or not there:
            return None
        if self.parent == "first":
            return 0
        similar = self._similar[number] = []
        for place in there:
            self.banked.use(place)
            how: Any = {"dtype": self.data.dtype, "seed": self.data.seed}
            similar.append(similarity(self.model, self.data.train[number], **how))
        return similar.index(max(similar))

    def _seed(self, number: int) -> int:
        """By the run's seed and the task's name, so that a task's bank is the same wherever in an order it stands."""
        told = f"{self.data.seed}\n{self.data.sequence.tasks[number].name}"
        return int.from_bytes(hashlib.sha256(told.encode()).digest()[:4], "big")

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
            stream=self.data.batches(number, batch_size=method.batch_size, own_labels=True, seed=self._seed(number)),
            optimizer=build(method, trained, model=self.model),
            schedule=schedule(method.schedule, method.warmup),
            watchers=() if whole else (InEvaluation(self._frozen_statistics()),),
            steps=method.steps_of(self.data, number),
            unit="images",
        )

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

    def kept_bytes(self) -> dict[str, int]:
        return {"banks": sum(bank.nbytes for bank in self.banked.banks)}

    def answers(self, number: int, tasks: Sequence[int]) -> Tensor:
        """Each example's, by the bank of the task among `tasks` that is the least in doubt about it."""
        logits_NC = self._of_bank(number, tasks[0])
        if len(tasks) > 1:
            chosen_N = self.identified(number, tasks)
            for task in tasks[1:]:
                logits_NC = torch.where((chosen_N == task)[:, None], self._of_bank(number, task), logits_NC)
        return logits_NC

    def identified(self, number: int, tasks: Sequence[int], *, by_views: bool = True) -> Tensor:
        """`(N,)`: of a task's held-out examples, the task among some that each is taken for.

        Args:
            number: of the task whose examples they are.
            tasks: among which is chosen.
            by_views: whether other views of an example count as well, where the method has any.
        """
        doubts_TN = torch.stack([self._doubt(number, task, by_views and self.method.views > 0) for task in tasks])
        return torch.tensor(list(tasks))[doubts_TN.argmin(dim=0)]

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

    def _doubt(self, number: int, task: int, by_views: bool) -> Tensor:
        if (at := (number, task, by_views)) not in self._doubts:
            logits_NC = self._logits(number, task)
            if by_views:
                self.banked.use(self.before + task)
                others = (self._view(number, view) for view in range(self.method.views))
                made = (logits_of(self.model, view, dtype=self.data.dtype) for view in others)
                logits_NC = over_views(logits_NC, made, self.method.plain_views)
            self._doubts[at] = entropies(logits_NC, self.method.temperature)
        return self._doubts[at]

    def _view(self, number: int, view: int) -> Examples:
        """A task's held-out examples, augmented in ways that every bank is shown alike."""
        examples, count = self.data.heldout[number], len(self.data.sequence.tasks)
        seed = (self.data.seed * count + number) * self.method.views + view
        images_NCHW = torch.from_numpy(examples.images_NCHW)
        how = policy(self.method.augment, images_NCHW.shape[1])
        return replace(examples, images_NCHW=augmented(images_NCHW, how, seed=seed).numpy())

    def end(self) -> None:
        """Leaves the frozen model, its banks beside it, and how well tasks were told."""
        if len(self.data.sequence.tasks) > 1:
            self._note_identified()
        if self.parent != "none":
            self._note_parents()
        self.banked.note()
        self.banked.restore()

    def _note_identified(self) -> None:
        """The confusion of tasks, and the share of examples whose task was told, by one view and by several."""
        names = [task.name for task in self.data.sequence.tasks]
        tasks = range(len(names))
        views = f"{self.method.plain_views + self.method.views} views"
        ways = {"one view": False} | ({views: True} if self.method.views else {})
        taken = {way: [self._taken_for(number, by) for number in tasks] for way, by in ways.items()}
        for way, counts_TT in taken.items():
            right, count = sum(counts_T[n] for n, counts_T in enumerate(counts_TT)), sum(map(sum, counts_TT))
            low, high = wilson_interval(right, count)
            what: Any = {"model": self.data.model, "metric": f"tasks told, {way}", "count": count}
            journal.note_metric(Row(value=right / count, low=low, high=high, **what))
        rows = [
            (name, *(" / ".join(_share(counts_TT[n], other) for counts_TT in taken.values()) for other in tasks))
            for n, name in enumerate(names)
        ]  # fmt: skip
        by = f": by {' / by '.join(ways)}" if len(ways) > 1 else ""
        journal.note_table(f"Which task examples were taken for, each row a task{by}", ("", *names), rows)

    def _taken_for(self, number: int, by_views: bool) -> list[int]:
        """Of a task's held-out examples, how many are taken for each task."""
        tasks = range(len(self.data.sequence.tasks))
        chosen_N = self.identified(number, tasks, by_views=by_views)
        return [int((chosen_N == task).sum()) for task in tasks]

    def _note_parents(self) -> None:
        """What each task began as, and what it could have begun as."""
        banks, most = self.banked.banks, max(map(len, self._similar.values()), default=0)
        rows = [
            (
                bank.name,
                bank.parent or ("the whole model" if self._is_whole(number) else "the frozen model"),
                *(f"{s:.1%}" for s in similar),
                *[""] * (most - len(similar)),
            )
            for number, bank in enumerate(banks[self.before :])
            for similar in [self._similar.get(number, [])]
        ]
        title = "What each task began as" + (", and how well its classes lie apart in each model" if most else "")
        journal.note_table(title, ("", "began as", *(bank.name for bank in banks[:most])), rows)


def _share(counts_T: Sequence[int], task: int) -> str:
    return f"{counts_T[task] / sum(counts_T):.1%}"
