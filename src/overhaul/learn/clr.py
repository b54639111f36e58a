"""Channel-wise lightweight reprogramming: a small kernel for every channel of a frozen convolutional network."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal, Self

from pydantic import Field, model_validator

from overhaul.banking import BankLearning
from overhaul.method import BatchSize, NonNegative, PeakRate, Positive

if TYPE_CHECKING:
    from overhaul.banks import Sockets


class Clr(BankLearning):
    """Learn each task with small kernels behind a frozen network's convolutions and normalisations of its own."""

    paper: ClassVar[str] = (
        "Ge, Li, Ni, Zhao, Yang, Itti: CLR: Channel-wise Lightweight Reprogramming for Continual Learning, ICCV 2023, "
        "arXiv:2307.11386"
    )

    batch_size: BatchSize = 32
    lr: PeakRate = 1e-3
    optimizer: Literal["sgd", "adamw"] = Field("adamw", description="Update rule; it begins anew with each task.")  # pyright: ignore[reportIncompatibleVariableOverride]
    schedule: Literal["linear", "cosine", "constant", "thirds"] = Field(  # pyright: ignore[reportIncompatibleVariableOverride]
        "thirds", description="Decay after the warm-up; thirds is a tenth of the rate in each third of the steps."
    )
    norm_penalty: NonNegative = Field(1e-5, description="Weight of the sum of the trained tensors' L2 norms.")
    behind: Literal["spatial", "all", "scaled", "none"] = Field(
        "spatial",
        description="Convolutions that get kernels: those of more than one pixel, all, all with a mere factor behind "
        "those of one pixel, or none.",
    )
    form: Literal["behind", "residual", "parallel"] = Field(
        "behind", description="Kernels on the output, on a copy that is added to it, or a convolution of one pixel "
        "beside it."
    )  # fmt: skip
    kernel: Positive = Field(3, description="Pixels of a side of the kernels, odd.")
    norms: bool = Field(True, description="Whether each task has normalisations of its own, statistics included.")

    @model_validator(mode="after")
    def _kernel_is_odd(self) -> Self:
        if self.kernel % 2 == 0:
            raise ValueError(f"kernel {self.kernel} has no middle; use {self.kernel - 1} or {self.kernel + 1}")
        return self

    def sockets(self) -> Sockets:
        from overhaul.sockets.reprogramming import Reprogramming

        return Reprogramming(behind=self.behind, form=self.form, kernel=self.kernel, norms=self.norms)
