"""VeRA (Kopiczko et al., 2024): low-rank increments from shared random factors and two trained vectors a layer."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from overhaul.adapt.increments import Increments
from overhaul.method import Natural, PeakRate, Positive, Rate

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import nn


class VeRA(Increments):
    """Train two vectors a layer that scale random low-rank factors which all layers share."""

    paper: ClassVar[str] = (
        "Kopiczko, Blankevoort, Asano: VeRA: Vector-based Random Matrix Adaptation, ICLR 2024, arXiv:2310.11454"
    )

    lr: PeakRate = 4e-3
    rank: Positive = Field(256, description="Rank of the random factors.")
    d_initial: Rate = Field(0.1, description="What the vector between the factors begins with.")
    key: Natural = Field(0, lt=2**63, description="The random factors are drawn from it, on any machine.")

    def attach(self, model: nn.Module, names: Sequence[str]) -> list[nn.Parameter]:
        """b and d of every layer.

        Raises:
            UserError: the model is pruned: merging would fill its zeros, now or when the adapter is read.
        """
        from overhaul.layers import swap
        from overhaul.layers.lora import refuse_pruned
        from overhaul.layers.vera import VeRALinear
        from overhaul.random_bases import VeRABases
        from overhaul.select import shapes_of

        refuse_pruned(model, names)
        bases = VeRABases.draw(shapes_of(model, names).values(), self.rank, key=self.key)
        layers = swap(model, names, lambda old: VeRALinear.from_linear(old, bases, self.d_initial))
        return [tensor for layer in layers.values() for tensor in (layer.vera_lambda_b, layer.vera_lambda_d)]
