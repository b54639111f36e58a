"""Learning with a bank of parameters for each task: what its methods share, as settings."""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from overhaul.errors import UserError
from overhaul.learning import Learning
from overhaul.method import Fraction, Natural, NonNegative, Positive, Rate

if TYPE_CHECKING:
    from torch import nn

    from overhaul.banks import Sockets
    from overhaul.learners.learner import Learner
    from overhaul.task_data import TaskData


class BankLearning(Learning):
    """The model stays as it is; each task has tensors of its own beside it, and no two tasks share any."""

    keeps_banks: ClassVar[bool] = True

    norm_penalty: NonNegative = Field(0.0, description="Weight of the sum of the trained tensors' L2 norms.")
    label_smoothing: Fraction = Field(0.0, description="Share of each label that is spread over a task's classes.")
    temperature: Rate = Field(1.0, description="Of the logits by whose entropy a task is told.")
    views: Natural = Field(
        0, description="Augmented copies of an example whose logits are averaged before a task is told by them."
    )
    plain_views: Positive = Field(6, description="How often the example as it is counts among its --views.")
    augment: Literal["auto", "noise", "grey", "colour"] = Field(
        "auto",
        description="How --views are made: noise; grey adds shifts, turns and light; colour mirrors and colours too; "
        "auto is noise for grey images and colour for others.",
    )

    @abstractmethod
    def sockets(self) -> Sockets:
        """Where this method's banks go."""

    def learner(self, model: nn.Module, data: TaskData) -> Learner:
        from overhaul.learners.banked import BankLearner

        return BankLearner(self, model, data, self.sockets())

    def check(self, model: nn.Module, data: Any) -> None:
        from torch import nn

        if self.batch_size == 1 and any(isinstance(module, nn.BatchNorm2d) for module in model.modules()):
            raise UserError("--batch-size 1 leaves batch normalisations nothing to normalise over", allowed="2 or more")
