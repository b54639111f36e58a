"""Channel-wise lightweight reprogramming: a small kernel for every channel of a frozen network."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from overhaul.banking import BankLearning
from overhaul.errors import UserError
from overhaul.kinds import Kind, is_classifier
from overhaul.method import BatchSize, NonNegative, PeakRate, Positive

if TYPE_CHECKING:
    from torch import nn

    from overhaul.banks import Sockets

OF_LANGUAGE = ("all", "none")
"""Where kernels can be in a language model."""


class Clr(BankLearning):
    """Learn each task with small kernels behind a frozen network's convolutions and normalisations of its own."""

    paper: ClassVar[str] = (
        "Ge, Li, Ni, Zhao, Yang, Itti: CLR: Channel-wise Lightweight Reprogramming for Continual Learning, ICCV 2023, "
        "arXiv:2307.11386"
    )

    by_kind: ClassVar[Mapping[str, tuple[Any, Any]]] = {
        "batch_size": (32, 4), "behind": ("spatial", "all"), "kernel": (3, 1)
    }  # fmt: skip

    batch_size: BatchSize | None = Field(  # pyright: ignore[reportIncompatibleVariableOverride]
        None, description="Images or windows of a step; 32, of a language model 4."
    )
    lr: PeakRate = 1e-3
    optimizer: Literal["sgd", "adamw"] = Field("adamw", description="Update rule; it begins anew with each task.")  # pyright: ignore[reportIncompatibleVariableOverride]
    schedule: Literal["linear", "cosine", "constant", "thirds"] = Field(  # pyright: ignore[reportIncompatibleVariableOverride]
        "thirds", description="Decay after the warm-up; thirds is a tenth of the rate in each third of the steps."
    )
    patience: Positive | None = Field(
        21, description="Of --keep-best: passes without a better one after which a task is done; none: all are made."
    )
    norm_penalty: NonNegative = Field(1e-5, description="Weight of the sum of the trained tensors' L2 norms.")
    behind: Literal["spatial", "all", "scaled", "none"] | None = Field(
        None,
        description="Convolutions that get kernels: those of more than one pixel (spatial, the default), all, all "
        "with a mere factor behind those of one pixel (scaled), or none. Of a language model all linear layers but the "
        "head, or none.",
    )
    form: Literal["behind", "residual", "parallel"] = Field(
        "behind", description="Kernels on the output, on a copy that is added to it, or a convolution of one pixel "
        "beside it."
    )  # fmt: skip
    kernel: Positive | None = Field(
        None,
        description="Pixels of a side of the kernels, odd; 3. Of a language model tokens that a kernel spans, the "
        "present one and those before it; 1, which scales each channel.",
    )
    norms: bool = Field(True, description="Whether each task has normalisations of its own, statistics included.")

    def check(self, model: nn.Module, data: Any) -> None:
        """Refuses what there is only of convolutions, or only of language models."""
        super().check(model, data)
        if is_classifier(model):
            if self.kernel is not None and self.kernel % 2 == 0:
                raise UserError(f"kernel {self.kernel} has no middle; use {self.kernel - 1} or {self.kernel + 1}")
            return
        if self.behind is not None and self.behind not in OF_LANGUAGE:
            raise UserError(
                f"--behind {self.behind} is of convolutions, and this is a language model",
                allowed=", ".join(OF_LANGUAGE),
            )
        if self.form != "behind":
            raise UserError(f"--form {self.form} is of convolutions, and this is a language model", allowed="behind")

    def sockets(self, kind: Kind = Kind.IMAGE_CLASSIFIER) -> Sockets:
        from overhaul.sockets.channels import Channels
        from overhaul.sockets.reprogramming import Reprogramming

        method = self.of_kind(kind)
        where: dict[str, Any] = {"behind": method.behind, "kernel": method.kernel, "norms": method.norms}
        return Channels(**where) if kind is Kind.CAUSAL_LM else Reprogramming(form=method.form, **where)
