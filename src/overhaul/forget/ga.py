"""Gradient ascent on the texts to forget: the oldest way, and the quickest to ruin a model."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from overhaul.removal import Retaining

if TYPE_CHECKING:
    from torch import nn

    from overhaul.objective import Objective
    from overhaul.removal import Before


class GradientAscent(Retaining):
    """Unlearn texts by raising their loss; with texts to retain beside them (GA, GA_GDR, GA_KLR)."""

    paper: ClassVar[str] = (
        "Shi, Lee, Huang, Malladi, Zhao, Holtzman, Liu, Zettlemoyer, Smith, Zhang: MUSE: Machine Unlearning Six-Way "
        "Evaluation for Language Models, ICLR 2025, arXiv:2407.06460"
    )

    def unlearning(self, model: nn.Module, before: Before) -> Objective:
        from overhaul.objective import CrossEntropy

        return -1.0 * CrossEntropy()
