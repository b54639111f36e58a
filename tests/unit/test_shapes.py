"""Shapes, the numbers of parameters they make, and the grid that a size is looked for on."""

from __future__ import annotations

import math
from itertools import combinations

import pytest

from overhaul.errors import UserError
from overhaul.shapes import Architecture, Grid, Shape, count_of, shapes_for, spread, usual_multiple

SMOL = Shape(layers=30, hidden=576, ffn=1536, heads=9, kv_groups=3)
VOCABULARY, HEAD_DIM = 49152, 64
LLAMA = Architecture(
    head_dim=HEAD_DIM,
    block={
        "q": ("query", "hidden"), "k": ("key", "hidden"), "v": ("key", "hidden"), "o": ("hidden", "query"),
        "gate": ("ffn", "hidden"), "up": ("ffn", "hidden"), "down": ("hidden", "ffn"), "n1": ("hidden",),
        "n2": ("hidden",),
    },
    outside={"embedding": (VOCABULARY, "hidden"), "norm": ("hidden",)},
)  # fmt: skip
GRID = Grid(source=SMOL, architecture=LLAMA)


def formula(s: Shape) -> int:
    attention = 2 * s.hidden * s.heads * HEAD_DIM + 2 * s.hidden * s.kv_groups * HEAD_DIM
    return VOCABULARY * s.hidden + s.layers * (attention + 3 * s.hidden * s.ffn + 2 * s.hidden) + s.hidden


def test_parameters_of_the_default_model():
    assert LLAMA.parameters(SMOL) == formula(SMOL) == 134_515_008
    assert LLAMA.block_parameters(SMOL) == 134_515_008 - VOCABULARY * 576 - 576


@pytest.mark.parametrize("budget", [120_000_000, 90_000_000, 60_000_000, 30_000_000])
def test_every_shape_of_a_size_has_it(budget: int):
    found = GRID.within(budget, 0.05)

    assert len(found) > 8
    assert len(set(found)) == len(found)
    for shape in found:
        assert abs(formula(shape) - budget) <= 0.05 * budget
        assert shape.hidden % 64 == 0
        assert shape.ffn % 64 == 0
        assert shape.heads % shape.kv_groups == 0
        assert shape.heads // shape.kv_groups <= 3


def test_width_goes_before_depth():
    assert min(shape.layers for shape in GRID.within(90_000_000, 0.05)) >= 7 / 8 * 30
    assert min(shape.layers for shape in GRID.within(30_000_000, 0.05)) < 7 / 8 * 30


def test_a_large_model_may_lose_layers_first():
    large = Shape(layers=96, hidden=8192, ffn=28672, heads=64, kv_groups=8)
    grid = Grid(source=large, architecture=Architecture(head_dim=128, block=LLAMA.block, outside=LLAMA.outside))
    whole = grid.architecture.parameters(large)

    assert whole > 15e9
    assert min(shape.layers for shape in grid.within(int(0.6 * whole), 0.05)) < 7 / 8 * 96


def test_the_grid_has_what_the_configuration_accepts():
    even = Grid(source=SMOL, architecture=LLAMA, accepts=lambda shape: shape.hidden % shape.heads == 0)

    found = even.within(90_000_000, 0.05)

    assert 0 < len(found) < len(GRID.within(90_000_000, 0.05))
    assert all(shape.hidden % shape.heads == 0 for shape in found)


def test_candidates_differ_and_the_first_is_the_most_even():
    found = GRID.within(90_000_000, 0.05)

    chosen = spread(found, SMOL, 6)

    assert len(set(chosen)) == 6
    assert chosen[0].layers == 30
    assert spread(found, SMOL, 1) == chosen[:1]
    assert set(spread(found, SMOL, 1000)) == set(found)
    assert spread([], SMOL, 3) == []

    def nearest(shapes: list[Shape]) -> float:
        return min(math.dist((a.layers / 30, a.hidden / 576, a.ffn / 1536, a.heads / 9, a.kv_groups / 3),
                             (b.layers / 30, b.hidden / 576, b.ffn / 1536, b.heads / 9, b.kv_groups / 3))
                   for a, b in combinations(shapes, 2))  # fmt: skip

    assert nearest(chosen) > nearest(found[:6])


def test_a_size_that_is_not_on_the_grid_lists_the_nearest():
    with pytest.raises(UserError, match="no shape on the grid has 100,000") as refused:
        shapes_for(GRID, 100_000, 0.05, 8)

    smallest = formula(Shape(layers=2, hidden=64, ffn=128, heads=1, kv_groups=1))
    assert f"{smallest:,} (2 layers, hidden 64, FFN 128, 1 head)" in refused.value.allowed
    assert refused.value.hint.startswith(f"--parameters {smallest}")


def test_the_nearest_are_such_as_the_configuration_accepts_and_few_are_asked_for():
    asked: list[Shape] = []

    def accepts(shape: Shape) -> bool:
        asked.append(shape)
        return shape.heads > 1

    grid = Grid(source=SMOL, architecture=LLAMA, accepts=accepts)

    assert all(shape.heads > 1 for shape in grid.nearest(100_000))
    assert len(asked) < 20


def test_a_size_that_is_not_smaller_is_refused():
    with pytest.raises(UserError, match="not fewer than the 134,515,008"):
        shapes_for(GRID, 134_515_008, 0.05, 8)


@pytest.mark.parametrize(("size", "expected"), [(576, 64), (1536, 64), (64, 8), (128, 16), (100, 8), (8, 1), (3, 1)])
def test_the_usual_multiple_leaves_eight_steps(size: int, expected: int):
    assert usual_multiple(size) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [("90M", 90_000_000), ("0.09B", 90_000_000), ("90_000_000", 90_000_000), ("9e7", 90_000_000), (" 500k ", 500_000)],
)
def test_numbers_of_parameters(text: str, expected: int):
    assert count_of(text) == expected


@pytest.mark.parametrize("text", ["", "M", "90X", "many", "-5M", "0", "nan", "inf", "9MM"])
def test_what_is_no_number_of_parameters(text: str):
    with pytest.raises(ValueError, match="write 90M"):
        count_of(text)


def test_a_shape_in_words():
    assert str(SMOL) == "30 layers, hidden 576, FFN 1536, 9 heads in 3 groups"
    assert str(Shape(layers=1, hidden=8, ffn=8, heads=2, kv_groups=2)) == "1 layer, hidden 8, FFN 8, 2 heads"
