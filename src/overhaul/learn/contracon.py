"""ConTraCon: for each task, small kernels over a transformer's frozen query, key and value weights."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from overhaul.banking import BankLearning
from overhaul.method import BatchSize, Fraction, Natural, NonNegative, PeakRate, Positive

if TYPE_CHECKING:
    from torch import nn

    from overhaul.banks import Sockets
    from overhaul.learners.learner import Learner
    from overhaul.task_data import TaskData


class ConTraCon(BankLearning):
    """Learn each task with small kernels over a frozen transformer's attention weights and norms of its own."""

    paper: ClassVar[str] = (
        "Roy, Verma, Voonna, Ghosh, Ghosh, Das: Exemplar-Free Continual Transformer with Convolutions, ICCV 2023, "
        "arXiv:2308.11357"
    )

    batch_size: BatchSize = 256
    lr: PeakRate = 8e-4
    weight_decay: NonNegative = Field(6e-7, description="Decoupled weight decay.")
    optimizer: Literal["sgd", "adamw"] = Field("adamw", description="Update rule; it begins anew with each task.")  # pyright: ignore[reportIncompatibleVariableOverride]
    schedule: Literal["linear", "cosine", "constant", "thirds", "restarts"] = Field(  # pyright: ignore[reportIncompatibleVariableOverride]
        "restarts", description="Decay after the warm-up; restarts is a cosine in each half of the steps."
    )
    label_smoothing: Fraction = Field(0.1, description="Share of each label that is spread over a task's classes.")
    views: Natural = Field(
        10, description="Augmented copies of an example whose logits are averaged before a task is told by them."
    )
    first_task: Literal["whole", "frozen"] = Field(
        "whole",
        description="Whether the first task of a model trains all of it, after which it is frozen; or the model is "
        "frozen as it is given. One that has banks is frozen.",
    )
    parent: Literal["first", "most_similar"] = Field(
        "first", description="The task whose norms and pooling a new one begins with."
    )
    init: Literal["drawn", "parent"] = Field(
        "drawn", description="What a task's kernels and gates begin as: drawn at random, or those of its parent."
    )
    form: Literal["both", "kernels", "gates", "none"] = Field(
        "both", description="What the frozen weights go through: kernels beside gates, either alone, or nothing."
    )
    kernel: Positive = Field(15, description="Numbers of a side of the kernels, odd.")
    dilation: Positive = Field(1, description="Distance of the weights under neighbouring numbers of a kernel.")
    norms: bool = Field(True, description="Whether each task has normalisations and pooling of its own.")

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.kernel % 2 == 0:
            raise ValueError(f"kernel {self.kernel} has no middle; use {self.kernel - 1} or {self.kernel + 1}")
        if self.form == "gates" and self.init == "parent":
            raise ValueError("form gates cannot begin as the frozen model, whose gate is infinite; use init drawn")
        return self

    def sockets(self) -> Sockets:
        from overhaul.sockets.reweighting import Reweighting

        how: dict[str, Any] = {name: getattr(self, name) for name in ("form", "kernel", "dilation", "norms", "init")}
        return Reweighting(**how)

    def learner(self, model: nn.Module, data: TaskData) -> Learner:
        from overhaul.learners.banked import BankLearner

        how: dict[str, Any] = {"whole_first": self.first_task == "whole", "parent": self.parent}
        return BankLearner(self, model, data, self.sockets(), **how)
