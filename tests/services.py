"""What a directory that `forget s3t` wrote has of stages, read off its files."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from overhaul.deletion.book import FOLDER, Book
from overhaul.deletion.sequences import Order
from overhaul.layers import swap
from overhaul.layers.lora import LoRALinear

Tensors = dict[str, Tensor]


def stages_of(directory: Path) -> dict[tuple[int, Order], Tensors]:
    """The tensors of every stage that is left, by shard and the slices that it has read."""
    with Book(directory) as book:
        return {(one.shard, one.sequence): load_file(directory / FOLDER / one.file) for one in book.stages()}


def same(one: Tensors, other: Tensors) -> bool:
    """Whether two stages are the same to the bit."""
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def merge_stages(model: nn.Module, directory: Path, *orders: Order, shard: int) -> None:
    """Puts the adapters of a shard's stages into the weights of a plain classifier, and the head of the last one.

    Args:
        model: the one beside the stages, changed in place.
        directory: of the service.
        orders: the stages.
        shard: of them.
    """
    tensors = stages_of(directory)
    with Book(directory) as book:
        head, scale = book.settings["head"], book.settings["scale"]
    own = {name: tensor for order in orders for name, tensor in tensors[shard, order].items()}
    for name in {name.removesuffix(".lora_A") for name in own if name.endswith(".lora_A")}:
        A_RI, B_OR = own[f"{name}.lora_A"], own[f"{name}.lora_B"]
        swap(model, [name], lambda old, A_RI=A_RI, B_OR=B_OR: LoRALinear(old, A_RI, B_OR, scale * len(A_RI)).merge())
    for name, place in model.get_submodule(head).named_parameters():
        place.data = own[f"{head}.{name}"]
