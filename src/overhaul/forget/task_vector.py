"""Task vectors: what a model learns of texts in a few more passes, taken off it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field

from overhaul.removal import Removal

if TYPE_CHECKING:
    from torch import nn

    from overhaul.data import Data
    from overhaul.objective import Objective
    from overhaul.train import Plan


class TaskVector(Removal):
    """Unlearn texts by learning them further and going as far the other way (task vector)."""

    paper: ClassVar[str] = (
        "Ilharco, Ribeiro, Wortsman, Gururangan, Schmidt, Hajishirzi, Farhadi: Editing Models with Task Arithmetic, "
        "ICLR 2023, arXiv:2212.04089"
    )

    alpha: Annotated[float, Field(allow_inf_nan=False)] = Field(
        1.0, description="How far; 0 leaves the model as it was, -1 is the one that learnt the texts further."
    )
    schedule: Literal["linear", "cosine", "constant"] = Field("cosine", description="Decay after the warm-up.")

    def objective(self, model: nn.Module) -> Objective:
        """The texts are learnt; what follows takes that off."""
        from overhaul.objective import CrossEntropy

        return CrossEntropy()

    def plan(self, model: nn.Module, data: Data) -> Plan:
        """Learns the texts further, then `theta - alpha (theta_further - theta)`."""
        from dataclasses import replace

        before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}

        def finish(learnt: nn.Module) -> nn.Module:
            for name, parameter in learnt.named_parameters():
                # Written so that alpha 0 and -1 are exact.
                parameter.data = before[name].to(parameter).lerp(parameter.data, -self.alpha)
            return learnt

        return replace(super().plan(model, data), finish=finish)
