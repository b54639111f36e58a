"""What a method of several steps works with: the data, and THE loop."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from overhaul.data import Data
from overhaul.method import Training
from overhaul.train import History, Plan, train


@dataclass(frozen=True, slots=True, kw_only=True)
class Workspace:
    """Handed to `Pipeline.run`.

    Attributes:
        data: the corpus as the model sees it.
        dtype: of matrix products.
        path: the directory that the model was read from.
        weights_sha256: hash of the weights there.
    """

    data: Data
    dtype: torch.dtype
    path: Path
    weights_sha256: str

    def train(self, plan: Plan, settings: Training) -> History:
        """Runs a plan to its end, its `finish` included; nothing is trainable afterwards."""
        history = train(plan, settings, seed=self.data.seed, dtype=self.dtype, quiet=True)
        finish(plan)
        return history


def finish(plan: Plan) -> nn.Module:
    """What follows the last step of a plan: the model is frozen, then adapters are merged and masks dropped."""
    for parameter in plan.model.parameters():
        parameter.requires_grad_(False)
        parameter.grad = None
    with torch.no_grad():
        return plan.finish(plan.model)
