"""Learning texts one after the other, with a language model: its terms, its Fisher information, its losses."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from overhaul import journal
from overhaul.continual import OnMemory
from overhaul.distillation import Distill
from overhaul.objective import Batch, CrossEntropy, Forward, Term
from overhaul.reservoir import remembered
from overhaul.text_task_data import Said, TextTaskData


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


class Losses:
    """What a language model says of every text, before the first task and after each.

    Args:
        data: the tasks.
    """

    def __init__(self, data: TextTaskData) -> None:
        self.data = data
        self.rows: list[tuple[str, list[float]]] = []
        self._said: dict[int, Said] = {}

    def forget(self) -> None:
        """The model is another one from now on."""
        self._said.clear()

    def said(self, model: nn.Module, number: int) -> Said:
        """What it says of a task's held-out text, asked once."""
        if number not in self._said:
            self._said[number] = self.data.said(model, number)
        return self._said[number]

    def note(self, model: nn.Module, when: str) -> None:
        """Takes the loss on all texts."""
        numbers = range(len(self.data.sequence.tasks))
        self.rows.append((when, [float(self.said(model, number).nll_N.double().mean()) for number in numbers]))

    def tell(self) -> None:
        """The table for the report: a column for each text."""
        names = [task.name for task in self.data.sequence.tasks]
        rows = [(when, *(f"{loss:.4f}" for loss in losses)) for when, losses in self.rows]
        journal.note_table("Held-out loss on every text, nats a token", ("", *names), rows)
