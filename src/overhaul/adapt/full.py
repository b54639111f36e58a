"""Full fine-tuning."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field

from overhaul.method import PeakRate, Training

if TYPE_CHECKING:
    from torch import nn

    from overhaul.data import Data
    from overhaul.stream import Stream
    from overhaul.train import Plan


class Full(Training):
    """Train every parameter; pruned weights stay zero."""

    lr: PeakRate = 5e-5
    keep_zeros: bool = Field(True, description="Hold the pruned weights of a pruned model at zero.")

    def plan(self, model: nn.Module, data: Data) -> Plan:
        """All parameters; with `keep_zeros` masks are enforced after every step, else they are dropped."""
        from overhaul.layers.masked import without_masks
        from overhaul.objective import CrossEntropy
        from overhaul.optim.build import build
        from overhaul.schedules import schedule
        from overhaul.train import Plan
        from overhaul.watch import KeepZeros

        model.requires_grad_(True)
        return Plan(
            model=model,
            objective=CrossEntropy(),
            stream=self.stream(data),
            optimizer=build(self, model.parameters(), model=model),
            schedule=schedule(self.schedule, self.warmup),
            watchers=(KeepZeros(),) if self.keep_zeros else (),
            finish=(lambda model: model) if self.keep_zeros else without_masks,
        )

    def stream(self, data: Data) -> Stream:
        """Micro-batches of what is trained on."""
        return data.training(self)
