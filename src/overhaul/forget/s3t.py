"""S3T: adapters in shards and slices, so that an example can be taken out again exactly (ICLR 2025)."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from overhaul.kinds import Kind
from overhaul.method import Names, PeakRate, Positive, Rate, Training

if TYPE_CHECKING:
    from torch import nn

    from overhaul.artifact import Artifact
    from overhaul.data import Data
    from overhaul.deletion.sequences import Order
    from overhaul.picture_data import PictureData
    from overhaul.train import Plan


class S3T(Training):
    """Train adapters in shards and slices, so that an example can be taken out again exactly, and at once.

    With labels it trains a classifier, of texts or of images, whose head every stage has a copy of.

    Every row of the data is trained on, and none is held out of it: who is held out would depend on the others.
    """

    paper: ClassVar[str] = (
        "Basu Roy Chowdhury, Choromanski, Sehanobish, Dubey, Chaturvedi: Towards Scalable Exact Machine Unlearning "
        "Using Parameter-Efficient Fine-Tuning, ICLR 2025, arXiv:2406.16257"
    )
    kinds: ClassVar[tuple[Kind, ...]] = (Kind.CAUSAL_LM, Kind.TEXT_CLASSIFIER, Kind.ENCODER, Kind.IMAGE_CLASSIFIER)
    holds_out: ClassVar[bool] = False

    lr: PeakRate = 2e-4
    shards: Positive = Field(2, description="Parts of the data, each with its own adapters; logits are averaged.")
    slices: Positive = Field(3, description="Parts of a shard, and stages of a sequence.")
    budget: Positive = Field(3, description="Sequences of each shard: orders in which its slices are learnt.")
    sequences: Literal["cyclic", "matched", "conditional", "random"] = Field(
        "cyclic",
        description="How they are chosen: rotations, for deletions that hit all slices alike; by matching, or drawn, "
        "for those that follow --deletion-prior; or at random.",
    )
    deletion_prior: str | None = Field(
        None, description="File with the probability of each slice that a deletion hits it, one number a line."
    )
    rank: Positive = Field(8, description="Rank of the adapters.")
    alpha: Rate = Field(16.0, description="An adapter is scaled by alpha / rank.")
    rslora: bool = Field(True, description="Scale by alpha / sqrt(rank) instead (rsLoRA), as in the paper.")
    targets: Names = Field((), description="Ends of layer names, such as q_proj v_proj; none: all linear layers.")
    label_field: str | None = Field(
        None,
        description="Column of the label, where it is classes of texts that are learnt: the model gets a head. Images "
        "have their class by their folder, or in the column label.",
    )
    classes: Names = Field(
        (),
        description="All classes, declared: which there are must not depend on data that may be deleted. A classifier "
        "of texts has its own; one of images has its own unless others are declared.",
    )
    uneven: bool = Field(False, description="Let the first stages have one block more, where blocks do not divide.")
    tags: Names = Field(
        (),
        description="Columns of the data by which examples can be asked for, such as id or user; of a folder of images "
        "file.",
    )
    together: str | None = Field(
        None,
        description="One of --tags: examples with the same value are in one slice, as a user's are deleted at once.",
    )
    cache: bool = Field(True, description="Compute once what flows into the blocks that are trained.")
    cache_gb: Rate = Field(4.0, description="Memory that this may take, of a shard.")

    @model_validator(mode="after")
    def _sequences_can_be_chosen(self) -> Self:
        if (most := math.factorial(self.slices)) < self.budget:
            raise ValueError(f"budget {self.budget} is more than the orders of {self.slices} slices; use up to {most}")
        by_prior = self.sequences in ("matched", "conditional")
        if by_prior != (self.deletion_prior is not None):
            raise ValueError(
                f"sequences {self.sequences} needs deletion_prior, a file with {self.slices} probabilities"
                if by_prior
                else f"deletion_prior is read by sequences matched and conditional, not by {self.sequences}"
            )
        if self.sequences == "matched" and self.budget > self.slices:
            raise ValueError(f"budget {self.budget}: sequences matched has up to {self.slices}, one for each slice")
        return self

    @model_validator(mode="after")
    def _what_belongs_together_is_read(self) -> Self:
        if self.together is not None and self.together not in self.tags:
            raise ValueError(
                f"together {self.together} is none of tags ({', '.join(self.tags) or 'none'}); "
                f"use tags {' '.join((*self.tags, self.together))}"
            )
        return self

    @model_validator(mode="after")
    def _classes_are_told_apart(self) -> Self:
        if len(self.classes) == 1:
            raise ValueError(f"classes has {self.classes[0]} alone; use two or more")
        if twice := next((name for n, name in enumerate(self.classes) if name in self.classes[:n]), None):
            raise ValueError(f"classes has {twice} twice; use each once")
        return self

    @model_validator(mode="after")
    def _nothing_depends_on_other_data(self) -> Self:
        if self.eval_every:
            raise ValueError("eval_every: a stage of a shard is no model yet that could be measured; leave it out")
        return self

    def in_stages(self) -> bool:
        return True

    def references(self) -> tuple[str, ...]:
        return (self.deletion_prior,) if self.deletion_prior else ()

    def scaled(self) -> float:
        """Alpha, where a layer divides it by the rank."""
        return self.alpha * math.sqrt(self.rank) if self.rslora else self.alpha

    def orders(self) -> tuple[Order, ...]:
        """The sequences of a shard.

        Raises:
            UserError: the file of probabilities cannot be read, or has other ones.
        """
        from overhaul.deletion.sequences import conditional, cyclic, drawn, matched

        match self.sequences:
            case "cyclic":
                return cyclic(self.slices, self.budget)
            case "random":
                return drawn(self.slices, self.budget)
            case "matched":
                return matched(self._prior(), self.budget)
            case "conditional":
                return conditional(self._prior(), self.budget)

    def _prior(self) -> list[float]:
        from overhaul.errors import UserError

        allowed = f"{self.slices} numbers from 0 to 1 whose sum is at most 1, one a line"
        path = Path(self.deletion_prior or "")
        try:
            found = [float(word) for word in path.read_text("utf-8").replace(",", " ").split()]
        except (OSError, ValueError) as error:
            raise UserError(f"--deletion-prior {path} cannot be read: {error}", allowed=allowed) from error
        if len(found) != self.slices or not all(0 <= one <= 1 for one in found) or sum(found) > 1 + 1e-9:
            raise UserError(f"--deletion-prior {path} has {', '.join(f'{one:g}' for one in found)}", allowed=allowed)
        return found

    def opened(self, made: Artifact) -> Artifact:
        """A model that is to tell classes gets a head, unless it has one.

        Raises:
            UserError: its classes are not known, or it has no use for words.
        """
        from overhaul.errors import UserError
        from overhaul.unlearning.answering import with_classes

        if made.kind is Kind.IMAGE_CLASSIFIER:
            if self.label_field is not None:
                raise UserError(
                    f"--label-field {self.label_field} is of texts, and {made.name} reads images",
                    allowed="a folder for each class; a table with the column label; an .npz with the array labels",
                )
            if self.seq_len != type(self).model_fields["seq_len"].default:
                raise UserError(
                    f"--seq-len {self.seq_len} is of texts, and {made.name} reads images", hint="leave it out"
                )
            return with_classes(made, self.classes)
        if self.label_field is not None:
            return with_classes(made, self.classes)
        if self.classes:
            raise UserError(
                "--classes is of texts with labels, and no column of them is named", hint="--label-field label"
            )
        if made.kind is not Kind.CAUSAL_LM:
            raise UserError(
                f"{made.name} is a {made.kind.value}, and no column of labels is named", hint="--label-field label"
            )
        return made

    def check(self, model: nn.Module, data: Data | PictureData | None) -> None:
        """Refuses examples that cannot be learnt, and slices that do not fit the blocks, or the probabilities given."""
        from overhaul.picture_data import PictureData
        from overhaul.unlearning.answering import refuse_other_labels
        from overhaul.unlearning.below import blocks_of
        from overhaul.unlearning.by_image import refuse_unreadable
        from overhaul.unlearning.stagewise import groups_of

        if data is not None and (self.label_field is not None or isinstance(data, PictureData)):
            refuse_other_labels(model, data)
        if isinstance(data, PictureData):
            refuse_unreadable(model, data)
        groups_of(len(blocks_of(model)), self.slices, uneven=self.uneven)
        self.orders()

    def plan(self, model: nn.Module, data: Data) -> Plan:
        """That of the first stage."""
        return next(self.stages(model, data))

    def stages(self, model: nn.Module, data: Any) -> Iterator[Plan]:
        """A plan for each beginning of a sequence; the model is left as it was, with the adapters beside it."""
        from overhaul.unlearning.stagewise import Stagewise
        from overhaul.unlearning.writing import note_service

        run = Stagewise(self, model, data)
        for shard, order in run.all():
            yield run.plan(shard, order)
            run.keep(shard, order)
        run.restore()
        note_service(run)
