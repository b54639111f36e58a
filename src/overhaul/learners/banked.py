"""Learning with a bank for each task: nothing of an older task is touched, so nothing of it is forgotten."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from overhaul import journal
from overhaul.banks import Banked, Sockets
from overhaul.errors import UserError
from overhaul.identify import entropies
from overhaul.learners.learner import Learner
from overhaul.objective import ClassCrossEntropy, Objective, ParameterNorms
from overhaul.optim.build import build
from overhaul.schedules import schedule
from overhaul.task_scores import logits_of
from overhaul.train import Plan
from overhaul.watch import InEvaluation

if TYPE_CHECKING:
    from overhaul.banking import BankLearning
    from overhaul.task_data import TaskData


class BankLearner(Learner):
    """Trains a bank for each task, and finds the task of an example that comes without it.

    Args:
        method: how.
        model: the frozen model, into which the sockets go.
        data: the tasks.
        sockets: where banks go.

    Raises:
        UserError: the model has no place for them, or its directory has a bank for a task of the same name.
    """

    def __init__(self, method: BankLearning, model: nn.Module, data: TaskData, sockets: Sockets) -> None:
        super().__init__(model, data)
        self.method, self.banked = method, Banked(model, sockets)
        if (start := method.start) is not None:
            self.banked.read(start)
        self.before = len(self.banked.banks)
        there = {bank.name for bank in self.banked.banks}
        if twice := [task.name for task in data.sequence.tasks if task.name in there]:
            raise UserError(f"there is a bank for a task named {twice[0]} already", allowed="tasks with other names")
        self._said: dict[tuple[int, int], Tensor] = {}
        self._doubts: dict[tuple[int, int], Tensor] = {}

    def begin(self, number: int) -> None:
        """Puts new tensors in; what is drawn at random until the next task begins is the task's own."""
        sequence = self.data.sequence
        torch.manual_seed(self._seed(number))
        self.banked.begin([sequence.classes[place] for place in sequence.tasks[number].classes])

    def _seed(self, number: int) -> int:
        """By the run's seed and the task's name, so that a task's bank is the same wherever in an order it stands."""
        told = f"{self.data.seed}\n{self.data.sequence.tasks[number].name}"
        return int.from_bytes(hashlib.sha256(told.encode()).digest()[:4], "big")

    def plan(self, number: int) -> Plan:
        """Cross-entropy among the task's own classes, on what is its own."""
        method, trained = self.method, self.banked.parameters()
        self.model.requires_grad_(False)
        for parameter in trained:
            parameter.requires_grad_(True)
        objective: Objective = ClassCrossEntropy()
        if method.norm_penalty:
            objective += method.norm_penalty * ParameterNorms(trained)
        return Plan(
            model=self.model,
            objective=objective,
            stream=self.data.batches(number, batch_size=method.batch_size, own_labels=True, seed=self._seed(number)),
            optimizer=build(method, trained, model=self.model),
            schedule=schedule(method.schedule, method.warmup),
            watchers=(InEvaluation(self._frozen_statistics()),),
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
        self.banked.keep(self.data.sequence.tasks[number].name)

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

    def identified(self, number: int, tasks: Sequence[int]) -> Tensor:
        """`(N,)`: of a task's held-out examples, the task among some that each is taken for."""
        doubts_TN = torch.stack([self._doubt(number, task) for task in tasks])
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

    def _doubt(self, number: int, task: int) -> Tensor:
        if (number, task) not in self._doubts:
            self._doubts[number, task] = entropies(self._logits(number, task), self.method.temperature)
        return self._doubts[number, task]

    def end(self) -> None:
        """Leaves the frozen model, its banks beside it, and how well tasks were told."""
        names = [task.name for task in self.data.sequence.tasks]
        if len(names) > 1:
            rows = [(name, *self._shares(number)) for number, name in enumerate(names)]
            journal.note_table("Which task examples were taken for, each row a task", ("", *names), rows)
        self.banked.note()
        self.banked.restore()

    def _shares(self, number: int) -> list[str]:
        tasks = range(len(self.data.sequence.tasks))
        chosen_N = self.identified(number, tasks)
        return [f"{float((chosen_N == task).double().mean()):.1%}" for task in tasks]
