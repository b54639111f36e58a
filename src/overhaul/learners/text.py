"""Learning texts one after the other, with a language model: its terms, its Fisher information, what it says."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from overhaul import journal
from overhaul.continual import OnMemory
from overhaul.distillation import Distill
from overhaul.fisher import Labels
from overhaul.learners.answering import Answering
from overhaul.objective import Batch, CrossEntropy, Forward, Term
from overhaul.reservoir import remembered
from overhaul.stream import Stream
from overhaul.text_task_data import Said, TextTaskData

if TYPE_CHECKING:
    from overhaul.learning import SharedLearning


class ReplayedText(OnMemory):
    """Experience replay of text: next-token cross-entropy of remembered windows."""

    name = "replayed"
    on_each: Term = CrossEntropy()
    """What is taken of them."""

    def total(self, forward: Forward, batch: Batch) -> Tensor:
        if not self.count(batch):
            return next(forward.model.parameters()).new_zeros((), dtype=torch.float32)
        beside = forward.beside(f"draw {self.draw}", remembered(batch, self.draw))
        return self.on_each.total(beside, beside.batch)

    def count(self, batch: Batch) -> int:
        drawn = remembered(batch, self.draw)
        return self.on_each.count(drawn) if drawn else 0


class TextKept(ReplayedText):
    """The divergence of a language model from the one before the task, on remembered windows: `KL(old || network)`.

    Args:
        old: the model before the task, frozen.
        temperature: that both models' logits are divided by.
        draw: as in `OnMemory`.
    """

    name = "old_text_kept"

    def __init__(self, old: nn.Module, temperature: float = 1.0, draw: int = 1) -> None:
        super().__init__(draw)
        self.old, self.on_each = old, Distill(old, temperature=temperature)

    def held_bytes(self) -> int:
        return sum(p.nbytes for p in self.old.parameters())


def diagonal_of_text(model: nn.Module, windows: Iterable[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """The empirical one of a language model: squared gradients of a window's mean log-likelihood a token, averaged.

    Args:
        model: a causal language model.
        windows: batches of one window each, `{"input_ids": (1, T), "labels": (1, T)}`.

    Returns:
        As `diagonal`.

    Raises:
        ValueError: there is no window.
    """
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    device, objective, count = next(model.parameters()).device, CrossEntropy(), 0
    found = {name: torch.zeros_like(p, dtype=torch.float32) for name, p in trained.items()}
    for window in windows:
        batch = {name: tensor.to(device) for name, tensor in window.items()}
        loss = objective.total(Forward(model, batch), batch) / max(objective.count(batch), 1)
        gradients = torch.autograd.grad(loss, list(trained.values()), allow_unused=True)
        for name, gradient in zip(trained, gradients, strict=True):
            if gradient is not None:
                found[name] += gradient.float().square()
        count += 1
    if not count:
        raise ValueError("no window to take the Fisher information from")
    return {name: total / count for name, total in found.items()}


class ByWord(Answering):
    """A language model, which is not told the task and chooses among all words; it can be asked of any text.

    What it says of every text is noted before the first task and after each.
    """

    unit = "tokens"
    beforehand = True
    data: TextTaskData

    def __init__(self, method: SharedLearning, model: nn.Module, data: TextTaskData) -> None:
        super().__init__(method, model, data)
        self.losses = Losses(data)
        self._said: dict[int, Said] = {}

    def begin(self, number: int) -> tuple[str, ...]:
        if number == 0:
            self.losses.take(self.said, "before")
        return ()

    def forget(self) -> None:
        self._said.clear()

    def said(self, number: int) -> Said:
        """What it says of a task's held-out text, asked once."""
        if number not in self._said:
            self._said[number] = self.data.said(self.model, number)
        return self._said[number]

    def right(self, number: int, tasks: Sequence[int]) -> Tensor:
        return self.said(number).right_N

    def learnt(self, number: int) -> None:
        self.losses.take(self.said, f"after {self.data.sequence.tasks[number].name}")

    def end(self) -> None:
        self.losses.tell()

    def stream(self, number: int) -> Stream:
        return self.data.batches(number, self.method)

    def loss(self, passes: int = 1) -> Term:
        assert passes == 1, "weights that are drawn anew in each are of classifiers"
        return CrossEntropy()

    def replayed(self, draw: int = 1) -> Term:
        return ReplayedText(draw)

    def old_model(self, old: nn.Module, number: int, temperature: float) -> Term:
        return Distill(old, temperature=temperature)

    def information(self, number: int, labels: Labels, count: int) -> dict[str, Tensor]:
        """From the first windows of a task."""
        assert labels == "empirical", "of a language model all words are labels"
        windows = (
            {name: tensor[row : row + 1] for name, tensor in batch.items()}
            for batch in self.stream(number)
            for row in range(len(batch["labels"]))
        )
        return diagonal_of_text(self.model.eval(), itertools.islice(windows, count))


class Losses:
    """Losses on every text, before the first task and after each.

    Args:
        data: the tasks.
    """

    def __init__(self, data: TextTaskData) -> None:
        self.data = data
        self.rows: list[tuple[str, list[float]]] = []

    def take(self, said: Callable[[int], Said], when: str) -> None:
        """Takes the losses on all texts.

        Args:
            said: what is said of a task's held-out text.
            when: between which tasks.
        """
        numbers = range(len(self.data.sequence.tasks))
        self.rows.append((when, [float(said(number).nll_N.double().mean()) for number in numbers]))

    def tell(self) -> None:
        """The table for the report: a column for each text."""
        names = [task.name for task in self.data.sequence.tasks]
        rows = [(when, *(f"{loss:.4f}" for loss in losses)) for when, losses in self.rows]
        journal.note_table("Held-out loss on every text, nats a token", ("", *names), rows)


def note_told(data: TextTaskData, said: Callable[[int, Sequence[int]], Said], more: str = "") -> None:
    """The table for the report: the loss on every text where the task is told, and where it is not.

    Args:
        data: the tasks.
        said: what is said of a task's held-out text when what was learnt of some tasks may be used.
        more: the end of the title.
    """
    names = [task.name for task in data.sequence.tasks]
    rows = []
    for number, name in enumerate(names):
        told, untold = (float(said(number, tasks).nll_N.mean()) for tasks in ((number,), range(len(names))))
        rows.append((name, f"{told:.4f}", f"{untold:.4f}"))
    journal.note_table(f"Held-out loss in nats a token{more}", ("", "task told", "task not told"), rows)
