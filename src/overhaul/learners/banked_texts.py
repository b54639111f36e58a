"""Learning texts with a bank for each beside a frozen language model. Ours: the papers' banks are of images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from overhaul import machine
from overhaul.banks import Sockets
from overhaul.learners.keeping import BankKeeper, Parent
from overhaul.learners.text import Losses, note_told
from overhaul.objective import CrossEntropy, Forward, Objective, ParameterNorms
from overhaul.optim.build import build
from overhaul.schedules import schedule
from overhaul.text_banks import TELLING, doubts
from overhaul.text_task_data import Said, TextTaskData
from overhaul.train import Plan

if TYPE_CHECKING:
    from overhaul.banking import BankLearning

NEAR_BATCHES = 4
"""Of a new text, by whose loss the nearest bank is chosen."""


class TextBankLearner(BankKeeper):
    """Trains a bank for each text, and reads a text that comes without its task by the bank that doubts it least.

    Args:
        method: how.
        model: the frozen language model, into which the sockets go.
        data: the tasks.
        sockets: where banks go.
        parent: the bank that a task begins as: none, but the frozen model; the first one; or the one under which the
            loss on the new text is lowest.

    Raises:
        UserError: the model has no place for them, or its directory has a bank for a task of the same name.
    """

    data: TextTaskData  # pyright: ignore[reportIncompatibleVariableOverride]
    nearness_is = "the loss on its text under each bank, nats a token"

    def __init__(
        self, method: BankLearning, model: nn.Module, data: TextTaskData, sockets: Sockets, *, parent: Parent = "none"
    ) -> None:
        super().__init__(method, model, data, sockets, parent=parent)
        self.losses = Losses(data)
        self._of_bank: dict[tuple[int, int], Said] = {}

    def begin(self, number: int) -> None:
        """Puts new tensors in; what is drawn at random until the next task begins is the task's own."""
        if number == 0:
            self.losses.take(partial(self.data.said, self.model), "before")
        torch.manual_seed(self._seed(number))
        self.banked.begin(parent=self._parent_of(number))

    @torch.no_grad()
    def nearness(self, number: int) -> float:
        term, total, count, device = CrossEntropy(), 0.0, 0, next(self.model.parameters()).device
        self.model.eval()
        for batch in islice(self.data.batches(number, self.method, seed=self._seed(number)), NEAR_BATCHES):
            placed = {name: tensor.to(device) for name, tensor in batch.items()}
            with machine.autocast(device, self.data.dtype):
                total += float(term.total(Forward(self.model, placed), placed))
            count += term.count(placed)
        return -total / max(count, 1)

    def shown(self, nearness: float) -> str:
        return f"{-nearness:.4f}"

    def plan(self, number: int) -> Plan:
        """Next-token cross-entropy, on what is the task's own."""
        method, trained = self.method, self.banked.parameters()
        self.model.requires_grad_(False)
        for parameter in trained:
            parameter.requires_grad_(True)
        objective: Objective = CrossEntropy()
        if method.norm_penalty:
            objective += method.norm_penalty * ParameterNorms(trained)
        return Plan(
            model=self.model,
            objective=objective,
            stream=self.data.batches(number, method, seed=self._seed(number)),
            optimizer=build(method, trained, model=self.model),
            schedule=schedule(method.schedule, method.warmup),
            steps=method.steps_of(self.data, number),  # pyright: ignore[reportArgumentType]
        )

    def learnt(self, number: int) -> None:
        self.banked.keep(self.data.sequence.tasks[number].name, {TELLING: asdict(self.method.telling())})
        learnt = range(number + 1)
        self.losses.take(lambda task: self.said(task, learnt), f"after {self.data.sequence.tasks[number].name}")

    def right(self, number: int, tasks: Sequence[int]) -> Tensor:
        return self.said(number, tasks).right_N

    def said(self, number: int, tasks: Sequence[int]) -> Said:
        """What is said of a task's held-out texts, of each by the bank among some that doubts it least.

        Args:
            number: of the task whose texts they are.
            tasks: whose banks may be used; one alone is the task, told.
        """
        if len(tasks) == 1:
            return self._said_by(number, tasks[0])
        chosen_N = self.identified(number, tasks)
        each = {task: self._said_by(number, task) for task in chosen_N.unique().tolist()}
        picked = [(each[task].right_N[row], each[task].nll_N[row]) for row, task in enumerate(chosen_N.tolist())]
        return Said(*(torch.stack(column) for column in zip(*picked, strict=True)))

    def _said_by(self, number: int, task: int) -> Said:
        # A bank never changes, and neither do the texts: what it says of them is asked once.
        if (number, task) not in self._of_bank:
            self.banked.use(self.before + task)
            self._of_bank[number, task] = self.data.said(self.model, number)
        return self._of_bank[number, task]

    def doubt(self, number: int, task: int, by_views: bool) -> Tensor:
        how = self.method.telling()
        self.banked.use(self.before + task)
        self.model.eval()
        with machine.autocast(next(self.model.parameters()).device, self.data.dtype):
            return doubts(self.model, self.data.asked(number), how if by_views else replace(how, views=0))

    def end(self) -> None:
        self.losses.tell()
        note_told(self.data, self.said, ", by the bank of the task and by the one that was told")
        super().end()
