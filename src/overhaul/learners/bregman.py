"""What learning under one objective keeps from task to task: memory, weights and their spread, the model before."""

from __future__ import annotations

import contextlib
import copy
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from overhaul.artifact import POSTERIOR
from overhaul.continual import (
    Believed,
    Focused,
    LogitsKept,
    PredictionsKept,
    Pulled,
    Remembering,
    Uniform,
    with_logits,
)
from overhaul.fisher import grown, joined
from overhaul.journal import note_tensors
from overhaul.layers.variational import Distribution, distributions
from overhaul.learners.learner import SharedLearner
from overhaul.learners.text import TextKept
from overhaul.objective import Objective
from overhaul.optim.refresh import Refresh, langevin, released
from overhaul.posterior import Posterior
from overhaul.reservoir import Reservoir, WithMemory
from overhaul.task_data import SCORED_AT_ONCE
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
        self.anchor: dict[str, Tensor] | None = None
        self.known: dict[str, Tensor] | None = None
        self.old: nn.Module | None = None
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
        remembers = self.method.remembers and self.method.output_term != "fdr"
        joined = self.method.passes == "joined"
        return Remembering(objective, self.memory, joined=joined) if remembers else objective

    def optimizer(self, number: int, objective: Objective) -> torch.optim.Optimizer:
        """With unlearning where that was asked for."""
        optimizer = super().optimizer(number, objective)
        focused = objective.inner if isinstance(objective, Remembering) else objective
        assert isinstance(focused, Focused)
        asked, by_name = self.method.refresh, dict(self.model.named_parameters())
        if not asked.every:
            return optimizer
        known: dict[Any, Tensor] = {
            by_name[name]: grown(tensor, by_name[name].shape) for name, tensor in (self.known or {}).items()
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
        method, batches = self.method, super().stream(number)
        if not method.remembers:
            return batches
        draws = 2 if method.output_term == "der++" else 1
        return WithMemory(batches, self.memory, count=method.memory_batch or method.batch_size, draws=draws)

    def _objective(self, number: int) -> Objective:
        method, answering = self.method, self.answering
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
            case "lwf" if self.old is not None:
                objective += method.alpha * answering.old_model(self.old, number, method.temperature)
            case "kl-replay" if self.old is not None:
                objective += method.alpha * TextKept(self.old, method.temperature)
        objective = self._with_weights(objective)
        if self.held:
            objective += method.beta / len(self.data.train[number]) * Believed(self.held)
        return objective

    def _with_weights(self, objective: Objective) -> Objective:
        method = self.method
        if self.anchor is not None:
            objective += method.beta * Pulled(self.anchor, self.known if method.weight_term == "ewc" else None)
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
            self.old = copy.deepcopy(self.model).eval().requires_grad_(False)
        self.free()  # a finished plan has frozen what is trained
        if method.weight_term in ("l2", "ewc"):
            self.anchor = {name: p.detach().clone() for name, p in self.model.named_parameters() if p.requires_grad}
        refreshes = method.refresh.every > 0 and method.refresh.fisher == "diag"
        if method.weight_term == "ewc" or refreshes:
            found = self.answering.information(number, method.fisher, method.fisher_examples)
            self.known = joined(self.known, found, keep=method.fisher_decay)

    def kept_bytes(self) -> dict[str, int]:
        old = self.old.state_dict().values() if self.old is not None else ()
        held = {
            "memory": self.memory.nbytes,
            "weights before": sum(tensor.nbytes for tensor in (self.anchor or {}).values()),
            "Fisher information": sum(tensor.nbytes for tensor in (self.known or {}).values()),
            "distributions": sum(tensor.nbytes for both in self.posterior.known.values() for tensor in both),
            "old model": sum(tensor.nbytes for tensor in old),
        }
        return {name: size for name, size in held.items() if size}

    def _remember(self, number: int) -> None:
        """Offers the memory a task's examples, with the logits of the model as it is now."""
        examples = self.data.train[number]
        logits_NC = logits_of(self.model, examples, dtype=self.data.dtype)
        for batch, logits_BC in zip(examples.in_order(), torch.split(logits_NC, SCORED_AT_ONCE), strict=True):
            self.memory.insert(with_logits(batch, logits_BC))
