"""Mix-CPT, stage one: knowledge without format, anchored by logit-swap self-distillation (Jiang et al., 2025)."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, ClassVar

from pydantic import Field, model_validator

from overhaul.extend.cpt import ContinualPretraining
from overhaul.method import NonNegative, Share

if TYPE_CHECKING:
    from torch import nn

    from overhaul.data import Data
    from overhaul.mixture import Source
    from overhaul.objective import Objective

GENERAL = 0.25
"""Share of the tokens where there are instructions and no share was asked for; the paper has none."""


class MixCPT(ContinualPretraining):
    """Go on pre-training on documents mixed with instructions as plain text, held to what the model said before.

    The model as it was is the teacher. Where its likeliest word is not the one that follows, the two change places: the
    new word is learnt with the confidence that the old one had, and the rest of the distribution stays.
    """

    paper: ClassVar[str] = (
        "Jiang, Li, Zhao, Song, Zhang, Wen: Mix-CPT: A Domain Adaptation Framework via Decoupling Knowledge Learning "
        "and Format Alignment, ICLR 2025, arXiv:2407.10804"
    )

    general: str | None = Field(
        None, description="Corpus of instructions or preferences, read as plain text: prompts with their answers."
    )
    general_share: Share | None = Field(
        None, description=f"Of the tokens, those from --general; {GENERAL} where it is given. Others are as many fewer."
    )
    ce_weight: NonNegative = Field(1.0, description="Weight of the cross-entropy; 0 is self-distillation alone.")
    kl_weight: NonNegative = Field(0.3, description="Weight of the divergence from the model as it was.")
    swap: bool = Field(
        True, description="Exchange its likeliest word with the right one; otherwise plain distillation."
    )

    @model_validator(mode="after")
    def _something_is_learnt(self) -> MixCPT:
        if not self.ce_weight and not self.kl_weight:
            raise ValueError("with ce_weight 0 and kl_weight 0 there is no loss")
        if not self.ce_weight and not self.swap:
            raise ValueError(
                "a model that is held to what it said before learns nothing; use ce_weight above 0, or swap"
            )
        if self.from_scratch and self.kl_weight:
            raise ValueError("from_scratch leaves nothing that the model said before; use kl_weight 0, or extend cpt")
        if self.general is None and self.general_share is not None:
            raise ValueError(f"general_share {self.general_share:g} needs a corpus of instructions: use general CORPUS")
        if self.general is not None and self.general == self.replay:
            raise ValueError(f"general and replay are both {self.general}: a text is one or the other")
        if self.new_share() <= 0:
            told = " and ".join(f"{share:g} of {path}" for path, share in self.shares().items())
            raise ValueError(f"{told} leave nothing of the tokens for data")
        return self

    def shares(self) -> dict[str, float]:
        """Of all tokens, those of the instructions and of what is replayed."""
        if self.general is None:
            return super().shares()
        return {self.general: GENERAL if self.general_share is None else self.general_share} | super().shares()

    def read(self, path: str, data: Data) -> Data:
        """Instructions as plain text."""
        return data.on(path, plain=path == self.general)

    def objective(self, model: nn.Module) -> Objective:
        """Cross-entropy, and the divergence from a frozen copy of the model as it is now."""
        from overhaul.distillation import Distill
        from overhaul.objective import CrossEntropy

        if not self.kl_weight:
            return self.ce_weight * CrossEntropy()
        held = self.kl_weight * Distill(copy.deepcopy(model).requires_grad_(False).eval(), swap=self.swap)
        return self.ce_weight * CrossEntropy() + held if self.ce_weight else held

    def sources(self, data: Data) -> dict[str, Source]:
        """Documents, what is replayed, and instructions as plain text."""
        found = super().sources(data)
        if self.general is not None:
            told = self.read(self.general, data)
            found[told.corpus.name] = self.source(told)
        return found
