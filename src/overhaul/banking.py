"""Learning with a bank of parameters for each task: what its methods share, as settings."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from overhaul.errors import UserError
from overhaul.learning import Learning
from overhaul.method import NonNegative, Rate

if TYPE_CHECKING:
    from torch import nn


class BankLearning(Learning):
    """The model stays as it is; each task has tensors of its own beside it, and no two tasks share any."""

    keeps_banks: ClassVar[bool] = True

    norm_penalty: NonNegative = Field(0.0, description="Weight of the sum of the trained tensors' L2 norms.")
    temperature: Rate = Field(1.0, description="Of the logits by whose entropy a task is told.")

    def check(self, model: nn.Module, data: Any) -> None:
        from torch import nn

        if self.batch_size == 1 and any(isinstance(module, nn.BatchNorm2d) for module in model.modules()):
            raise UserError("--batch-size 1 leaves batch normalisations nothing to normalise over", allowed="2 or more")
