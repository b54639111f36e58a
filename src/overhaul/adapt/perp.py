"""PERP (Zimmer et al., 2023): retrain a small part of a pruned model, then merge to exactly the same zeros."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field, field_validator

from overhaul.errors import UserError
from overhaul.method import NonNegative, PeakRate, Positive, Rate, Training

if TYPE_CHECKING:
    from torch import nn

    from overhaul.data import Data
    from overhaul.train import Plan

Group = Literal["biases", "norms", "head", "lora", "lora_prune", "mask_lora", "scale_lora", "full"]
_ADAPTERS = ("lora", "lora_prune", "mask_lora", "scale_lora")


class Perp(Training):
    """Win back a pruned model by training a small part of it.

    Adapters train increments of the pruned layers W_p with mask M: `mask_lora` W_p + M * (s B A), merged exactly;
    `lora_prune` W_p + s B A, masked at the merge; `scale_lora` W_p * (B A), merged exactly; `lora` cannot be merged
    without filling the zeros and is refused. `--reconstruct` trains each block against its dense self instead.
    """

    paper: ClassVar[str] = (
        "Zimmer, Andoni, Spiegel, Pokutta: PERP: Rethinking the Prune-Retrain Paradigm in the Era of LLMs, 2023, "
        "arXiv:2312.15230"
    )

    train: tuple[Group, ...] = Field(
        ("norms", "mask_lora"), description="What to train: any of these, at most one adapter."
    )
    lr: PeakRate = 4e-3
    rank: Positive = Field(8, description="Rank of the adapters.")
    alpha: Rate = Field(16.0, description="The increment is scaled by alpha / rank.")
    noise: NonNegative = Field(
        0.0, description="Standard deviation that breaks scale_lora's symmetric start; 0 is the paper's."
    )
    reconstruct: bool = Field(
        False, description="Match each dense block's output, block by block, instead of predicting tokens."
    )
    granularity: Literal["block", "attn_mlp", "matrix"] = Field("block", description="What is reconstructed at a time.")
    samples: Positive = Field(32, description="Calibration windows for --reconstruct.")

    @field_validator("train")
    @classmethod
    def _one_adapter(cls, groups: tuple[Group, ...]) -> tuple[Group, ...]:
        adapters = [group for group in groups if group in _ADAPTERS]
        if not groups:
            raise ValueError("nothing trainable is selected; give at least one group, such as norms mask_lora")
        if len(adapters) > 1 or (adapters and "full" in groups):
            raise ValueError(
                f"{' and '.join(adapters + ['full'] * ('full' in groups))} exclude each other; keep one of them"
            )
        return tuple(dict.fromkeys(groups))

    def plan(self, model: nn.Module, data: Data) -> Plan:
        """The selected parts on the language-model loss.

        Raises:
            UserError: a group that the model does not have, or `lora` on a pruned model.
        """
        from overhaul.objective import CrossEntropy
        from overhaul.optim.build import build
        from overhaul.schedules import schedule
        from overhaul.train import Plan
        from overhaul.trainable import prepare
        from overhaul.watch import KeepZeros

        selected = prepare(model, self)
        return Plan(
            model=model,
            objective=CrossEntropy(),
            stream=data.training(self),
            optimizer=build(self, selected.parameters, model=model),
            schedule=schedule(self.schedule, self.warmup),
            watchers=(KeepZeros(),) if "full" in self.train else (),
            finish=selected.finish,
        )

    def in_stages(self) -> bool:
        """With `reconstruct` every block is a stage."""
        return self.reconstruct

    def in_parts(self) -> bool:
        """The blocks are such parts."""
        return self.reconstruct

    def stages(self, model: nn.Module, data: Data) -> Iterator[Plan]:
        """One plan, or with `reconstruct` one for each block, made when the block before is finished."""
        if not self.reconstruct:
            yield self.plan(model, data)
            return
        if "head" in self.train:
            raise UserError(
                "--train head has nothing to do in --reconstruct: the head is in no block",
                hint="leave head out",
            )
        from overhaul.reconstruct import reconstruction_plans

        yield from reconstruction_plans(model, data, self)
