"""Emergent outlier features (Dettmers et al., 2022, section 4): a few dimensions with large values in most layers.

What is looked at is what the linear layers of a block read from its norms: the input of q, k and v, and of gate and up.
Letters of shapes: L such inputs in a model, T tokens, D dimensions of the hidden state, C columns.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from overhaul.errors import UserError
from overhaul.walk import decoder_blocks

LARGEST_SAMPLE = 1_000_000
"""Magnitudes of which quartiles are taken; of more, the first."""


@dataclass(frozen=True, slots=True)
class Seen:
    """What was seen of the inputs of the layers.

    Attributes:
        names: of the L norms that they come from, in order.
        hits: (L, D), how many tokens reach the threshold in each dimension.
        positive: (L, D), how many of those are positive.
        sixteen: (L,), how many values LLM.int8() would multiply in 16 bit: columns with an outlier, window by window.
        magnitudes: of the values that reach the threshold, by dimension.
        num_tokens: T.
    """

    names: tuple[str, ...]
    hits: Tensor
    positive: Tensor
    sixteen: Tensor
    magnitudes: dict[int, list[Tensor]]
    num_tokens: int

    @property
    def num_values(self) -> int:
        """In one of the inputs."""
        return self.num_tokens * self.hits.shape[1]

    def emergent(self, *, layers: float, positions: float) -> list[int]:
        """The dimensions that reach the threshold in at least these shares of the inputs, and of the tokens there.

        The share of tokens is that of the inputs in which the dimension reaches it at all, on average.
        """
        hit_LD = self.hits > 0
        share_D = hit_LD.double().mean(0)
        tokens_D = self.hits.double().sum(0) / hit_LD.sum(0).clamp_min(1) / self.num_tokens
        return ((share_D >= layers) & (tokens_D >= positions)).nonzero().flatten().tolist()


def inputs_of(model: nn.Module) -> dict[str, nn.Module]:
    """The norms of the blocks that are as wide as the hidden state, by name: their outputs feed the linear layers."""
    inner: Any = model
    width = inner.config.hidden_size
    found = {
        f"{prefix}.{name}": module
        for prefix, block in decoder_blocks(model).items()
        for name, module in block.named_modules()
        if "norm" in type(module).__name__.lower() and _width(module) == width
    }
    if not found:
        raise UserError(f"the blocks of {type(model).__name__} have no norms whose outputs could be looked at")
    return found


def _width(norm: nn.Module) -> int | None:
    weight = getattr(norm, "weight", None)
    return None if weight is None else weight.numel()


@torch.no_grad()
def look(model: nn.Module, windows_NT: Iterable[Tensor], threshold: float) -> Seen:
    """Runs the windows (T,), one at a time, and counts what reaches the threshold."""
    norms = inputs_of(model)
    hits: dict[str, Tensor] = {}
    positive: dict[str, Tensor] = {}
    sixteen = dict.fromkeys(norms, 0)
    magnitudes: dict[int, list[Tensor]] = {}
    num_tokens = 0

    def see(name: str, x: Any) -> None:
        x_TD = x.detach().flatten(0, -2).float()
        hit_TD = x_TD.abs() >= threshold
        hits_D = hit_TD.sum(0)
        hits[name] = hits.get(name, 0) + hits_D
        positive[name] = positive.get(name, 0) + (hit_TD & (x_TD > 0)).sum(0)
        columns_C = hits_D.nonzero().flatten().tolist()
        sixteen[name] += len(columns_C) * len(x_TD)
        for column in columns_C:
            magnitudes.setdefault(column, []).append(x_TD[hit_TD[:, column], column].abs())

    handles = [norm.register_forward_hook(lambda _, __, x, name=name: see(name, x)) for name, norm in norms.items()]
    inner: Any = model
    device = next(model.parameters()).device
    try:
        for ids_T in windows_NT:
            inner.base_model(input_ids=ids_T[None].to(device), use_cache=False)
            num_tokens += len(ids_T)
    finally:
        for handle in handles:
            handle.remove()
    return Seen(
        names=tuple(norms),
        hits=torch.stack([hits[name] for name in norms]).cpu(),
        positive=torch.stack([positive[name] for name in norms]).cpu(),
        sixteen=torch.tensor([sixteen[name] for name in norms]),
        magnitudes=magnitudes,
        num_tokens=num_tokens,
    )


@contextmanager
def without(model: nn.Module, dimensions: list[int]) -> Iterator[None]:
    """Inside, these dimensions of every such input are zero."""
    left_out = torch.tensor(dimensions, dtype=torch.int64)
    handles = [
        norm.register_forward_hook(lambda _, __, x: x.index_fill(-1, left_out.to(x.device), 0.0))
        for norm in inputs_of(model).values()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
