"""LoRA (Hu et al., 2021): W + (alpha / r) B A with a frozen W."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from overhaul.method import Fraction, PeakRate, Positive, Rate, Training

if TYPE_CHECKING:
    from torch import nn

    from overhaul.data import Data
    from overhaul.train import Plan


class LoRA(Training):
    """Train low-rank increments of the linear layers."""

    reads_packed: ClassVar[bool] = True

    lr: PeakRate = 2e-4
    rank: Positive = Field(16, description="Rank of the increments.")
    alpha: Rate = Field(32.0, description="The increment is scaled by alpha / rank.")
    dropout: Fraction = Field(0.0, description="Dropout on the adapter's input.")
    targets: tuple[str, ...] = Field(
        (),
        description="Ends of layer names, such as q_proj v_proj; none means every linear layer of the blocks.",
    )
    merge: bool = Field(True, description="Write a merged model; otherwise a PEFT adapter directory.")

    def plan(self, model: nn.Module, data: Data) -> Plan:
        """Only A and B are trained; at the end they are merged, unless the adapter is to be kept apart.

        Raises:
            UserError: a target fits no layer, or the model is pruned and merging would fill its zeros.
        """
        from overhaul.layers import merge_all, swap
        from overhaul.layers.lora import adapted, refuse_pruned
        from overhaul.objective import CrossEntropy
        from overhaul.optim.adamw import adamw
        from overhaul.select import select_linears
        from overhaul.train import Plan, schedule

        merge_all(model)  # an adapter directory over packed weights comes with its increments apart
        names = select_linears(model, self.targets)
        if self.merge:
            refuse_pruned(model, names)
        model.requires_grad_(False)
        layers = swap(model, names, lambda old: adapted(old, self.rank, self.alpha, self.dropout))
        trained = [tensor for layer in layers.values() for tensor in (layer.lora_A, layer.lora_B)]
        return Plan(
            model=model,
            objective=CrossEntropy(),
            stream=data.training(self),
            optimizer=adamw(trained, lr=self.lr, weight_decay=self.weight_decay),
            schedule=schedule(self.schedule, self.warmup),
            finish=_dense if self.merge else lambda model: model,
        )


def _dense(model: nn.Module) -> nn.Module:
    """The merged model; over packed weights the increments would be lost in the rounding, so it is dense throughout."""
    from overhaul.layers import Packed, dequantize_all, merge_all
    from overhaul.progress import say

    if any(isinstance(module, Packed) for module in model.modules()):
        say("merged into dequantized weights: the result is dense; --no-merge keeps the quantized base as it is")
    return dequantize_all(merge_all(model))
