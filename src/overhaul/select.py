"""Which linear layers a method works on."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from torch import Tensor, nn

from overhaul import models
from overhaul.errors import UserError, did_you_mean
from overhaul.layers import LinearLike, PackedLinear, is_adapter
from overhaul.walk import decoder_blocks


def block_linears(model: nn.Module) -> dict[str, nn.Linear]:
    """Every `nn.Linear` in the decoder's blocks by qualified name; embeddings and the head are not among them."""
    return {
        f"{prefix}.{name}": module
        for prefix, block in decoder_blocks(model).items()
        for name, module in block.named_modules()
        if isinstance(module, nn.Linear)
    }


def block_weights(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The effective weight of every linear layer in the blocks, adapters that are not merged included, one by one.

    Where two networks make one model, those of both.
    """
    if models.is_of_two(model):
        for part, network in model.named_children():
            yield from ((f"{part}.{name}", weight_OI) for name, weight_OI in block_weights(network))
        return
    for name, module in outermost_linears(model).items():
        yield name, module.dense() if isinstance(module, LinearLike) else module.weight


def outermost_linears(model: nn.Module) -> dict[str, Any]:
    """The linear layers of the blocks by qualified name, packed or not; an adapter's own layers are not among them."""
    found: dict[str, Any] = {
        f"{prefix}.{name}": module
        for prefix, block in decoder_blocks(model).items()
        for name, module in block.named_modules()
        if isinstance(module, nn.Linear | LinearLike)
    }
    inside = tuple(f"{name}." for name in found)
    return {name: module for name, module in found.items() if not name.startswith(inside)}


def packed_linears(model: nn.Module) -> dict[str, PackedLinear]:
    """Every linear layer of the blocks that is stored as integers, by qualified name."""
    return {
        f"{prefix}.{name}": module
        for prefix, block in decoder_blocks(model).items()
        for name, module in block.named_modules()
        if isinstance(module, PackedLinear)
    }


def select_linears(model: nn.Module, targets: Sequence[str] = ()) -> list[str]:
    """The names of the blocks' linear layers that end in one of `targets`; all of them when there are no targets.

    Packed layers are among them.

    Raises:
        UserError: a target fits no layer; the layers that exist are listed.
    """
    names = [*block_linears(model), *packed_linears(model)]
    if not targets:
        return names
    ends = sorted({name.rsplit(".", 1)[-1] for name in names})
    for target in targets:
        if not any(_ends_in(name, target) for name in names):
            others = [(name, module) for name, module in model.named_modules() if _ends_in(name, target)]
            raise UserError(
                f"{others[0][0]} ({type(others[0][1]).__name__}) is no linear layer of the blocks"
                if others
                else f"no linear layer is called {target!r}",
                allowed=", ".join(ends),
                hint=did_you_mean(target, ends),
            )
    return [name for name in names if any(_ends_in(name, target) for target in targets)]


def shapes_of(model: nn.Module, names: Iterable[str]) -> dict[str, tuple[int, int]]:
    """(out_features, in_features) of the linear layers called `names`, packed or not."""
    layers: dict[str, Any] = {name: model.get_submodule(name) for name in names}
    return {name: (layer.out_features, layer.in_features) for name, layer in layers.items()}


def _ends_in(name: str, target: str) -> bool:
    return name == target or name.endswith(f".{target}")


def has_adapters(model: nn.Module) -> bool:
    """Whether layers of the model have adapters that are not merged."""
    return any(is_adapter(module) for module in model.modules())
