"""One objective for many methods of continual learning (Wang et al., ICLR 2024): a loss and two divergences."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field, model_validator

from overhaul.errors import UserError
from overhaul.kinds import Kind
from overhaul.learning import FISHER, Readers, SharedLearning
from overhaul.method import Fraction, Natural, NonNegative, Positive, Rate, Settings

if TYPE_CHECKING:
    from torch import nn

    from overhaul.learners.learner import Learner
    from overhaul.task_data import TaskData

OutputTerm = Literal["none", "er", "der", "der++", "fdr", "lwf", "cpr", "kl-replay"]
WeightTerm = Literal["none", "l2", "ewc", "vcl"]
OF_MEMORY = ("er", "der", "der++", "fdr", "kl-replay")
"""Output terms whose reference is in the memory, which fdr fills when a task ends and the others as it is learnt."""


class Refreshing(Settings):
    """Refresh learning over any of the methods: unlearn the current batch a little before it is learnt."""

    every: Natural = Field(0, description="Steps of which one begins with it; 0 leaves it out, the paper has 2.")
    times: Positive = Field(1, description="Steps up, each time.")
    form: Literal["paper", "released"] = Field(
        "released", description="Langevin ascent on the whole objective, or the authors' code: cross-entropy, rescaled."
    )
    rate: NonNegative = Field(1e-5, description="Size of a step up.")
    noise: NonNegative = Field(1e-3, description="Of the noise; 1 in form paper is Langevin dynamics.")
    damping: Rate = Field(1e-3, description="Of the Fisher information's inverse.")
    fisher: Literal["diag", "none"] = Field("diag", description="Whether weights that matter are unlearnt less.")

    @model_validator(mode="after")
    def _says_how_often(self) -> Refreshing:
        for name, field in type(self).model_fields.items():
            if not self.every and getattr(self, name) != field.default:
                raise ValueError(f"{name} is of refresh learning, which every 0 leaves out; give every, such as 2")
        return self


OF_TEXT = ("none", "er", "lwf", "kl-replay")
"""Output terms of language models."""


class Bregman(SharedLearning):
    """Learn tasks, held to the past by a divergence of outputs and one of weights: EWC, ER, DER++, LwF and others."""

    paper: ClassVar[str] = (
        "Wang, Li, Shen, Huang: A Unified and General Framework for Continual Learning, ICLR 2024, arXiv:2403.13249"
    )

    kinds: ClassVar[tuple[Kind, ...]] = (Kind.IMAGE_CLASSIFIER, Kind.TEXT_CLASSIFIER, Kind.CAUSAL_LM)

    output_term: OutputTerm = Field(
        "der++",
        description="What outputs are held to: labels (er), logits (der), both (der++) or probabilities (fdr) in the "
        "memory, the model before the task (lwf), or the uniform distribution (cpr). Of language models: er, lwf, and "
        "the model before on text in the memory (kl-replay).",
    )
    alpha: NonNegative = Field(0.5, description="Weight of the output term; of der++ that of the logits.")
    label_weight: NonNegative = Field(0.5, description="Weight of the labels in der++.")
    temperature: Rate = Field(2.0, description="Of lwf.")
    weight_term: WeightTerm = Field(
        "none",
        description="What weights are held to: those before the task, plainly (l2) or by Fisher information (ewc), or "
        "their distributions before it (vcl).",
    )
    beta: NonNegative = Field(1.0, description="Weight of the weight term; 1 is the paper's bound of vcl.")
    fisher: Literal["weighted", "empirical", "exact", "sampled"] = Field(
        "exact", description="Labels of the Fisher information: those given, by probability; given; all; drawn."
    )
    fisher_examples: Positive = Field(1000, description="Examples of each task that it is taken from.")
    fisher_decay: Fraction = Field(1.0, description="What is left of that of earlier tasks.")
    samples: Positive = Field(1, description="Of vcl: draws of weights a step, over which cross-entropy is averaged.")
    prior: Literal["zero", "given"] = Field(
        "zero", description="Of vcl: what the prior of the first task is around, zero or the weights that are given."
    )
    prior_std: Rate = Field(1.0, description="Of vcl: the prior's standard deviation.")
    first_std: Rate = Field(0.05, description="Of vcl: the weights' standard deviations before the first task.")
    memory: Positive = Field(500, description="Examples that are remembered.")
    memory_batch: Positive | None = Field(None, description="Remembered examples a step; none: as the batch.")

    passes: Literal["apart", "joined"] = Field(
        "apart",
        description="Whether remembered examples go through the model by themselves, as in the authors' code, or with "
        "the batch, which is faster and gives batch normalisation statistics of both.",
    )
    refresh: Refreshing = Field(Refreshing.model_validate({}), description="Unlearning before learning.")

    def readers(self) -> Readers:
        output, weight = self.output_term, self.weight_term
        return (
            (("alpha",), output != "none", "an output term"),
            (("label_weight",), output == "der++", "output_term der++"),
            (("temperature",), output in ("lwf", "kl-replay"), "output_term lwf and kl-replay"),
            (("memory", "memory_batch"), self.remembers, f"output_term {', '.join(OF_MEMORY)}"),
            (("passes",), self.remembers and output != "fdr", "output_term er, der, der++ and kl-replay"),
            (("beta",), weight != "none", "a weight term"),
            (("samples", "prior", "prior_std", "first_std"), weight == "vcl", "weight_term vcl"),
            (FISHER, self.informed, "weight_term ewc, and of refresh with fisher diag"),
        )

    @model_validator(mode="after")
    def _draws_fit(self) -> Bregman:
        wanted = self.memory_batch or self.batch_size
        if self.remembers and wanted > self.memory:
            raise ValueError(
                f"a step draws {wanted} examples from a memory of {self.memory}; use memory_batch {self.memory}"
            )
        return self

    @model_validator(mode="after")
    def _a_prior_is_decay_enough(self) -> Bregman:
        if self.weight_term == "vcl" and self.weight_decay:
            raise ValueError(
                f"weight_term vcl has a prior in place of weight decay, and decay would widen the distributions; use "
                f"prior_std, and weight_decay 0, not {self.weight_decay:g}"
            )
        return self

    def check(self, model: nn.Module, data: Any) -> None:
        """Refuses terms that there are only of classifiers, or only of language models."""
        from overhaul.kinds import is_classifier

        super().check(model, data)
        if is_classifier(model):
            if self.output_term == "kl-replay":
                raise UserError("--output-term kl-replay is of language models", hint="lwf, or fdr")
            return
        if self.output_term not in OF_TEXT:
            raise UserError(
                f"--output-term {self.output_term} is of classifiers: of a language model the logits of all words at "
                "every place are too many to keep",
                allowed=", ".join(OF_TEXT),
            )
        if self.classifier != "whole":
            raise UserError(f"--classifier {self.classifier} is of classifiers, and this is a language model")
        if self.weight_term == "vcl":
            raise UserError("--weight-term vcl is of classifiers", allowed="none, l2, ewc")
        if self.informed and self.fisher != "empirical":
            raise UserError(
                f"--fisher {self.fisher} runs over labels, and of a language model all words are labels",
                hint="--fisher empirical",
            )

    @property
    def remembers(self) -> bool:
        """Whether it keeps examples."""
        return self.output_term in OF_MEMORY

    @property
    def informed(self) -> bool:
        """Whether it takes Fisher information."""
        return self.weight_term == "ewc" or (self.refresh.every > 0 and self.refresh.fisher == "diag")

    def learner(self, model: nn.Module, data: TaskData) -> Learner:
        from overhaul.learners.bregman import BregmanLearner

        return BregmanLearner(self, model, data)
