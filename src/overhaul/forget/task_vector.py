"""Task vectors: what a model learns of texts in a few more passes, taken off it."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from overhaul.removal import Strengths, Undoing

if TYPE_CHECKING:
    from torch import nn

    from overhaul.data import Data
    from overhaul.train import Plan


class TaskVector(Undoing):
    """Unlearn texts by learning them further and going as far the other way (task vector)."""

    paper: ClassVar[str] = (
        "Ilharco, Ribeiro, Wortsman, Gururangan, Schmidt, Hajishirzi, Farhadi: Editing Models with Task Arithmetic, "
        "ICLR 2023, arXiv:2212.04089"
    )

    alpha: Strengths = Field(
        (1.0,),
        min_length=1,
        description="How far; 0 leaves the model as it was, -1 is the one that learnt the texts further. Of several "
        "the first is taken that meets the rule of stop, else the last.",
    )

    def plan(self, model: nn.Module, data: Data) -> Plan:
        """Learns the texts further, then `theta - alpha (theta_further - theta)`."""
        from dataclasses import replace

        before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
        choose = self.choosing(model, data)

        def finish(learnt: nn.Module) -> nn.Module:
            further = {name: parameter.data for name, parameter in learnt.named_parameters()}

            def apply(alpha: float) -> None:
                for name, parameter in learnt.named_parameters():
                    # Written so that alpha 0 and -1 are exact.
                    parameter.data = before[name].to(parameter).lerp(further[name], -alpha)

            choose(learnt, apply)
            return learnt

        return replace(super().plan(model, data), finish=finish)
