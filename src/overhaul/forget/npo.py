"""Negative preference optimization: ascent that stops by itself where a text has become unlikely."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from overhaul.method import Rate
from overhaul.removal import Retaining

if TYPE_CHECKING:
    from torch import nn

    from overhaul.objective import Objective
    from overhaul.removal import Before


class Npo(Retaining):
    """Unlearn texts as answers that are not preferred to what the model said before (NPO, NPO_GDR, NPO_KLR)."""

    paper: ClassVar[str] = (
        "Zhang, Lin, Bai, Mei: Negative Preference Optimization: From Catastrophic Collapse to Effective Unlearning, "
        "COLM 2024, arXiv:2404.05868"
    )

    beta: Rate = Field(0.1, description="How soon a text that became unlikely is let go; towards 0 it is ascent.")

    def needs_reference(self) -> bool:
        return True

    def unlearning(self, model: nn.Module, before: Before) -> Objective:
        from overhaul.unlearning.terms import NegativePreference

        return NegativePreference(self.beta)
