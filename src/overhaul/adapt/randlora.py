"""RandLoRA (Albert et al., 2025): full-rank increments from the trained scales of shared random bases."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field, model_validator

from overhaul.adapt.increments import Increments
from overhaul.method import Fraction, Natural, PeakRate, Positive, Rate

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import nn


class RandLoRA(Increments):
    """Train full-rank increments with as few numbers as LoRA: scales of random bases that all layers share.

    A smaller rank of the bases means more of them, and more trained numbers: d + d^2 / rank a layer, where d is its
    smaller side.
    """

    reads_packed: ClassVar[bool] = True
    paper: ClassVar[str] = (
        "Albert, Zhang, Saratchandran, Rodriguez-Opazo, van den Hengel, Abbasnejad: RandLoRA: Full-Rank "
        "Parameter-Efficient Fine-Tuning of Large Models, ICLR 2025, arXiv:2502.00987"
    )

    lr: PeakRate = 1e-4
    rank: Positive = Field(32, description="Rank of one random base; a smaller one means more trained numbers.")
    alpha: Rate = Field(640.0, description="The increment is scaled by alpha / rank.")
    scale_mode: Literal["peft", "paper"] = Field(
        "peft", description="peft: alpha / rank; paper: that over the square root of the number of bases."
    )
    bases: Literal["dense", "sparse", "very_sparse"] = Field(
        "dense", description="dense: uniform numbers; sparse: two thirds zeros; very_sparse: nearly all of them."
    )
    key: Natural = Field(0, lt=2**63, description="The random bases are drawn from it, on any machine.")
    dropout: Fraction = Field(0.0, description="Dropout on the adapter's input.")
    save_bases: bool = Field(False, description="Store the random bases with an adapter that is kept apart.")
    as_lora: Natural = Field(
        0, description="Rank of a LoRA adapter to write instead, nearest to what was trained; 0 writes RandLoRA's own."
    )

    @model_validator(mode="after")
    def _kept_apart(self) -> RandLoRA:
        if self.merge and (self.save_bases or self.as_lora):
            flag = "--save-bases" if self.save_bases else "--as-lora"
            raise ValueError(f"{flag} is for an adapter that is kept apart; add --no-merge, or leave it out")
        if self.save_bases and self.as_lora:
            raise ValueError("--as-lora writes an adapter without random bases; leave --save-bases out")
        return self

    def attach(self, model: nn.Module, names: Sequence[str]) -> list[nn.Parameter]:
        """lambda and gamma of every layer; pruned weights stay zero.

        Raises:
            UserError: the model is pruned and the adapter is to be kept apart, where nothing would know of the zeros.
        """
        from overhaul.layers import swap
        from overhaul.layers.lora import refuse_pruned
        from overhaul.layers.randlora import RandLoRALinear
        from overhaul.random_bases import RandLoRABases
        from overhaul.select import shapes_of

        if not self.merge:
            refuse_pruned(model, names, hint="without --no-merge: the merged weights keep the zeros")
        shapes = shapes_of(model, names)
        _tell_of_single_bases(self.rank, shapes)
        bases = RandLoRABases.draw(shapes.values(), self.rank, key=self.key, kind=self.bases, saved=self.save_bases)
        how = {"paper": self.scale_mode == "paper", "dropout": self.dropout}
        layers = swap(model, names, lambda old: RandLoRALinear.from_linear(old, bases, self.alpha, **how))
        return [tensor for layer in layers.values() for tensor in (layer.randlora_lambda, layer.randlora_gamma)]

    def finish(self, model: nn.Module) -> nn.Module:
        """Merged, kept apart, or kept apart as LoRA."""
        if not self.as_lora:
            return super().finish(model)
        from overhaul.adapt.increments import refuse_non_finite
        from overhaul.journal import note_table
        from overhaul.layers import swap
        from overhaul.layers.lora import nearest_lora
        from overhaul.layers.randlora import RandLoRALinear

        refuse_non_finite(model)
        errors: dict[str, float] = {}
        for name in [name for name, module in model.named_modules() if isinstance(module, RandLoRALinear)]:
            layer: Any = model.get_submodule(name)
            nearest, errors[name] = nearest_lora(layer.base(), layer.increment(), self.as_lora)
            swap(model, [name], lambda _, nearest=nearest: nearest)
        note_table(
            f"LoRA of rank {self.as_lora} leaves out {max(errors.values()):.1%} of an increment's norm at most",
            ("layer", "left out"),
            [(name, f"{error:.1%}") for name, error in errors.items()],
        )
        return model


def _tell_of_single_bases(rank: int, shapes: dict[str, tuple[int, int]]) -> None:
    """Says where one base is all there is."""
    from overhaul.progress import say

    single = [(name, min(shape)) for name, shape in shapes.items() if min(shape) <= rank]
    if single:
        name, small = single[0]
        say(
            f"--rank {rank} is not below the smaller side of {len(single)} of {len(shapes)} layers, such as {name} "
            f"({small}): they have a single base and {rank + small:,} trained numbers"
        )
