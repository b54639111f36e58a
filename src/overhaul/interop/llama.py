"""The names inside a Llama-like decoder, and a cache whose keys and values are kept in a form of one's own."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicLayer

FAMILIES = ("llama", "mistral", "qwen2")
"""Model types whose blocks are these: norm, attention with rotary positions, add, norm, gated MLP, add."""

Encode = Callable[[Tensor], tuple[Tensor, Tensor]]
Decode = Callable[[Tensor, Tensor], Tensor]


LAYERS, NORM = "model.layers", "model.norm"
"""Where the model keeps its blocks, and the norm behind them."""


def is_llama_like(model: nn.Module) -> bool:
    """Whether the model is of one of `FAMILIES`."""
    inner: Any = model
    return inner.config.model_type in FAMILIES and hasattr(inner, "lm_head")


def ask_for_masks(model: nn.Module) -> None:
    """Lets the model hand every block the whole attention mask, as additive numbers."""
    inner: Any = model
    inner.config._attn_implementation = "eager"


def record_hidden_states(blocks: Iterable[nn.Module]) -> None:
    """Makes blocks that took the place of the model's own give `output_hidden_states`.

    transformers looks for its own classes among the modules, and these are others.
    """
    from transformers.utils.output_capturing import install_output_capuring_hook

    for block in blocks:
        install_output_capuring_hook(block, "hidden_states", 0)


def append(
    cache: Any, index: int, keys: Tensor, values: Tensor, encode: Encode, decode: Decode
) -> tuple[Tensor, Tensor]:
    """Adds keys and values (B, H, T, D) to layer `index` of a cache and returns all of it, as it is decoded.

    The layer becomes a `CodedLayer` when it is first filled.
    """
    while len(cache.layers) <= index:
        cache.layers.append(CodedLayer(encode, decode))
    if not isinstance(cache.layers[index], CodedLayer):
        if cache.layers[index].get_seq_length():
            raise ValueError("the cache was filled by another model")
        cache.layers[index] = CodedLayer(encode, decode)
    return cache.layers[index].update(keys, values)


class CodedLayer(DynamicLayer):
    """Keys and values of one layer as integers, with their scales beside them."""

    keys: Tensor
    values: Tensor
    key_scale: Tensor
    value_scale: Tensor

    def __init__(self, encode: Encode, decode: Decode) -> None:
        super().__init__()
        self.encode, self.decode = encode, decode

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Starts empty."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self.keys, self.key_scale = self.encode(key_states[..., :0, :])
        self.values, self.value_scale = self.encode(value_states[..., :0, :])
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Appends along the tokens; what was there is not touched."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        keys, key_scale = self.encode(key_states)
        values, value_scale = self.encode(value_states)
        self.keys, self.key_scale = _joined(self.keys, keys), _joined(self.key_scale, key_scale)
        self.values, self.value_scale = _joined(self.values, values), _joined(self.value_scale, value_scale)
        return self.decode(self.keys, self.key_scale), self.decode(self.values, self.value_scale)

    @property
    def bytes(self) -> int:
        """Of keys and values with their scales."""
        if not self.is_initialized:
            return 0
        tensors = (self.keys, self.key_scale, self.values, self.value_scale)
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Rows in another order, for beam search."""
        self._map(lambda stored: stored.index_select(0, beam_idx.to(stored.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every row several times."""
        self._map(lambda stored: stored.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Some of the rows."""
        self._map(lambda stored: stored[indices])

    def crop(self, tokens_to_remove: int) -> None:
        """Forgets the last tokens; their number is negative, as transformers has it."""
        if tokens_to_remove:
            self._map(lambda stored: stored[..., : -abs(tokens_to_remove), :])

    def _map(self, change: Callable[[Tensor], Tensor]) -> None:
        if self.is_initialized:
            self.keys, self.key_scale = change(self.keys), change(self.key_scale)
            self.values, self.value_scale = change(self.values), change(self.value_scale)


def _joined(old: Tensor, new: Tensor) -> Tensor:
    return torch.cat((old, new), dim=-2)
