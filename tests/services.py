"""What a directory that `forget s3t` wrote has of stages, read off its files."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from overhaul.deletion.book import FOLDER, Book
from overhaul.deletion.sequences import Order

Tensors = dict[str, Tensor]


def stages_of(directory: Path) -> dict[tuple[int, Order], Tensors]:
    """The tensors of every stage that is left, by shard and the slices that it has read."""
    with Book(directory) as book:
        return {(one.shard, one.sequence): load_file(directory / FOLDER / one.file) for one in book.stages()}


def same(one: Tensors, other: Tensors) -> bool:
    """Whether two stages are the same to the bit."""
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
