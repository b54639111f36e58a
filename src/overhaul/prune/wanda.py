"""Wanda: pruning by weights and activations (Sun et al. 2023, arXiv:2306.11695)."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from overhaul.method import Positive, Transform
from overhaul.sparsity import Target, already_kept, check_model, prune_layer, removed_share

if TYPE_CHECKING:
    from torch import Tensor, nn

    from overhaul.stream import Stream
    from overhaul.walk import Block


def wanda_score(weight_OI: Tensor, input_norm_I: Tensor) -> Tensor:
    """How much a weight matters: `|W_ij| * ||X_j||_2` (section 3, equation 1), in fp32."""
    return weight_OI.detach().abs().float().mul_(input_norm_I)


class Wanda(Target, Transform):
    """Remove the weights with the smallest magnitude times input norm, output by output; no updates."""

    needs_data: ClassVar[bool] = True
    samples: Positive = Field(128, description="Calibration windows.")
    seq_len: Positive = Field(2048, description="Tokens per window; fewer where the model reads fewer.")

    def apply(self, model: nn.Module, calib: Stream | None) -> nn.Module:
        """Masks every linear layer of the decoder blocks, each block fed by the pruned ones before it."""
        from overhaul.walk import walk

        check_model(model, self)
        for block in walk(model, calib, "prune wanda"):
            self._prune(model, block)
        return model

    def _prune(self, model: nn.Module, block: Block) -> None:
        # A function of its own, so that a block's statistics are freed before the next block's are collected.
        input_norm = block.statistics("input_norm")
        for name, linear in block.linears.items():
            score_OI = wanda_score(linear.weight, input_norm[name])
            mask_OI = self.keep(score_OI, "row", already_kept(linear))
            # With uncorrelated inputs this is the exact share of the output's norm.
            prune_layer(model, name, mask_OI, error=removed_share(score_OI, mask_OI))
