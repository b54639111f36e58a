"""Watchers change something on a timetable while the loop runs; observing is the loop's own business."""

from __future__ import annotations

from typing import Any

from torch import nn

from overhaul.layers.masked import MaskedLinear


class Watcher:
    """A hook into the loop that does nothing yet."""

    def start(self, model: nn.Module) -> None:
        """Before the first step."""

    def step(self, model: nn.Module, step: int) -> None:
        """After optimizer step number `step`, counted from 1."""

    def end(self, model: nn.Module) -> None:
        """After the last step."""

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes over what `state_dict` returned."""


class KeepZeros(Watcher):
    """Sets the pruned weights of every `MaskedLinear` back to zero after each step."""

    def step(self, model: nn.Module, step: int) -> None:
        for module in model.modules():
            if isinstance(module, MaskedLinear):
                module.enforce()
