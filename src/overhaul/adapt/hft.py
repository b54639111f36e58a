"""Half Fine-Tuning (Hui et al., 2024): train one half of the matrices, leave the other, and draw again each round."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, ClassVar

from pydantic import Field, model_validator

from overhaul.halves import Halves
from overhaul.method import PeakRate, Positive, Rate, Training

if TYPE_CHECKING:
    from torch import nn

    from overhaul.data import Data
    from overhaul.halves import Half
    from overhaul.stream import Stream
    from overhaul.train import Plan
    from overhaul.watch import Moments

PAPER = "Hui, Zhang, Wang, Xu, Sun, Wu: HFT: Half Fine-Tuning for Large Language Models, ACL 2025, arXiv:2404.18466"


class HalfFineTuning(Halves, Training):
    """Train a random half of the matrices and leave the other as it is: what the model knew is kept longer.

    The half is balanced over attention, MLP and norms, and over the blocks. With --rounds it is drawn again; each round
    is a training of its own, with its own schedule, on the text that follows. A model that was trained like this before
    gets the next draws, not the same ones.
    """

    paper: ClassVar[str] = PAPER

    lr: PeakRate = 5e-5
    steps: Positive = Field(100, description="Optimizer steps of each round.")
    epochs: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = Field(
        None, description="Passes over the training data in each round; replaces --steps when given."
    )
    rounds: Positive = Field(1, description="How often a half is drawn and trained.")
    soft: Rate | None = Field(
        None, description="Train the other half too, held by this weight times its squared distance from the start."
    )
    keep_moments: bool = Field(
        False, description="Matrices that are drawn again go on with the moments they had; else with none."
    )

    @model_validator(mode="after")
    def _soft_is_not_clipped(self) -> HalfFineTuning:
        if self.soft is not None and self.clip:
            raise ValueError(
                f"soft holds the other half by a gradient, which clip would count in and take from the trained half; "
                f"use clip 0, not {self.clip:g}"
            )
        return self

    def check(self, model: nn.Module, data: Data | None) -> None:
        """Draws every round, and refuses what cannot be done on sharded parameters."""
        from overhaul.halves import outside, select
        from overhaul.matrices import manifest
        from overhaul.sharding import refuse_sharded

        assert data is not None
        for flag, asked in (("--soft", self.soft is not None), ("--keep-moments", self.keep_moments)):
            if asked:
                refuse_sharded(flag)
        listed = manifest(model)
        outside(listed, self)
        for number in self._numbers(data):
            select(listed, self, seed=data.seed, number=number)

    def _numbers(self, data: Data) -> range:
        """The numbers of this run's draws, which follow on those of the model's earlier steps."""
        before = [step for step in data.lineage if (step.verb, step.method) == ("adapt", "hft")]
        first = 1 + sum(int(str(step.fields["rounds"])) for step in before)
        return range(first, first + self.rounds)

    def in_stages(self) -> bool:
        """Every round is a stage."""
        return self.rounds > 1

    def plan(self, model: nn.Module, data: Data) -> Plan:
        """That of the first round."""
        return next(self.stages(model, data))

    def stages(self, model: nn.Module, data: Data) -> Iterator[Plan]:
        """One plan a round; the optimizer is made anew, for what is trained now."""
        from overhaul.halves import train_half
        from overhaul.journal import note_table
        from overhaul.progress import say
        from overhaul.watch import Moments

        stream, moments, rows = data.training(self), Moments() if self.keep_moments else None, []
        for number in self._numbers(data):
            model.requires_grad_(True)
            half = train_half(model, self, seed=data.seed, draw=number)
            say(f"draw {number}: {half.told()}")
            counts = [f"{drawn} of {of}" for drawn, of in half.counts.values()]
            rows.append([str(number), *counts, f"{half.share:.1%}"])
            columns = ["draw", *half.counts, "of all parameters"]
            yield self._round(model, half, stream, moments)
        note_table("What was drawn to be trained: matrices are counted, and they are not of one size", columns, rows)

    def _round(self, model: nn.Module, half: Half, stream: Stream, moments: Moments | None) -> Plan:
        from overhaul.objective import Anchor, CrossEntropy
        from overhaul.optim.build import build
        from overhaul.schedules import schedule
        from overhaul.train import Plan
        from overhaul.watch import KeepZeros

        held = {name: p for name, p in model.named_parameters() if self.soft and name in half.rest}
        for parameter in held.values():
            parameter.requires_grad_(True)
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer = build(self, trained, model=model)
        if moments:
            moments.hand_over(model, optimizer)
        # After the optimizer, which makes trained parameters fp32.
        start = {name: parameter.detach().clone() for name, parameter in held.items()}
        return Plan(
            model=model,
            objective=CrossEntropy() + self.soft * Anchor(start) if self.soft and start else CrossEntropy(),
            stream=stream,
            optimizer=optimizer,
            schedule=schedule(self.schedule, self.warmup),
            watchers=(KeepZeros(), *([moments] if moments else [])),
        )
