"""The five numbers that a decoder is cut to, how many parameters they make, and which of them fit a budget.

Importing this module does not import torch.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from overhaul.errors import UserError

Axis = Literal["hidden", "ffn", "query", "key"]
"""What a dimension of a parameter runs along: channels of the residual stream, neurons, entries of heads, of groups."""

MULTIPLE = 64
"""Widths that hardware likes."""
_LARGE = 15_000_000_000
"""Parameters up to which width is cut before depth."""
_GRID = 16
"""Values of each axis at most: finer than any budget needs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """How large a decoder is.

    Attributes:
        layers: blocks, L.
        hidden: channels of the residual stream, d.
        ffn: neurons of each block's MLP, f.
        heads: query heads, H.
        kv_groups: groups of query heads that share a key and a value head, G; it divides H.
    """

    layers: int
    hidden: int
    ffn: int
    heads: int
    kv_groups: int

    def __str__(self) -> str:
        heads = _counted(self.heads, "head")
        grouped = f" in {_counted(self.kv_groups, 'group')}" if self.heads != self.kv_groups else ""
        return f"{_counted(self.layers, 'layer')}, hidden {self.hidden}, FFN {self.ffn}, {heads}{grouped}"


def _counted(count: int, what: str) -> str:
    return f"{count} {what}{'s' if count != 1 else ''}"


Dimensions = tuple[Axis | int, ...]
"""A parameter's dimensions: an axis that is cut along, or a number that stays."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Architecture:
    """What cutting does not change.

    Attributes:
        head_dim: entries of a head.
        block: the dimensions of every parameter of a block, by name.
        outside: those of the embedding, the last norm and, where it is not tied, the output embedding.
    """

    head_dim: int
    block: dict[str, Dimensions]
    outside: dict[str, Dimensions]

    def sizes(self, shape: Shape) -> dict[Axis | int, int]:
        """How long each axis is."""
        return {
            "hidden": shape.hidden,
            "ffn": shape.ffn,
            "query": shape.heads * self.head_dim,
            "key": shape.kv_groups * self.head_dim,
        }

    def block_parameters(self, shape: Shape) -> int:
        """How many parameters all blocks have."""
        return shape.layers * self._count(self.block, shape)

    def parameters(self, shape: Shape) -> int:
        """How many parameters a model has, tied ones counted once.

        For a Llama with tied embeddings: V d + L (2 d H dh + 2 d G dh + 3 d f + 2 d) + d.
        """
        return self.block_parameters(shape) + self._count(self.outside, shape)

    def _count(self, parameters: dict[str, Dimensions], shape: Shape) -> int:
        sizes = self.sizes(shape)
        return sum(math.prod(sizes.get(axis, axis) for axis in of) for of in parameters.values())  # pyright: ignore


def usual_multiple(size: int) -> int:
    """64 where it fits; for narrow models the largest power of two that leaves eight steps."""
    return min(MULTIPLE, 2 ** max(int(math.log2(max(size / 8, 1))), 0))


@dataclass(frozen=True, slots=True, kw_only=True)
class Grid:
    """The shapes that a source can be cut to.

    Attributes:
        source: the shape of the model as it is.
        architecture: counts parameters.
        multiple: hidden size and FFN are multiples of it; None takes `usual_multiple`.
        accepts: whether the model's configuration can say a shape.
    """

    source: Shape
    architecture: Architecture
    multiple: int | None = None
    accepts: Callable[[Shape], bool] = lambda shape: True

    def within(self, budget: int, tolerance: float) -> list[Shape]:
        """The shapes whose parameters are the budget's, give or take a share `tolerance`; none where it has none.

        Width goes before depth (for models of at most 15 B parameters): fewer than 7/8 of the layers, or less than
        half of a width, are only considered where nothing else fits.
        """
        deep = 0.5 if self.architecture.parameters(self.source) > _LARGE else 7 / 8
        for least_layers, least_width in ((deep, 1 / 2), (1 / 2, 1 / 4), (0, 0)):
            found = [
                shape
                for shape in self._shapes(least_layers, least_width)
                if abs(self.architecture.parameters(shape) - budget) <= tolerance * budget and self.accepts(shape)
            ]
            if found:
                return found
        return []

    def nearest(self, budget: int, count: int = 3) -> list[Shape]:
        """The shapes of the whole grid whose parameters are nearest to the budget."""
        shapes = sorted(self._shapes(0, 0), key=lambda shape: abs(self.architecture.parameters(shape) - budget))
        # Asked of the nearest only: making a configuration takes a thousand times longer than counting.
        return list(itertools.islice(filter(self.accepts, shapes), count))

    def _shapes(self, least_layers: float, least_width: float) -> Iterator[Shape]:
        source = self.source
        axes = (
            _sizes(source.layers, 1, least_layers),
            _sizes(source.hidden, self.multiple or usual_multiple(source.hidden), least_width),
            _sizes(source.ffn, self.multiple or usual_multiple(source.ffn), least_width),
            self._heads(least_width),
        )
        for layers, hidden, ffn, (heads, kv_groups) in itertools.product(*axes):
            shape = Shape(layers=layers, hidden=hidden, ffn=ffn, heads=heads, kv_groups=kv_groups)
            if shape != source:
                yield shape

    def _heads(self, least: float) -> list[tuple[int, int]]:
        """Query heads and groups: whole groups go, or as many heads of every group."""
        in_group = self.source.heads // self.source.kv_groups
        return [
            (groups * each, groups)
            for groups in _sizes(self.source.kv_groups, 1, 0)
            for each in _sizes(in_group, 1, 0)
            if groups * each >= least * self.source.heads
        ]


def _sizes(size: int, multiple: int, least: float) -> list[int]:
    """`size` and the multiples below it, down to the share `least` of it, at most about `_GRID` of them."""
    step = multiple * math.ceil(size / multiple / _GRID)
    top = size // multiple * multiple
    below = range(top, 0, -step)
    return [size, *(one for one in below if one != size and one >= least * size)]


def spread(shapes: Sequence[Shape], source: Shape, count: int) -> list[Shape]:
    """`count` shapes that differ: first the one that cuts all widths most alike, then always the furthest from those.

    Distances are between the shares of each axis that are kept. Equal ones are taken in the order of `shapes`.
    """
    if not shapes:
        return []
    points = [_shares(shape, source) for shape in shapes]
    first = min(range(len(shapes)), key=lambda at: (-points[at][0], max(points[at][1:4]) - min(points[at][1:4])))
    chosen, apart = [first], [math.inf] * len(shapes)
    while len(chosen) < min(count, len(shapes)):
        apart = [min(known, math.dist(point, points[chosen[-1]])) for known, point in zip(apart, points, strict=True)]
        rest = [at for at in range(len(shapes)) if at not in chosen]
        chosen.append(max(rest, key=lambda at: apart[at]))
    return [shapes[at] for at in chosen]


def shapes_for(grid: Grid, budget: int, tolerance: float, count: int) -> list[Shape]:
    """`count` shapes of `budget` parameters, give or take a share `tolerance`.

    Raises:
        UserError: the budget is not below what the model has, or no shape comes near enough; the nearest are listed.
    """
    source = grid.architecture.parameters(grid.source)
    if budget >= source:
        raise UserError(f"{budget:,} parameters are not fewer than the {source:,} of the model", hint="--share 0.6")
    found = grid.within(budget, tolerance)
    if not found:
        nearest = grid.nearest(budget)
        raise UserError(
            f"no shape on the grid has {budget:,} parameters, give or take {tolerance:.0%}",
            allowed="the nearest: " + "; ".join(f"{grid.architecture.parameters(s):,} ({s})" for s in nearest),
            hint=f"--parameters {grid.architecture.parameters(nearest[0])}, or a larger --tolerance",
        )
    return spread(found, grid.source, count)


def _shares(shape: Shape, source: Shape) -> tuple[float, ...]:
    """Of layers, hidden size, FFN, query heads and groups, how much is kept."""
    return (
        shape.layers / source.layers,
        shape.hidden / source.hidden,
        shape.ffn / source.ffn,
        shape.heads / source.heads,
        shape.kv_groups / source.kv_groups,
    )


def count_of(text: str) -> int:
    """Reads `90M`, `0.09B`, `90_000_000` or `9e7` as a number of parameters; raises `ValueError` for anything else."""
    units = {"K": 1e3, "M": 1e6, "B": 1e9}
    plain = text.strip().replace("_", "").replace(",", "").upper()
    unit = units.get(plain[-1:], 1)
    try:
        count = float(plain[:-1] if unit != 1 else plain) * unit
    except ValueError:
        count = math.nan
    if not (math.isfinite(count) and count >= 1):
        raise ValueError("not a number of parameters; write 90M, 0.09B or 90000000")
    return round(count)
