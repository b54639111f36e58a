"""How far the blocks of a decoder have moved from where they were: the layer drift of Guo et al. (2024, section 3).

    start = start_of(model)
    ...                        # some steps
    drift_of(model, start)     # {"drift/bottom": 0.0021, "drift/top": 0.0016}

Where a model takes up a new domain, its bottom blocks move more than its top blocks at first.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from overhaul.matrices import Listed, manifest

ENDS = 5
"""Blocks at the bottom, and at the top, that are averaged over (the paper's)."""
BOTTOM, TOP, RATIO = "drift/bottom", "drift/top", "drift/ratio"


@dataclass(frozen=True, slots=True, kw_only=True)
class Moved:
    """How far one tensor has moved.

    Attributes:
        name: its qualified name.
        block: the number of its block, counted from 0; None outside of the blocks.
        kind: the name of the module that holds it, such as `q_proj`.
        category: what it is for, as `matrices.Listed` has it.
        count: its numbers.
        change: Frobenius norm of what was added.
        start: Frobenius norm of what it was before.
    """

    name: str
    block: int | None
    kind: str
    category: str
    count: int
    change: float
    start: float


def moved(listed: Listed, start: Tensor, now: Tensor) -> Moved:
    """How far a tensor has moved.

    Args:
        listed: which it is.
        start, now: its values, of the same shape and on the same device.
    """
    return Moved(
        name=listed.name,
        block=listed.block,
        kind=listed.module.rpartition(".")[-1],
        category=listed.category,
        count=start.numel(),
        change=_norm(now.float() - start.float()),
        start=_norm(start),
    )


def _norm(tensor: Tensor) -> float:
    """Frobenius norm; its square is summed in fp64, as a block has millions of numbers."""
    return float(torch.linalg.vector_norm(tensor, dtype=torch.float64))


def relative(tensors: Iterable[Moved]) -> float:
    """`|w_t - w_0|_F / |w_0|_F` of some tensors taken together; infinite where all were zero and are no longer."""
    tensors = list(tensors)
    change, start = (math.hypot(*(getattr(one, part) for one in tensors)) for part in ("change", "start"))
    return 0.0 if not change else change / start if start else math.inf


def of_blocks(tensors: Iterable[Moved]) -> tuple[float, ...]:
    """The relative update of each block, over all its tensors, from the bottom to the top."""
    by_block: dict[int, list[Moved]] = {}
    for one in tensors:
        if one.block is not None:
            by_block.setdefault(one.block, []).append(one)
    return tuple(relative(by_block[number]) for number in sorted(by_block))


def size_of_ends(num_blocks: int, ends: int) -> int:
    """How many blocks are averaged over at either end: half of them where there are fewer than two times `ends`."""
    return max(1, min(ends, num_blocks // 2))


def bottom_and_top(blocks: Sequence[float], size: int) -> tuple[float, float]:
    """Means over the first `size` blocks, and over the last.

    Args:
        blocks: relative updates, from the bottom to the top.
        size: as `size_of_ends` gives it.
    """
    return sum(blocks[:size]) / size, sum(blocks[-size:]) / size


def start_of(model: nn.Module, *, ends: int = ENDS) -> dict[str, Tensor]:
    """Copies, on the CPU, of all parameters of the bottom and of the top blocks, by qualified name."""
    return {one.name: one.parameter.detach().to("cpu", copy=True) for one in _at_the_ends(model, ends)}


def start_bytes(model: nn.Module, *, ends: int = ENDS) -> int:
    """What `start_of` holds."""
    return sum(one.parameter.nbytes for one in _at_the_ends(model, ends))


def _at_the_ends(model: nn.Module, ends: int) -> list[Listed]:
    listed = [one for one in manifest(model) if one.block is not None]
    num_blocks = 1 + max(one.block for one in listed if one.block is not None)
    size = size_of_ends(num_blocks, ends)
    return [one for one in listed if one.block is not None and not size <= one.block < num_blocks - size]


@torch.no_grad()
def drift_of(model: nn.Module, start: Mapping[str, Tensor]) -> dict[str, float]:
    """Mean relative updates of a model's bottom and top blocks.

    Args:
        model: as it is now, its parameters whole.
        start: what `start_of` returned of the same model before.

    Returns:
        `{"drift/bottom": ..., "drift/top": ...}`.
    """
    found = [
        moved(one, start[one.name].to(one.parameter.device), one.parameter)
        for one in manifest(model)
        if one.name in start
    ]
    blocks = of_blocks(found)
    bottom, top = bottom_and_top(blocks, max(1, len(blocks) // 2))
    return {BOTTOM: bottom, TOP: top}
