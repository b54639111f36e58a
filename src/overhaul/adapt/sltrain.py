"""SLTrain (Han et al., 2024): train thin factors and a sparse matrix in place of every linear layer."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, ClassVar, Literal, Self

from pydantic import Field

from overhaul.errors import UserError
from overhaul.method import PeakRate, Positive, Rate, Share, Training

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from torch import nn

    from overhaul.data import Data
    from overhaul.factored import Form
    from overhaul.train import Plan


class SLTrain(Training):
    """Replace every linear layer by thin factors plus a sparse matrix, and train those: fewer numbers to hold.

    A dense model is converted first: the best product of rank R, and what it leaves at the support. A directory that
    `--no-merge` wrote is trained on with the factors and the support that it has.
    """

    paper: ClassVar[str] = (
        "Andi Han, Jiaxiang Li, Wei Huang, Mingyi Hong, Akiko Takeda, Pratik Jawanpuria, Bamdev Mishra: SLTrain: a "
        "sparse plus low-rank approach for parameter and memory efficient pretraining, NeurIPS 2024, arXiv:2406.02214"
    )
    reads_packed: ClassVar[bool] = True

    lr: PeakRate = 1e-3
    schedule: Literal["linear", "cosine", "constant"] = Field("cosine", description="Decay after the warm-up.")
    rank: Positive = Field(128, description="Rank of the products.")
    density: Share = Field(0.03, description="Share of each weight's positions that have a value of their own.")
    alpha: Rate = Field(32.0, description="The products are scaled by alpha / rank.")
    support: Literal["random", "largest", "none"] = Field(
        "random", description="Where those positions are: at random, where the product is worst, or nowhere."
    )
    also: tuple[Literal["norms", "embeddings"], ...] = Field(
        ("norms",), description="What else is trained; embeddings include the head."
    )
    merge: bool = Field(True, description="Write a dense model; otherwise one that keeps its factors and support.")

    def at(self, path: Path) -> Self:
        """For a directory of factors, what these are: the record says what was trained.

        Raises:
            UserError: other factors are asked for.
        """
        from overhaul.factored import form_on_disk

        form = form_on_disk(path)
        if form is None:
            return self
        self._refuse_other_factors(form)
        there = {"rank": form.rank, "alpha": form.alpha, **({"density": form.density} if form.density else {})}
        return self.model_copy(update=there)

    def check(self, model: nn.Module, data: Data | None) -> None:
        """Refuses what `plan` would refuse.

        Raises:
            UserError: the model is quantized or pruned, a layer would not become smaller, or the model has factors
                already, and others are asked for.
        """
        from overhaul.factored import check_dense, check_sizes, factored_layers, form_of
        from overhaul.select import block_linears

        if layers := factored_layers(model):
            self._refuse_other_factors(form_of(next(iter(layers.values()))))
            return
        check_dense(model)
        check_sizes(block_linears(model), self.rank, 0.0 if self.support == "none" else self.density)

    def plan(self, model: nn.Module, data: Data) -> Plan:
        """Factors, values and biases of the layers are trained, norms and embeddings as asked.

        Raises:
            UserError: as `check`.
        """
        from overhaul.factored import convert, factored_layers
        from overhaul.layers import dequantize_all
        from overhaul.objective import CrossEntropy
        from overhaul.optim.build import build
        from overhaul.schedules import schedule
        from overhaul.train import Plan

        self.check(model, data)
        layers = factored_layers(model) or convert(
            model, rank=self.rank, density=self.density, alpha=self.alpha, support=self.support, seed=data.seed
        )
        model.requires_grad_(False)
        for layer in layers.values():
            layer.requires_grad_(True)
        for parameter in self._others(model):
            parameter.requires_grad_(True)
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        return Plan(
            model=model,
            objective=CrossEntropy(),
            stream=data.training(self),
            optimizer=build(self, trained, model=model),
            schedule=schedule(self.schedule, self.warmup),
            finish=dequantize_all if self.merge else lambda model: model,
        )

    def _others(self, model: nn.Module) -> Iterator[nn.Parameter]:
        """The parameters outside of the layers that are trained too."""
        from overhaul.matrices import manifest

        kinds = {"norms": ("norm",), "embeddings": ("embedding", "head")}
        wanted = {category for name in self.also for category in kinds[name]}
        return (listed.parameter for listed in manifest(model) if listed.category in wanted)

    def _refuse_other_factors(self, form: Form) -> None:
        """Raises `UserError` where a setting that was chosen differs from what the model is made of."""
        for name, value in form._asdict().items():
            chosen, default = getattr(self, name), type(self).model_fields[name].default
            # How many positions there are was rounded down, so that a density comes back a little smaller.
            if chosen != default and not math.isclose(chosen, value, rel_tol=1e-2 if name == "density" else 1e-9):
                raise UserError(
                    f"--{name} {chosen:g}: the model has factors already, of {name} {value:g}, and is trained on with "
                    "these",
                    hint=f"without --{name}",
                )
        if self.support != "random":
            raise UserError(
                f"--support {self.support}: the model has a support already, and is trained on with it",
                hint="without --support",
            )
