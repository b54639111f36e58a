"""ConTraCon: for each task, small kernels over a transformer's frozen query, key and value weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from overhaul.banking import BankLearning
from overhaul.errors import UserError
from overhaul.kinds import Kind, is_classifier
from overhaul.method import BatchSize, Fraction, Natural, NonNegative, PeakRate, Positive

if TYPE_CHECKING:
    from torch import nn

    from overhaul.banks import Sockets


class ConTraCon(BankLearning):
    """Learn each task with small kernels over a frozen transformer's attention weights and norms of its own."""

    paper: ClassVar[str] = (
        "Roy, Verma, Voonna, Ghosh, Ghosh, Das: Exemplar-Free Continual Transformer with Convolutions, ICCV 2023, "
        "arXiv:2308.11357"
    )

    by_kind: ClassVar[Mapping[str, tuple[Any, Any]]] = {
        "batch_size": (256, 4), "first_task": ("whole", "frozen"), "parent": ("first", "none"),
        "init": ("drawn", "unchanged"), "kernel": (15, 7),
    }  # fmt: skip

    batch_size: BatchSize | None = Field(  # pyright: ignore[reportIncompatibleVariableOverride]
        None, description="Images or windows of a step; 256, of a language model 4."
    )
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
    first_task: Literal["whole", "frozen"] | None = Field(
        None,
        description="Whether the first task of a model trains all of it, after which it is frozen (whole, the "
        "default); or the model is frozen as it is given, as one is that has banks, and every language model.",
    )
    parent: Literal["none", "first", "most_similar"] | None = Field(
        None,
        description="The task whose norms and pooling a new one begins with: the first (default), the one whose bank "
        "knows the new task best, or none, but the frozen model (default of a language model).",
    )
    init: Literal["drawn", "parent", "unchanged"] | None = Field(
        None,
        description="What a task's kernels and gates begin as: drawn at random (default), those of its parent, or such "
        "that they change nothing (default of a language model).",
    )
    form: Literal["both", "kernels", "gates", "none"] = Field(
        "both", description="What the frozen weights go through: kernels beside gates, either alone, or nothing."
    )
    kernel: Positive | None = Field(
        None, description="Numbers of a side of the kernels, odd; 15, of a language model 7."
    )
    dilation: Positive = Field(1, description="Distance of the weights under neighbouring numbers of a kernel.")
    norms: bool = Field(True, description="Whether each task has normalisations and pooling of its own.")

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.kernel is not None and self.kernel % 2 == 0:
            raise ValueError(f"kernel {self.kernel} has no middle; use {self.kernel - 1} or {self.kernel + 1}")
        if self.form == "gates" and self.init in ("parent", "unchanged"):
            raise ValueError("form gates cannot begin as the frozen model, whose gate is infinite; use init drawn")
        return self

    def check(self, model: nn.Module, data: Any) -> None:
        """Refuses what there is only of classifiers."""
        super().check(model, data)
        if is_classifier(model):
            return
        if self.first_task == "whole":
            raise UserError(
                "--first-task whole trains a model that knows nothing yet, and a language model comes trained",
                hint="without it: the model is frozen as it is given",
            )
        if self.form == "gates" and self.init != "drawn":
            raise UserError(
                "--form gates cannot begin as the frozen model, whose gate is infinite", hint="with --init drawn"
            )

    def sockets(self, kind: Kind = Kind.IMAGE_CLASSIFIER) -> Sockets:
        from overhaul.sockets.reweighting import Reweighting

        method, names = self.of_kind(kind), ("form", "kernel", "dilation", "norms", "init")
        how: dict[str, Any] = {name: getattr(method, name) for name in names}
        return Reweighting(**how)

    def begins(self) -> dict[str, Any]:
        return {"whole_first": self.first_task == "whole", "parent": self.parent}
