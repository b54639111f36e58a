"""LoRA (Hu et al., 2021): W + (alpha / r) B A with a frozen W."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from overhaul.adapt.increments import Increments
from overhaul.method import Fraction, PeakRate, Positive, Rate

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import nn


class LoRA(Increments):
    """Train low-rank increments of the linear layers."""

    reads_packed: ClassVar[bool] = True

    lr: PeakRate = 2e-4
    rank: Positive = Field(16, description="Rank of the increments.")
    alpha: Rate = Field(32.0, description="The increment is scaled by alpha / rank.")
    rslora: bool = Field(
        False, description="Scale by alpha / sqrt(rank) instead, so that a higher rank is not held back (rsLoRA)."
    )
    dropout: Fraction = Field(0.0, description="Dropout on the adapter's input.")

    def attach(self, model: nn.Module, names: Sequence[str]) -> list[nn.Parameter]:
        """A and B of every layer.

        Raises:
            UserError: the model is pruned and merging would fill its zeros.
        """
        from overhaul.layers import swap
        from overhaul.layers.lora import adapted, refuse_pruned

        if self.merge:
            refuse_pruned(model, names)
        # The layers divide by the rank; times its root, that is rsLoRA's scale (Kalajdzievski, 2023).
        alpha = self.alpha * math.sqrt(self.rank) if self.rslora else self.alpha
        layers = swap(model, names, lambda old: adapted(old, self.rank, alpha, self.dropout))
        return [tensor for layer in layers.values() for tensor in (layer.lora_A, layer.lora_B)]
