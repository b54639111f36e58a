"""SLM: a library of low-rank increments beside a frozen language model, found by what a text is like."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from overhaul.kinds import Kind
from overhaul.learning import Learning
from overhaul.method import BatchSize, Fraction, PeakRate, Positive, Rate, SeqLen, Steps

if TYPE_CHECKING:
    from torch import nn

    from overhaul.learners.learner import Learner


class Slm(Learning):
    """Learn each text as increments beside a frozen language model; what a question is like decides which are used."""

    paper: ClassVar[str] = (
        "Peng, Tian, Liu, Yang, Jia: Scalable Language Model with Generalized Continual Learning, ICLR 2024, "
        "arXiv:2404.07470"
    )
    kinds: ClassVar[tuple[Kind, ...]] = (Kind.CAUSAL_LM,)
    keeps_banks: ClassVar[bool] = True

    steps: Steps = Field(100, description="Optimizer steps of each task's increments.")
    batch_size: BatchSize = 4
    seq_len: SeqLen = 256
    lr: PeakRate = 1e-3
    warmup: Fraction = Field(0.03, description="Share of a task's steps with a linearly rising rate.")
    schedule: Literal["linear", "cosine", "constant"] = Field("cosine", description="Decay after the warm-up.")
    optimizer: Literal["sgd", "adamw"] = Field("adamw", description="Update rule; it begins anew with each task.")  # pyright: ignore[reportIncompatibleVariableOverride]
    entries: Positive = Field(4, description="Keys, with an increment each, of a task.")
    top_k: Positive = Field(2, description="Entries that are found for a text.")
    groups: Positive = Field(6, description="Parts that a key is compared in; they divide the model's width.")
    rank: Positive = Field(8, description="Of an increment.")
    encoder: str = Field(
        "own",
        description="What texts are known by: own (the language model's states), all-minilm-l6-v2, or the directory of "
        "an encoder of sentences; it is kept beside the library.",
    )
    query_tokens: Positive = Field(64, description="Tokens by which a text is known: of its question, or its first.")
    key_texts: Positive = Field(256, description="Texts of a task that its keys are learnt from.")
    key_steps: Positive = Field(60, description="Optimizer steps of a task's keys, in batches of --batch-size.")
    key_lr: Rate = Field(1e-3, description="Learning rate of the keys.")
    masked: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.25, description="Probability with which a key is left out of the choice while keys are learnt."
    )
    unknown: Annotated[float, Field(ge=-1, le=1)] = Field(
        0.0, description="Similarity below which a text is left to the frozen model."
    )

    @model_validator(mode="after")
    def _finds_what_is_there(self) -> Self:
        if self.top_k > self.entries:
            raise ValueError(
                f"top_k {self.top_k} is more than the {self.entries} entries of a task; use {self.entries}"
            )
        if self.key_texts < self.entries:
            raise ValueError(
                f"key_texts {self.key_texts} are fewer than the {self.entries} entries that begin with them"
            )
        return self

    def references(self) -> tuple[str, ...]:
        return (*super().references(), *((self.encoder,) if Path(self.encoder).is_dir() else ()))

    def learner(self, model: nn.Module, data: Any) -> Learner:
        from overhaul.learners.slm import SlmLearner

        return SlmLearner(self, model, data)
