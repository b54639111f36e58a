"""What rehearsal-free learning keeps from task to task: the model before, its weights, how far features have moved."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from overhaul import journal, machine
from overhaul.cka import linear_cka
from overhaul.continual import FeaturesKept, OldSigmoids
from overhaul.interop.classifier import PENULTIMATE, classified
from overhaul.learners.before import Before
from overhaul.learners.learner import SharedLearner
from overhaul.objective import BinaryCrossEntropy, ClassCrossEntropy, Objective

if TYPE_CHECKING:
    from overhaul.learn.rehearsal_free import RehearsalFree
    from overhaul.task_data import TaskData


class RehearsalFreeLearner(SharedLearner):
    """The four regularisers of Smith et al. (2023), each held to the model at the end of the task before."""

    def __init__(self, method: RehearsalFree, model: nn.Module, data: TaskData) -> None:
        super().__init__(method, model, data)
        self.settings = method
        self.before = Before()
        first = data.heldout[0]
        some = np.arange(min(method.drift_examples, len(first)))
        self.drift = FeatureDrift(list(first.in_order(some)), data.dtype)

    def objective(self, number: int) -> Objective:
        """The loss of new classes, and the terms; in the first task there is nothing to hold to but given weights."""
        method, classes = self.settings, self.data.sequence.tasks[number].classes
        total: Objective = BinaryCrossEntropy(classes) if method.head == "binary" else ClassCrossEntropy()
        old = self.before.model
        if old is not None and method.predictions:
            kept = (
                OldSigmoids(old, self.data.sequence.num_classes(number))
                if method.head == "binary"
                else self.answering.old_model(old, number, method.kd_temperature)
            )
            total += method.predictions * kept
        if old is not None and method.features:
            total += method.features * FeaturesKept(old, method.feature_layer or PENULTIMATE)
        if number == 0 and method.weight_term == "l2" and method.anchor_first:
            # A head that was just made is no place to stay near.
            self.before.keep_weights(self.model, self.trained - self.head)
        if pull := self.before.pull(by_information=method.weight_term == "ewc"):
            # The paper's penalty has no half, which the divergence has.
            total += 2 * method.weights * pull
        return total

    def learnt(self, number: int) -> None:
        super().learnt(number)
        method = self.settings
        self.drift.note(self.model, self.data.sequence.tasks[number].name)
        if number + 1 == len(self.data.sequence.tasks):
            return
        if method.predictions or method.features:
            self.before.keep_model(self.model)
        if method.weight_term != "none":
            self.before.keep_weights(self.model, self.trained)
        if method.weight_term == "ewc":
            self.free()  # a finished plan has frozen what is trained
            found = self.answering.information(number, method.fisher, method.fisher_examples)
            self.before.add_information(found, keep=method.fisher_decay)

    def kept_bytes(self) -> dict[str, int]:
        return self.before.kept_bytes()

    def end(self) -> None:
        super().end()
        self.drift.tell()


class FeatureDrift:
    """How alike a model's features of the same examples are after each task and after the first.

    Args:
        batches: the examples.
        dtype: of matrix products.
    """

    def __init__(self, batches: Sequence[Mapping[str, Tensor]], dtype: torch.dtype) -> None:
        self.batches, self.dtype = batches, dtype
        self.first: dict[str, Tensor] = {}
        self.rows: list[tuple[str, list[float]]] = []

    @torch.no_grad()
    def note(self, model: nn.Module, task: str) -> None:
        """Compares the features now, after a task; those after the first are what others are compared with."""
        device = next(model.parameters()).device
        model.eval()
        layers = list(self.first) or layers_of(model)
        found: dict[str, list[Tensor]] = {name: [] for name in layers}
        for batch in self.batches:
            with machine.autocast(device, self.dtype):
                told = classified(model, {name: tensor.to(device) for name, tensor in batch.items()}, layers).features
            for name, parts in found.items():
                parts.append(told[name].float().cpu())
        features = {name: torch.cat(parts) for name, parts in found.items()}
        if not self.first:
            self.first = features
        else:
            self.rows.append((task, [linear_cka(self.first[name], now) for name, now in features.items()]))

    def tell(self) -> None:
        """The table for the report; nothing of one task."""
        if self.rows:
            columns = ("after", *(name or "what the head reads" for name in self.first))
            rows = [(task, *("same for all" if a != a else f"{a:.3f}" for a in alike)) for task, alike in self.rows]
            title = "Features of the first task's examples against those after it: linear CKA, 1 is unmoved"
            journal.note_table(title, columns, rows)


def layers_of(model: nn.Module) -> list[str]:
    """The blocks of a network, which are those of lists of modules inside no other list; and what its head reads."""
    lists = [name for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    outer = [name for name in lists if not any(name.startswith(f"{other}.") for other in lists)]
    blocks = [f"{name}.{number}" for name in outer for number in range(len(model.get_submodule(name)))]  # pyright: ignore[reportArgumentType]
    return [*blocks, PENULTIMATE]
