"""One objective for many methods of continual learning (Wang et al., ICLR 2024): a loss and two divergences."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field, model_validator

from overhaul.learning import Learning
from overhaul.method import Fraction, NonNegative, Positive, Rate

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from overhaul.continual import Focused
    from overhaul.objective import Objective
    from overhaul.reservoir import Reservoir
    from overhaul.stream import Stream
    from overhaul.task_data import TaskData
    from overhaul.train import Plan

OutputTerm = Literal["none", "er", "der", "der++", "fdr", "lwf", "cpr"]
WeightTerm = Literal["none", "l2", "ewc"]
OF_MEMORY = ("er", "der", "der++", "fdr")
"""Output terms whose reference is in the memory, which fdr fills when a task ends and the others as it is learnt."""


class Bregman(Learning):
    """Learn tasks, held to the past by a divergence of outputs and one of weights: EWC, ER, DER++, LwF and others."""

    paper: ClassVar[str] = (
        "Wang, Li, Shen, Huang: A Unified and General Framework for Continual Learning, ICLR 2024, arXiv:2403.13249"
    )

    output_term: OutputTerm = Field(
        "der++",
        description="What outputs are held to: labels (er), logits (der), both (der++) or probabilities (fdr) in the "
        "memory, the model before the task (lwf), or the uniform distribution (cpr).",
    )
    alpha: NonNegative = Field(0.5, description="Weight of the output term; of der++ that of the logits.")
    label_weight: NonNegative = Field(0.5, description="Weight of the labels in der++.")
    temperature: Rate = Field(2.0, description="Of lwf.")
    weight_term: WeightTerm = Field(
        "none", description="What weights are held to: those before the task, plainly (l2) or by Fisher information."
    )
    beta: NonNegative = Field(1.0, description="Weight of the weight term.")
    fisher: Literal["weighted", "empirical", "exact", "sampled"] = Field(
        "exact", description="Labels of the Fisher information: those given, by probability; given; all; drawn."
    )
    fisher_examples: Positive = Field(1000, description="Examples of each task that it is taken from.")
    fisher_decay: Fraction = Field(1.0, description="What is left of that of earlier tasks.")
    memory: Positive = Field(500, description="Examples that are remembered.")
    memory_batch: Positive | None = Field(None, description="Remembered examples a step; none: as the batch.")

    @model_validator(mode="after")
    def _draws_fit(self) -> Bregman:
        wanted = self.memory_batch or self.batch_size
        if self.output_term in OF_MEMORY and wanted > self.memory:
            raise ValueError(
                f"a step draws {wanted} examples from a memory of {self.memory}; use memory_batch {self.memory}"
            )
        return self

    def learner(self, model: nn.Module, data: TaskData) -> _Learner:
        return _Learner(self, model, data)


class _Learner:
    """The memory, the weights and the model before, and their Fisher information."""

    def __init__(self, method: Bregman, model: nn.Module, data: TaskData) -> None:
        from overhaul.reservoir import Reservoir

        self.method, self.model, self.data = method, model, data
        self.memory: Reservoir = Reservoir(method.memory, seed=data.seed)
        self.anchor: dict[str, Tensor] | None = None
        self.known: dict[str, Tensor] | None = None
        self.old: nn.Module | None = None
        self.old_classes = 0

    def plan(self, number: int) -> Plan:
        """Cross-entropy over all classes so far, with the terms."""
        from overhaul.continual import Focused, Remembering
        from overhaul.optim.build import build
        from overhaul.schedules import schedule
        from overhaul.train import Plan

        objective = focused = Focused(self._objective(number), "cross_entropy")
        if self.method.output_term in OF_MEMORY and self.method.output_term != "fdr":
            objective = Remembering(objective, self.memory)
        self.model.requires_grad_(True)
        return Plan(
            model=self.model,
            objective=objective,
            stream=self._stream(number),
            optimizer=self._refreshed(build(self.method, self.model.parameters(), model=self.model), focused, number),
            schedule=schedule(self.method.schedule, self.method.warmup),
            steps=self.method.steps_of(self.data, number),
            unit="images",
        )

    def _refreshed(self, optimizer: torch.optim.Optimizer, focused: Focused, number: int) -> torch.optim.Optimizer:
        """The optimizer, with unlearning where that was asked for."""
        import contextlib

        from overhaul.optim.refresh import Refresh, langevin, released

        asked, by_name = self.method.refresh, dict(self.model.named_parameters())
        if not asked.every:
            return optimizer
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
            fisher=lambda: {by_name[name]: tensor for name, tensor in (self.known or {}).items()},
            buffers=list(self.model.buffers()),
            focus=contextlib.nullcontext if asked.form == "paper" else focused.alone,
            seed=self.data.seed * len(self.data.sequence.tasks) + number,
        )

    def _stream(self, number: int) -> Stream:
        from overhaul.reservoir import WithMemory

        method = self.method
        batches = self.data.batches(number, batch_size=method.batch_size)
        if method.output_term not in OF_MEMORY:
            return batches
        draws = 2 if method.output_term == "der++" else 1
        return WithMemory(batches, self.memory, count=method.memory_batch or method.batch_size, draws=draws)

    def _objective(self, number: int) -> Objective:
        from overhaul.continual import LogitsKept, OldModel, PredictionsKept, Pulled, Replayed, Uniform
        from overhaul.objective import ClassCrossEntropy

        method = self.method
        objective: Objective = ClassCrossEntropy()
        match method.output_term:
            case "er":
                objective += method.alpha * Replayed()
            case "der":
                objective += method.alpha * LogitsKept()
            case "der++":
                objective = objective + method.alpha * LogitsKept(1) + method.label_weight * Replayed(2)
            case "fdr":
                objective += method.alpha * PredictionsKept()
            case "cpr":
                objective += method.alpha * Uniform(self.data.sequence.num_classes(number + 1))
            case "lwf" if self.old is not None:
                objective += method.alpha * OldModel(self.old, self.old_classes, method.temperature)
        if self.anchor is not None:
            objective += method.beta * Pulled(self.anchor, self.known if method.weight_term == "ewc" else None)
        return objective

    def learnt(self, number: int) -> None:
        """Keeps the weights, their Fisher information and the model, where a later task is held to them."""
        import copy

        from overhaul.fisher import diagonal, joined

        method, later = self.method, number + 1 < len(self.data.sequence.tasks)
        if not later:
            return
        if method.output_term == "fdr":
            self._remember(number)
        if method.output_term == "lwf":
            self.old = copy.deepcopy(self.model).eval().requires_grad_(False)
            self.old_classes = self.data.sequence.num_classes(number + 1)
        self.model.requires_grad_(True)  # a finished plan has frozen it
        if method.weight_term != "none":
            self.anchor = {name: p.detach().clone() for name, p in self.model.named_parameters() if p.requires_grad}
        refreshes = method.refresh.every > 0 and method.refresh.fisher == "diag"
        if method.weight_term == "ewc" or refreshes:
            found = diagonal(self.model.eval(), self._some(number), labels=method.fisher, seed=self.data.seed)
            self.known = joined(self.known, found, keep=method.fisher_decay)

    def _remember(self, number: int) -> None:
        """Offers the memory a task's examples, with the logits of the model as it is now."""
        import torch

        from overhaul.continual import with_logits
        from overhaul.task_data import SCORED_AT_ONCE
        from overhaul.task_scores import logits_of

        examples = self.data.train[number]
        logits_NC = logits_of(self.model, examples, dtype=self.data.dtype)
        for batch, logits_BC in zip(examples.in_order(), torch.split(logits_NC, SCORED_AT_ONCE), strict=True):
            self.memory.insert(with_logits(batch, logits_BC))

    def _some(self, number: int) -> list[dict[str, Any]]:
        """Batches of as many of a task's examples as the Fisher information is taken from, chosen by the seed."""
        import numpy as np

        examples, wanted = self.data.train[number], self.method.fisher_examples
        places = np.random.default_rng((self.data.seed, number)).permutation(len(examples))[:wanted]
        return [examples.batch(places[at : at + 256]) for at in range(0, len(places), 256)]
