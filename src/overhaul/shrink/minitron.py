"""Minitron (Muralidharan et al. 2024, arXiv:2407.14679): a smaller model out of a larger one, part by part."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from overhaul.errors import UserError
from overhaul.method import PeakRate, Pipeline, Positive, Share
from overhaul.shapes import Grid, Shape, count_of, shapes_for, usual_multiple

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor, nn

    from overhaul.data import Data
    from overhaul.importance import Scores, Source
    from overhaul.interop.decoder import Decoder
    from overhaul.workspace import Workspace

How = Literal["mean", "l2", "variance"]
_SHAPE = ("layers", "hidden", "ffn", "kv_groups", "heads")
_READING = ("samples", "seq_len")
RANKING_WINDOWS = 16
"""Windows that rank candidates, and that measure what the model loses without a layer."""


class Minitron(Pipeline):
    """Cut layers, heads, neurons and channels out of a model, to a shape or to a size; the result is a stock model.

    Give the shape to reach, one number or several, or the size: `--parameters 90M` or `--share 0.6`. A size is looked
    for: shapes that have it are cut, trained for a moment to follow the original, and the best one is written, with
    that training. A shape is cut and nothing is trained.
    """

    paper: ClassVar[str] = (
        "Muralidharan, Sreenivas, Joshi, Chochowski, Patwary, Shoeybi, Catanzaro, Kautz, Molchanov: Compact Language "
        "Models via Pruning and Knowledge Distillation, 2024, arXiv:2407.14679"
    )

    layers: Positive | None = Field(None, description="Layers to keep.")
    hidden: Positive | None = Field(None, description="Channels of the residual stream to keep.")
    ffn: Positive | None = Field(None, description="Neurons of each MLP to keep.")
    kv_groups: Positive | None = Field(None, description="Groups of query heads to keep; together with --heads.")
    heads: Positive | None = Field(None, description="Query heads to keep, equally many in each kept group.")
    parameters: str | None = Field(None, description="Size to look for, such as 90M, 0.09B or 90_000_000.")
    share: Share | None = Field(None, description="Size to look for, as a share of all parameters.")
    multiple: Positive | None = Field(
        None, description="Hidden size and FFN are multiples of it; by default 64, less in narrow models."
    )
    samples: Positive = Field(1024, description="Calibration windows.")
    seq_len: int = Field(256, gt=1, description="Tokens per window; fewer where the model reads fewer.")
    over_batch: How = Field("l2", description="How the scores of windows are put together.")
    over_sequence: How = Field("mean", description="How the activations of a window's tokens are put together.")
    depth: Literal["block", "perplexity", "contiguous"] = Field(
        "block",
        description="Layers to cut: those that change their input least, or that perplexity needs least, or one range.",
    )
    head_residual: bool = Field(
        False, description="Kept heads take over from removed ones; of a group only its queries, inside the group."
    )
    scores: str | None = Field(
        None, description="Directory of an earlier target of the same model: its scores are read instead of the text."
    )
    tolerance: Share = Field(0.05, description="How far from the size a candidate may be, as a share of it.")
    candidates: Positive = Field(8, description="Shapes of the size that are tried.")
    search_steps: Positive = Field(50, description="Steps of each candidate's short distillation.")
    search_batch_size: Positive = Field(4, description="Windows of a step.")
    search_seq_len: int = Field(256, gt=1, description="Tokens of such a window, and of those that rank.")
    search_lr: PeakRate = Field(5e-4, description="Peak learning rate of the short distillation.")

    @field_validator("parameters", mode="before")
    @classmethod
    def _is_a_count(cls, given: object) -> object:
        if isinstance(given, int | float) and not isinstance(given, bool):
            given = f"{given:.0f}"
        if isinstance(given, str):
            count_of(given)
        return given

    @model_validator(mode="after")
    def _asks_for_one_thing(self) -> Minitron:
        shape = [name for name in _SHAPE if getattr(self, name) is not None]
        size = [name for name in ("parameters", "share") if getattr(self, name) is not None]
        if not shape and not size:
            raise ValueError(
                "nothing to reach; give a size, such as share 0.6, or a shape, such as layers, ffn, hidden"
            )
        if shape and size:
            raise ValueError(f"{' and '.join(shape + size)}: a shape and a size exclude each other; leave one out")
        if len(size) == 2:
            raise ValueError("parameters and share are two ways to say a size; leave one out")
        fields = type(self).model_fields
        if self.scores is not None and any(getattr(self, name) != fields[name].default for name in _READING):
            raise ValueError("scores are read as they were taken: samples and seq_len have no effect; leave them out")
        if self.over_batch == "variance" and self.samples < 2 and self.scores is None:
            raise ValueError("the variance over windows needs two of them: samples 2 or more")
        return self

    def others(self) -> tuple[str, ...]:
        """The directory whose scores are read."""
        return () if self.scores is None else (self.scores,)

    def check(self, model: nn.Module, data: Data | None) -> None:
        """Refuses a shape or size that it cannot be cut to, scores of another kind, and text that is too short."""
        from overhaul import importance, pretrained
        from overhaul.interop import decoder

        found = decoder.find(model)
        if self._is_search():
            self._shapes(found)
        else:
            self.target(found)
        if self.scores is not None:
            importance.read(pretrained.resolve(self.scores), **self._how())
        if self._is_search() or self.depth != "block":
            longest = getattr(model.config, "max_position_embeddings", self.search_seq_len)
            if self.search_seq_len > longest:
                raise UserError(
                    f"--search-seq-len {self.search_seq_len} is more than the model reads", allowed=f"up to {longest}"
                )
            assert data is not None
            self._windows(data, limit=1)

    def outline(self, model: nn.Module) -> tuple[str, ...]:
        """The text that is read, and the shape, or the candidates with what each is trained on."""
        from overhaul.interop import decoder

        found = decoder.find(model)
        shapes = self._shapes(found) if self._is_search() else [self.target(found)]
        read = f"scores from {self.scores}" if self.scores else f"scores from {self.samples} windows of {self.seq_len}"
        sizes = [f"  {shape}: {found.architecture.parameters(shape):,} parameters" for shape in shapes]
        if not self._is_search():
            return (read, "cuts to", *sizes)
        tokens = self.search_steps * self.search_batch_size * self.search_seq_len
        return (read, f"trains {len(shapes)} candidates on {tokens:,} tokens each, and writes the best of", *sizes)

    def run(self, model: nn.Module, work: Workspace) -> nn.Module:
        """Scores every part once, then cuts: to the shape, or to the best of several shapes of the size."""
        from overhaul import importance
        from overhaul.cut import cut
        from overhaul.depth import Depth
        from overhaul.interop import decoder

        found = decoder.find(model)
        scores, source = self._scores(model, work)
        skipped_on = f"{work.data.corpus.fingerprint}, windows of {self.search_seq_len}"
        if source.skipped_on != skipped_on:
            scores = replace(scores, skipped_L=None)
        layers = Depth(model, scores, by=self.depth, windows=lambda: self._windows(work.data), dtype=work.dtype)

        def make(shape: Shape) -> nn.Module:
            stay_L, residual = layers.kept(shape.layers), self.head_residual
            return cut(model, importance.choose(scores, found.shape, shape, stay_L, residual=residual))

        smaller = self._best(model, found, make, work) if self._is_search() else make(self.target(found))
        layers.note(decoder.find(smaller).shape.layers)
        importance.note(layers.scores, replace(source, skipped_on=skipped_on))
        return smaller

    def _best(self, model: nn.Module, found: Decoder, make: Callable[[Shape], nn.Module], work: Workspace) -> nn.Module:
        """The shape of the size that has the least loss after a short distillation, with that training."""
        from overhaul import candidates

        settings = {
            "teacher": model,
            "steps": self.search_steps,
            "batch_size": self.search_batch_size,
            "seq_len": self.search_seq_len,
            "lr": self.search_lr,
        }
        short = candidates.ShortDistillation.model_validate(settings)
        windows_NT = self._windows(work.data)
        best, tried = candidates.try_each(self._shapes(found), make, work, short, found.architecture, windows_NT)
        candidates.note(tried, self.search_steps)
        return best

    def _windows(self, data: Data, limit: int = RANKING_WINDOWS) -> Tensor:
        """The text that ranks: held out of training, and not the text that judges the result."""
        return data.windows("calib", seq_len=self.search_seq_len, limit=limit)

    def _how(self) -> dict[str, Any]:
        return {"over_batch": self.over_batch, "over_sequence": self.over_sequence}

    def _is_search(self) -> bool:
        return self.parameters is not None or self.share is not None

    def target(self, found: Decoder) -> Shape:
        """The shape to reach: what is not asked for stays as it is.

        Raises:
            UserError: it is larger than the model, the heads do not fit the groups, a width is no multiple of what was
                asked for, or no stock configuration holds it.
        """
        from overhaul.interop.decoder import config_of

        source = found.shape
        heads, kv_groups = self._heads(source)
        target = Shape(
            layers=self.layers or source.layers,
            hidden=self.hidden or source.hidden,
            ffn=self.ffn or source.ffn,
            heads=heads,
            kv_groups=kv_groups,
        )
        for name in _SHAPE:
            asked, there = getattr(target, name), getattr(source, name)
            if asked > there:
                raise UserError(
                    f"--{name.replace('_', '-')} {asked} is more than the model has", allowed=f"up to {there}"
                )
        if heads // kv_groups > source.heads // source.kv_groups:
            raise UserError(
                f"--heads {heads} in {kv_groups} groups are {heads // kv_groups} in each, and the model has "
                f"{source.heads // source.kv_groups} in each",
                allowed=f"--heads up to {kv_groups * (source.heads // source.kv_groups)} with --kv-groups {kv_groups}",
            )
        for name in ("hidden", "ffn"):
            _refuse_odd_width(name, getattr(target, name), getattr(source, name), self.multiple)
        if self.head_residual:
            _refuse_idle_residual(source, target)
        if target == source:
            raise UserError(f"the model already has this shape: {source}", hint="a smaller one")
        config_of(found, target, range(target.layers))
        return target

    def _heads(self, source: Shape) -> tuple[int, int]:
        """Query heads and groups as asked for."""
        if source.heads == source.kv_groups:  # every head has its own key and value: one number says both
            heads = self.heads or self.kv_groups or source.heads
            groups = self.kv_groups or heads
        elif (self.heads is None) != (self.kv_groups is None):
            each = source.heads // source.kv_groups
            groups = self.kv_groups or source.kv_groups
            raise UserError(
                "--heads and --kv-groups belong together: whole groups can go, or some heads of each",
                allowed=f"multiples of a number of groups up to {source.kv_groups}, at most {each} heads in each",
                hint=f"--kv-groups {groups} --heads {self.heads or groups * each}",
            )
        else:
            heads, groups = self.heads or source.heads, self.kv_groups or source.kv_groups
        if heads % groups:
            raise UserError(
                f"--heads {heads} cannot be divided among --kv-groups {groups}",
                hint=f"--heads {max(heads // groups, 1) * groups}",
            )
        return heads, groups

    def _shapes(self, found: Decoder) -> list[Shape]:
        """The candidates."""
        from overhaul.interop.decoder import can_say

        whole = found.architecture.parameters(found.shape)
        budget = count_of(self.parameters) if self.parameters else round((self.share or 1) * whole)
        grid = Grid(
            source=found.shape,
            architecture=found.architecture,
            multiple=self.multiple,
            accepts=lambda shape: can_say(found, shape),
        )
        return shapes_for(grid, budget, self.tolerance, self.candidates)

    def _scores(self, model: nn.Module, work: Workspace) -> tuple[Scores, Source]:
        """From the directory that was named, or from one pass over the text."""
        from overhaul import importance, journal, pretrained
        from overhaul.progress import say

        if self.scores is not None:
            directory = pretrained.resolve(self.scores)
            scores, source = importance.read(directory, weights_sha256=work.weights_sha256, **self._how())
            say(f"scores from {self.scores}: {source.samples} windows of {source.seq_len} tokens")
            return scores, source
        longest = getattr(model.config, "max_position_embeddings", self.seq_len)
        seq_len = min(self.seq_len, longest)
        calib = work.data.calibration(samples=self.samples, seq_len=seq_len, batch_size=4)
        tokens = calib.tokens() or 0
        journal.note_tokens(tokens)
        scores = importance.score(model, calib, dtype=work.dtype, windows=tokens // seq_len, **self._how())
        source = importance.Source(
            weights_sha256=work.weights_sha256,
            corpus=work.data.corpus.fingerprint,
            samples=tokens // seq_len,
            seq_len=seq_len,
            **self._how(),
        )
        return scores, source


def _refuse_idle_residual(source: Shape, target: Shape) -> None:
    """Raises `UserError` where no head is removed that another one could take over from."""
    if source.heads == source.kv_groups:
        idle, where = target.heads == source.heads, ""
    else:
        idle, where = target.heads // target.kv_groups == source.heads // source.kv_groups, " from groups that stay"
    if idle:
        raise UserError(
            f"--head-residual lets heads take over from removed ones, and none are removed{where}",
            hint="fewer --heads, or without --head-residual",
        )


def _refuse_odd_width(name: str, asked: int, there: int, multiple: int | None) -> None:
    """Raises `UserError` for a width that hardware does not like."""
    multiple = multiple or usual_multiple(there)
    if asked != there and asked % multiple:
        below = asked // multiple * multiple
        raise UserError(
            f"--{name} {asked} is no multiple of {multiple}",
            allowed=", ".join(str(width) for width in (below, below + multiple) if 0 < width <= there),
            hint=f"--multiple {math.gcd(asked, multiple)}, if it must be {asked}",
        )
