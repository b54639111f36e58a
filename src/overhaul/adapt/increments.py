"""What methods share that train increments of frozen linear layers: which layers, merged or kept apart."""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING

from pydantic import Field

from overhaul.method import Training

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import nn

    from overhaul.data import Data
    from overhaul.stream import Stream
    from overhaul.train import Plan


class Increments(Training):
    """A training of adapters; what they are is the subclass's."""

    targets: tuple[str, ...] = Field(
        (),
        description="Ends of layer names, such as q_proj v_proj; none means every linear layer of the blocks.",
    )
    merge: bool = Field(True, description="Write a merged model; otherwise a PEFT adapter directory.")

    @abstractmethod
    def attach(self, model: nn.Module, names: Sequence[str]) -> list[nn.Parameter]:
        """Puts adapters over the layers called `names`, in place, and returns what is trained."""

    def check(self, model: nn.Module, data: Data | None) -> None:
        """Raises `UserError` for a target that fits no layer."""
        from overhaul.select import select_linears

        select_linears(model, self.targets)

    def plan(self, model: nn.Module, data: Data) -> Plan:
        """Only the increments are trained; at the end they are merged, unless the adapter is to be kept apart.

        Raises:
            UserError: a target fits no layer, or the adapter does not fit the model.
        """
        return self.plan_on(model, data.training(self))

    def plan_on(self, model: nn.Module, stream: Stream) -> Plan:
        """The same on micro-batches that another method made.

        Raises:
            UserError: a target fits no layer, or the adapter does not fit the model.
        """
        from overhaul.layers import merge_all
        from overhaul.objective import CrossEntropy
        from overhaul.optim.build import build
        from overhaul.schedules import schedule
        from overhaul.select import select_linears
        from overhaul.train import Plan

        merge_all(model)  # an adapter directory over packed weights comes with its increments apart
        names = select_linears(model, self.targets)
        model.requires_grad_(False)
        trained = self.attach(model, names)
        return Plan(
            model=model,
            objective=CrossEntropy(),
            stream=stream,
            optimizer=build(self, trained, model=model),
            schedule=schedule(self.schedule, self.warmup),
            finish=self.finish,
        )

    def finish(self, model: nn.Module) -> nn.Module:
        """The merged model, or the one with its adapters where they are kept apart."""
        return merged(model) if self.merge else model


def merged(model: nn.Module) -> nn.Module:
    """The merged model; over packed weights the increments would be lost in the rounding, so it is dense throughout.

    Raises:
        UserError: a merged weight is not finite.
    """
    from overhaul.layers import Packed, dequantize_all, merge_all
    from overhaul.progress import say

    refuse_non_finite(model)
    if any(isinstance(module, Packed) for module in model.modules()):
        say("merged into dequantized weights: the result is dense; --no-merge keeps the quantized base as it is")
    return dequantize_all(merge_all(model))


def refuse_non_finite(model: nn.Module) -> None:
    """Raises `UserError` naming the first layer whose weight with its increment is not finite."""
    import torch

    from overhaul.errors import UserError
    from overhaul.layers import Adapter

    for name, module in model.named_modules():
        with torch.no_grad():
            if isinstance(module, Adapter) and not module.dense().isfinite().all():
                raise UserError(
                    f"{name}: the weight with its increment is not finite, so nothing was written",
                    hint="a smaller --lr or --alpha",
                )
