"""Magnitude pruning: remove the weights nearest to zero (Han et al. 2015, arXiv:1506.02626)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from overhaul.method import Transform
from overhaul.sparsity import Target, already_kept, check_model, prune_layer, removed_share

if TYPE_CHECKING:
    from torch import Tensor, nn

    from overhaul.stream import Stream


def magnitude_score(weight_OI: Tensor) -> Tensor:
    """How much a weight matters: its absolute value."""
    return weight_OI.detach().abs()


class Magnitude(Target, Transform):
    """Remove the weights nearest to zero, the same share of every layer; needs no data."""

    scope: Literal["layer", "row"] = Field(
        "layer", description="What competes for the places: all weights of a layer, or those of each output."
    )

    def apply(self, model: nn.Module, calib: Stream | None) -> nn.Module:
        """Masks every linear layer of the decoder blocks; `calib` is not read."""
        from overhaul.walk import walk

        check_model(model, self)
        for block in walk(model, None, "prune magnitude"):
            for name, linear in block.linears.items():
                score_OI = magnitude_score(linear.weight)
                mask_OI = self.keep(score_OI, "row" if self.scope == "row" else "tensor", already_kept(linear))
                prune_layer(model, name, mask_OI, error=removed_share(score_OI, mask_OI))
        return model
