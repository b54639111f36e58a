"""SimNPO: negative preference optimization by the loss a token, without a reference."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from overhaul.method import NonNegative, Rate
from overhaul.removal import Retaining

if TYPE_CHECKING:
    from torch import nn

    from overhaul.objective import Objective
    from overhaul.removal import Before


class SimNpo(Retaining):
    """Unlearn texts until their loss a token is high enough, whatever the model said before (SimNPO)."""

    paper: ClassVar[str] = (
        "Fan, Liu, Lin, Jia, Zhang, Mei, Liu: Simplicity Prevails: Rethinking Negative Preference Optimization for LLM "
        "Unlearning, 2024, arXiv:2410.07163"
    )

    beta: Rate = Field(0.7, description="How sharply a text is let go when its loss is reached; MUSE News has 0.7.")
    gamma: NonNegative = Field(3.0, description="That loss, in nats a token.")

    def unlearning(self, model: nn.Module, before: Before) -> Objective:
        from overhaul.unlearning.terms import SimpleNegativePreference

        return SimpleNegativePreference(self.beta, self.gamma)
