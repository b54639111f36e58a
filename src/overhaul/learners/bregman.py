"""What learning under one objective keeps from task to task: memory, weights and their spread, the model before."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from overhaul.artifact import POSTERIOR
from overhaul.continual import (
    Believed,
    Focused,
    LogitsKept,
    PredictionsKept,
    Remembering,
    Uniform,
    with_logits,
)
from overhaul.fisher import grown
from overhaul.journal import note_tensors
from overhaul.layers.variational import Distribution, distributions
from overhaul.learners.before import Before
from overhaul.learners.learner import SharedLearner
from overhaul.learners.text import TextKept
from overhaul.objective import Objective
from overhaul.optim.refresh import Refresh, langevin, released
from overhaul.posterior import Posterior
from overhaul.reservoir import Reservoir, WithMemory
from overhaul.task_scores import logits_of

if TYPE_CHECKING:
    from overhaul.learn.bregman import Bregman
    from overhaul.stream import Stream
    from overhaul.task_data import TaskData


class BregmanLearner(SharedLearner):
    """The memory, the weights and the model before, and their Fisher information."""

    def __init__(self, method: Bregman, model: nn.Module, data: TaskData) -> None:
        super().__init__(method, model, data)
        self.method = method
        self.memory: Reservoir = Reservoir(method.memory, seed=data.seed)
        self.before = Before()
        self.posterior = Posterior(
            prior_std=method.prior_std, first_std=method.first_std, from_given=method.prior == "given"
        )
        self.held: dict[str, Distribution] = {}

    def prepare(self) -> None:
        if self.method.weight_term == "vcl":
            self.held = self.posterior.begin(self.model)

    def finish(self, model: nn.Module) -> nn.Module:
        return self.posterior.end(model) if self.held else model

    def free(self) -> None:
        super().free()
        for name, (_, log_std) in distributions(self.model).items():
            log_std.requires_grad_(name in self.trained)

    def objective(self, number: int) -> Objective:
        """Cross-entropy over all classes so far, with the terms."""
        objective = Focused(self._objective(number), "cross_entropy")
        joined = self.method.passes == "joined"
        return Remembering(objective, self.memory, joined=joined) if self._offers else objective

    @property
    def _offers(self) -> bool:
        """Whether the memory is offered every batch."""
        return self.method.remembers and self.method.output_term != "fdr"

    def optimizer(self, number: int, objective: Objective) -> torch.optim.Optimizer:
        """With unlearning where that was asked for."""
        optimizer = super().optimizer(number, objective)
        focused = objective.inner if isinstance(objective, Remembering) else objective
        assert isinstance(focused, Focused)
        asked, by_name = self.method.refresh, dict(self.model.named_parameters())
        if not asked.every:
            return optimizer
        known: dict[Any, Tensor] = {
            by_name[name]: grown(tensor, by_name[name].shape)
            for name, tensor in (self.before.information or {}).items()
        }
        # Weights are unlearnt, not how sure they are: infinite information holds a parameter where it is.
        known |= {log_std: torch.tensor(torch.inf) for _, log_std in distributions(self.model).values()}
        how = asked.model_dump(include={"rate", "noise", "damping"})

        def up(weight: Tensor, gradient: Tensor, fisher: Tensor | float, normal: Tensor) -> Tensor:
            if asked.form == "paper":
                return langevin(gradient, fisher, normal=normal, **how)
            return released(weight, gradient, fisher, normal=normal, **how)

        return Refresh(
            optimizer,
            up,
            every=asked.every,
            times=asked.times,
            fisher=lambda: known,
            buffers=list(self.model.buffers()),
            focus=contextlib.nullcontext if asked.form == "paper" else focused.alone,
            seed=self.data.seed * len(self.data.sequence.tasks) + number,
        )

    def stream(self, number: int) -> Stream:
        method, batches = self.method, self.answering.stream(number)
        if method.remembers:
            draws = 2 if method.output_term == "der++" else 1
            count = method.memory_batch or method.batch_size
            batches = WithMemory(batches, self.memory, count=count, draws=draws)
        return self.answering.shown(batches, number, offers=self._offers)

    def _objective(self, number: int) -> Objective:
        method, answering, old = self.method, self.answering, self.before.model
        objective: Objective = answering.loss(passes=method.samples if self.held else 1)
        match method.output_term:
            case "er":
                objective += method.alpha * answering.replayed()
            case "der":
                objective += method.alpha * LogitsKept()
            case "der++":
                objective = objective + method.alpha * LogitsKept(1) + method.label_weight * answering.replayed(2)
            case "fdr":
                objective += method.alpha * PredictionsKept()
            case "cpr":
                objective += method.alpha * Uniform(self.data.sequence.num_classes(number + 1))
            case "lwf" if old is not None:
                objective += method.alpha * answering.old_model(old, number, method.temperature)
            case "kl-replay" if old is not None:
                objective += method.alpha * TextKept(old, method.temperature)
        if pull := self.before.pull(by_information=method.weight_term == "ewc"):
            objective += method.beta * pull
        if self.held:
            objective += method.beta / len(self.data.train[number]) * Believed(self.held)
        return objective

    def learnt(self, number: int) -> None:
        """Keeps the weights, their Fisher information and the model, where a later task is held to them."""
        super().learnt(number)
        method, later = self.method, number + 1 < len(self.data.sequence.tasks)
        if not later:
            if method.weight_term == "vcl":
                note_tensors(POSTERIOR, self.posterior.stds(), {"holds": "standard deviations"})
            return
        if method.output_term == "fdr":
            self._remember(number)
        if method.output_term in ("lwf", "kl-replay"):
            self.before.keep_model(self.model)
        self.free()  # a finished plan has frozen what is trained
        if method.weight_term in ("l2", "ewc"):
            self.before.keep_weights(self.model, self.trained)
        if method.informed:
            found = self.answering.information(number, method.fisher, method.fisher_examples)
            self.before.add_information(found, keep=method.fisher_decay)

    def kept_bytes(self) -> dict[str, int]:
        held = {
            "memory": self.memory.nbytes,
            "distributions": sum(tensor.nbytes for both in self.posterior.known.values() for tensor in both),
        }
        return {name: size for name, size in held.items() if size} | self.before.kept_bytes()

    def _remember(self, number: int) -> None:
        """Offers the memory a task's examples, with the logits of the model as it is now."""
        examples = self.data.train[number]
        logits_NC = logits_of(self.model, examples, dtype=self.data.dtype)
        offered = examples if self.method.augment == "none" else examples.as_bytes()
        for batch, logits_BC in zip(offered.in_order(), torch.split(logits_NC, offered.at_once), strict=True):
            self.memory.insert(with_logits(batch, logits_BC))
