"""RMU: the states of some texts are sent in a random direction, those of others stay where they were."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from overhaul.method import NonNegative, PeakRate, Positive, Rate
from overhaul.removal import Retaining

if TYPE_CHECKING:
    from torch import nn

    from overhaul.data import Data
    from overhaul.objective import Objective
    from overhaul.removal import Before


class Rmu(Retaining):
    """Unlearn texts by misdirecting the states of one block; only the blocks up to it are trained (RMU)."""

    paper: ClassVar[str] = (
        "Li, Pan, Gopal et al.: The WMDP Benchmark: Measuring and Reducing Malicious Use With Unlearning, ICML 2024, "
        "arXiv:2403.03218"
    )

    lr: PeakRate = 5e-5
    retain_term: Literal["states", "none"] = Field(  # pyright: ignore[reportIncompatibleVariableOverride]
        "states", description="What holds on to the texts to retain: their states in the same block, or nothing."
    )
    retain_weight: NonNegative = Field(1200.0, description="Weight of that term.")
    layer: Positive | None = Field(None, description="The block whose states are misdirected; none: at a quarter.")
    blocks: Positive = Field(3, description="Blocks that are trained, that one the last of them.")
    coefficient: Rate = Field(6.5, description="Length of the direction that states are sent in.")
    adaptive: bool = Field(
        False, description="In units of each state's own length before, which the block decides (Adaptive RMU)."
    )

    def check(self, model: nn.Module, data: Data | None) -> None:
        """Refuses a block that there is not."""
        from overhaul.errors import UserError
        from overhaul.interop import hf

        depth = hf.depth(model.config)
        if self.layer and self.layer > depth:
            raise UserError(f"--layer {self.layer}: the model has {depth} blocks", allowed=f"1 to {depth}")
        super().check(model, data)

    def place(self, model: nn.Module) -> int:
        """The block, from 1."""
        from overhaul.interop import hf

        return self.layer or max(1, round(hf.depth(model.config) / 4))

    def unlearning(self, model: nn.Module, before: Before) -> Objective:
        from overhaul.unlearning.terms import Misdirected, direction

        return Misdirected(self.place(model), self.coefficient * direction(model), before() if self.adaptive else None)

    def holding(self, model: nn.Module, before: Before) -> Objective:
        """The states of the texts to retain, in the same block."""
        from overhaul.unlearning.terms import Beside, StatesKept

        return Beside(StatesKept(self.place(model), before()))

    def train_parameters(self, model: nn.Module) -> None:
        """The matrices that the blocks' MLPs end with."""
        from overhaul.walk import decoder_blocks, linears_of

        model.requires_grad_(False)
        last = self.place(model)
        for name, block in list(decoder_blocks(model).items())[max(0, last - self.blocks) : last]:
            list(linears_of(block, name).values())[-1].weight.requires_grad_(True)
