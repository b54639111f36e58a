"""Which weights to remove: exact counts, ties by index, and the fields that every pruning method shares.

Letters of shapes: O output features, I input features, G groups of consecutive inputs, M inputs in a group.
A mask is boolean and True where a weight is kept.

Importing this module does not import torch: the methods' fields are declared here.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from typing import TYPE_CHECKING, Literal, NamedTuple, cast

from pydantic import Field, ValidationInfo, field_validator

from overhaul.errors import UserError
from overhaul.journal import note_layer
from overhaul.method import Settings, Share

if TYPE_CHECKING:
    from torch import Tensor, nn

DEFAULT_SPARSITY = 0.5


class Pattern(NamedTuple):
    """N:M sparsity: of each `group` consecutive inputs of an output `kept` stay; GPUs speed up 2:4."""

    kept: int
    group: int

    @classmethod
    def parse(cls, text: str) -> Pattern:
        """Reads `2:4`; raises `ValueError` unless 0 < n < m."""
        match = re.fullmatch(r"(\d+):(\d+)", text)
        if match is None:
            raise ValueError("not a pattern; write N:M, such as 2:4 (keep 2 of each 4 consecutive inputs)")
        pattern = cls(int(match[1]), int(match[2]))
        if not 0 < pattern.kept < pattern.group:
            raise ValueError(f"N:M keeps N of each M weights, so 0 < N < M; {text} is not, 2:4 is")
        return pattern

    @property
    def share(self) -> float:
        """The share of the weights that is removed."""
        return 1 - self.kept / self.group


class Target(Settings):
    """How much to remove: the two fields of every pruning method.

    After validation `sparsity` is always a number: 0.5, or what the pattern implies, where it was not given.
    """

    pattern: str | None = Field(None, description="N:M, such as 2:4 or 4:8: keep N of each M consecutive inputs.")
    sparsity: Share | None = Field(
        None,
        validate_default=True,
        description="Share of each layer's weights to remove; by default 0.5 or what the pattern implies.",
    )

    @field_validator("pattern")
    @classmethod
    def _is_pattern(cls, text: str | None) -> str | None:
        if text is not None:
            Pattern.parse(text)
        return text

    @field_validator("sparsity")
    @classmethod
    def _agrees_with_pattern(cls, given: float | None, info: ValidationInfo) -> float | None:
        text = info.data.get("pattern")
        if text is None:
            return DEFAULT_SPARSITY if given is None else given
        implied = Pattern.parse(text).share
        if given is not None and abs(given - implied) > 1e-9:
            raise ValueError(f"pattern {text} removes {implied:g} of the weights; leave one of the two out")
        return implied

    @property
    def share(self) -> float:
        """The share of each layer's weights that is removed."""
        assert self.sparsity is not None
        return self.sparsity

    @property
    def n_of_m(self) -> Pattern | None:
        """The pattern, parsed."""
        return None if self.pattern is None else Pattern.parse(self.pattern)

    def keep(self, score_OI: Tensor, per: Literal["tensor", "row"], already_OI: Tensor | None = None) -> Tensor:
        """The mask (O, I) of the weights with the highest scores.

        Args:
            score_OI: how much each weight matters.
            per: what competes for the places when there is no pattern: the whole layer or each output.
            already_OI: an earlier mask; what it removed stays removed and counts towards the target. A row that
                lost more than its share then is made up for by the others, so that the layer's total is exact; a
                group of a pattern that lost more keeps fewer than N.
        """
        if already_OI is not None:
            score_OI = score_OI.masked_fill(~already_OI, float("-inf"))
        pattern = self.n_of_m
        if pattern is not None:
            mask_OI = keep_mask_pattern(score_OI, *pattern)
        elif per == "row" and already_OI is not None:
            removed_O = (~already_OI).sum(dim=1)
            mask_OI = keep_all_but_each(score_OI, row_quotas(removed_O, int(self.share * score_OI.shape[1])))
        else:
            mask_OI = keep_mask(score_OI, self.share, per)
        return mask_OI if already_OI is None else mask_OI & already_OI


def keep_mask(score_OI: Tensor, sparsity: float, per: Literal["tensor", "row"] = "tensor") -> Tensor:
    """Removes exactly the `int(sparsity * size)` lowest scores of the tensor, or of each row.

    Returns:
        (O, I) bool, True = kept; ties as in `keep_all_but`.
    """
    size = score_OI.numel() if per == "tensor" else score_OI.shape[1]
    return keep_all_but(score_OI, int(sparsity * size), per)


def keep_all_but(score_OI: Tensor, count: int, per: Literal["tensor", "row"] = "tensor") -> Tensor:
    """Removes exactly the `count` lowest scores of the tensor, or of each row.

    Among equal scores the one with the lower index goes first, as in a stable ascending sort; a threshold
    alone would remove all of them and so too many.

    Returns:
        (O, I) bool, True = kept. Raises `ValueError` when a score is not a number.
    """
    _refuse_nan(score_OI)
    if count == 0:
        return score_OI.new_ones(score_OI.shape).bool()
    rows = score_OI.float().reshape(1, -1) if per == "tensor" else score_OI.float()
    threshold = rows.kthvalue(count, dim=1, keepdim=True).values
    removed, tied = rows < threshold, rows == threshold
    places_for_ties = count - removed.sum(dim=1, keepdim=True)
    if (tied.sum(dim=1, keepdim=True) != places_for_ties).any():
        tied &= tied.cumsum(dim=1) <= places_for_ties
    return (removed | tied).logical_not_().view(score_OI.shape)


def keep_all_but_each(score_OI: Tensor, count_O: Tensor) -> Tensor:
    """As `keep_all_but` per row, with a count of its own for each row."""
    _refuse_nan(score_OI)
    order_OI = score_OI.argsort(dim=1, stable=True)
    places_I = count_O.new_tensor(range(score_OI.shape[1]))
    mask_OI = score_OI.new_ones(score_OI.shape).bool()
    return mask_OI.scatter_(1, order_OI, places_I >= count_O[:, None])


def row_quotas(removed_O: Tensor, count: int) -> Tensor:
    """How many weights each row is to lose, so that all lose `count` a row together and none gets any back.

    Rows lose alike, but for those that have lost more already: `max(removed, level)`, with the highest level that
    does not exceed the total. What is left over is lost one by one from the first rows at that level.

    Args:
        removed_O: how many weights of each row are removed already.
        count: how many a row is to lose on average.
    """
    total = count * len(removed_O)
    # The sum grows with the level: the last one that fits stands before the first that does not.
    level = bisect_right(range(count + 1), total, key=lambda level: int(removed_O.clamp(min=level).sum())) - 1
    quota_O = removed_O.clamp(min=level)
    at_level_O = removed_O <= level
    left_over = total - int(quota_O.sum())
    return quota_O + (at_level_O & (at_level_O.cumsum(dim=0) <= left_over))


def keep_mask_pattern(score_OI: Tensor, kept: int, group: int) -> Tensor:
    """Keeps the `kept` highest scores of each `group` consecutive inputs; of equal scores the later stay.

    Returns:
        (O, I) bool, True = kept. `group` must divide I. Raises `ValueError` when a score is not a number.
    """
    _refuse_nan(score_OI)
    score_GM = score_OI.reshape(-1, group)
    order_GM = score_GM.argsort(dim=1, stable=True)
    mask_GM = score_GM.new_ones(score_GM.shape).bool()
    return mask_GM.scatter_(1, order_GM[:, : group - kept], False).view(score_OI.shape)


def _refuse_nan(score_OI: Tensor) -> None:
    if score_OI.isnan().any():
        raise ValueError("a score is not a number")


def already_kept(linear: nn.Linear) -> Tensor | None:
    """The mask (O, I) of an earlier pruning, or None for a layer that was never pruned."""
    from overhaul.layers.masked import MaskedLinear

    return linear.mask if isinstance(linear, MaskedLinear) else None


def check_model(model: nn.Module, target: Target) -> None:
    """Raises `UserError` naming the first layer that cannot reach the target, before anything is changed."""
    from overhaul.walk import decoder_blocks, linears_of

    for block_name, block in decoder_blocks(model).items():
        for name, linear in linears_of(block, block_name).items():
            _check_layer(name, linear, target)


def _check_layer(name: str, linear: nn.Linear, target: Target) -> None:
    if not linear.weight.is_floating_point():
        raise UserError(
            f"{name} holds packed {linear.weight.dtype} weights, which cannot be masked",
            hint="prune the model first, then quantize it",
        )
    if not linear.weight.isfinite().all():
        raise UserError(f"{name}.weight contains NaN or infinity", hint="check the model's files")
    pattern = target.n_of_m
    if pattern and linear.in_features % pattern.group:
        raise UserError(
            f"{name} has {linear.in_features} inputs, not divisible into the groups of {target.pattern}",
            hint=f"--sparsity {target.share:g} without a pattern",
        )
    mask_OI = already_kept(linear)
    num_removed = 0 if mask_OI is None else mask_OI.numel() - int(mask_OI.sum())
    if num_removed > int(target.share * linear.weight.numel()):
        share = num_removed / linear.weight.numel()
        raise UserError(
            f"{share:.1%} of {name} is already removed, more than the {target.share:.1%} asked for",
            hint="a higher --sparsity, or start from the dense model",
        )


def prune_layer(model: nn.Module, name: str, mask_OI: Tensor, *, error: float) -> None:
    """Replaces the linear layer `name` by a masked one and notes its sparsity and `error` for the report."""
    from overhaul.layers import swap
    from overhaul.layers.masked import MaskedLinear

    def mask(linear: nn.Module) -> MaskedLinear:
        return MaskedLinear.from_linear(cast("nn.Linear", linear), mask_OI)

    layer = swap(model, [name], mask)[name]
    note_layer(name, sparsity=layer.num_pruned / mask_OI.numel(), error=error)


def removed_share(size_OI: Tensor, mask_OI: Tensor) -> float:
    """Norm of the removed entries over the norm of all; 0 for a tensor of zeros."""
    total = size_OI.float().norm()
    return float(size_OI.float().masked_fill(mask_OI, 0).norm() / total) if total > 0 else 0.0
