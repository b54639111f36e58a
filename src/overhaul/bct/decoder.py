"""The blocks of a Llama-like decoder computed on 8-bit blocks, part by part as the scheme says.

Between the modules flow fp32 tensors that lie on the grid of `scheme.activation_block`, which are integers and shifts
in another form (see `blocks`). A part that is switched off computes in fp32 as the model's own code does.

Letters of shapes: B batch, T tokens, D width, H heads, G heads that share keys, S keys, E width of a head.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from overhaul.bct import blocks, norm
from overhaul.bct.blocks import power_of_two, snap
from overhaul.bct.product import exact_product, float_product, integer_product
from overhaul.bct.scheme import Scheme
from overhaul.bct.softmax import softmax
from overhaul.bct.tables import FUNCTIONS, table_of
from overhaul.interop import llama
from overhaul.layers import Packed

_ROTATION_ONE = 1 << 14
"""Sines and cosines are constants of 16 bits: in 8, a rotation would cost more than all that is rotated."""


class BlockNorm(nn.Module):
    """An RMSNorm from sums of integers; its weight is rounded to 8 bits when it is used."""

    def __init__(self, weight: nn.Parameter, epsilon: float, scheme: Scheme) -> None:
        super().__init__()
        self.weight, self.epsilon, self.scheme = weight, epsilon, scheme

    def forward(self, x: Tensor) -> Tensor:
        """`(..., D)` to `(..., D)`."""
        columns = self.scheme.activation_block
        if self.scheme.has("norm"):
            return norm.rms_norm(snap(x, columns), self.weight, self.epsilon, columns)
        return x * (x.square().mean(-1, keepdim=True) + self.epsilon).rsqrt() * self.weight.float()


class BlockMLP(nn.Module):
    """down(f(gate(x)) * up(x)): f by table, the product of two 8-bit tensors rounded again."""

    def __init__(self, mlp: Any, scheme: Scheme, activation: str) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = mlp.gate_proj, mlp.up_proj, mlp.down_proj
        self.scheme, self.table = scheme, table_of(activation)
        self.function = FUNCTIONS[self.table.name]

    def forward(self, x_BTD: Tensor) -> Tensor:
        """`(B, T, D)` to `(B, T, D)`."""
        gate, up = self.gate_proj(x_BTD), self.up_proj(x_BTD)
        if not self.scheme.has("activation"):
            return self.down_proj(self.function(gate).mul_(up))
        columns = self.scheme.activation_block
        opened = self.table(snap(gate, columns), columns)
        # Two integers of 8 bits: their product is exact in fp32, and so is the maximum that picks its shift.
        return self.down_proj(snap(opened.mul_(snap(up, columns)), columns))


class BlockAttention(nn.Module):
    """Causal attention with rotary positions on 8-bit queries, keys, values and probabilities."""

    def __init__(self, attention: Any, scheme: Scheme) -> None:
        super().__init__()
        self.q_proj, self.k_proj = attention.q_proj, attention.k_proj
        self.v_proj, self.o_proj = attention.v_proj, attention.o_proj
        self.index, self.width, self.scaling = attention.layer_idx, attention.head_dim, attention.scaling
        self.scheme = scheme

    def forward(
        self, x_BTD: Tensor, positions: tuple[Tensor, Tensor], mask: Tensor | None, cache: Any | None
    ) -> Tensor:
        """`(B, T, D)` to `(B, T, D)`; keys and values are appended to the cache if there is one.

        Args:
            x_BTD: on the grid.
            positions: cosines and sines (B or 1, T, E).
            mask: (B, 1, T, S), 0 where a key may be seen and a large negative number where not.
            cache: transformers' cache.
        """
        q_BHTE, k_BHSE, v_BHSE = (
            layer(x_BTD).unflatten(-1, (-1, self.width)).transpose(1, 2)
            for layer in (self.q_proj, self.k_proj, self.v_proj)
        )
        q_BHTE, k_BHSE = self._rotated(q_BHTE, positions), self._rotated(k_BHSE, positions)
        k_BHSE, v_BHSE = self._remembered(k_BHSE, v_BHSE, cache)
        # Heads that share keys are one head with more queries.
        num_shared, tokens = q_BHTE.shape[1] // k_BHSE.shape[1], q_BHTE.shape[2]
        q_BHNE = q_BHTE.unflatten(1, (-1, num_shared)).flatten(2, 3)
        scores_BHNS = self._product(q_BHNE, k_BHSE).mul_(self.scaling)
        keep = None if mask is None else (mask == 0).repeat(1, 1, num_shared, 1)
        y_BHNE = self._mixture(self._softmax(scores_BHNS, keep), v_BHSE)
        y_BHTE = y_BHNE.unflatten(2, (num_shared, tokens)).flatten(1, 2)
        return self.o_proj(y_BHTE.transpose(1, 2).flatten(2))

    def _rotated(self, x_BHTE: Tensor, positions: tuple[Tensor, Tensor]) -> Tensor:
        rounds = self.scheme.has("matmul")
        cos, sin = (_sixteen_bits(p[:, None]) if rounds else p[:, None].float() for p in positions)
        first, second = x_BHTE.chunk(2, dim=-1)
        turned = x_BHTE * cos + torch.cat((-second, first), dim=-1) * sin
        return snap(turned, self.scheme.activation_block) if rounds else turned

    def _remembered(self, k_BHTE: Tensor, v_BHTE: Tensor, cache: Any | None) -> tuple[Tensor, Tensor]:
        if not self.scheme.has("cache"):
            return (k_BHTE, v_BHTE) if cache is None else cache.update(k_BHTE, v_BHTE, self.index)
        columns = min(self.scheme.cache_block, self.width)
        if cache is None:
            return snap(k_BHTE, columns), snap(v_BHTE, columns)
        return llama.append(cache, self.index, k_BHTE, v_BHTE, _encoder(columns), _decoder(columns))

    def _product(self, q: Tensor, k: Tensor) -> Tensor:
        if self._adds_integers:
            columns = min(self.scheme.activation_block, self.width), min(self.scheme.cache_block, self.width)
            return integer_product(q, k, columns[0], columns[1])
        return float_product(q, k)

    def _softmax(self, scores: Tensor, keep: Tensor | None) -> Tensor:
        if self.scheme.has("softmax"):
            return softmax(scores, keep, self.scheme)
        hidden = scores if keep is None else scores.masked_fill(~keep, torch.finfo(scores.dtype).min)
        return hidden.softmax(-1)

    def _mixture(self, p: Tensor, v: Tensor) -> Tensor:
        return (exact_product if self._adds_integers else float_product)(p, v.transpose(-1, -2))

    @property
    def _adds_integers(self) -> bool:
        # Only where all that is multiplied is on a grid.
        needed = ("matmul", "softmax", "cache")
        return self.scheme.accumulate == "integer" and all(map(self.scheme.has, needed))


class BlockDecoderLayer(Packed):
    """Norm, attention, add, norm, MLP, add: sums are rounded to 8 bits after their exponents are aligned.

    It stands for no weights itself; as a packed module it says that the model's numbers are not those of its weights
    alone.
    """

    trains_adapters: ClassVar[bool] = False

    def __init__(self, layer: Any, scheme: Scheme, activation: str) -> None:
        super().__init__()
        self.self_attn = BlockAttention(layer.self_attn, scheme)
        self.mlp = BlockMLP(layer.mlp, scheme, activation)
        self.input_layernorm, self.post_attention_layernorm = (
            BlockNorm(old.weight, old.variance_epsilon, scheme)
            for old in (layer.input_layernorm, layer.post_attention_layernorm)
        )
        self.scheme = scheme

    @property
    def num_weights(self) -> int:
        return 0

    def num_nonzero(self) -> int:
        return 0

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        past_key_values: Any | None = None,
        **_: Any,
    ) -> Tensor:
        """`(B, T, D)` to `(B, T, D)`, with the arguments of transformers' own."""
        assert position_embeddings is not None
        x_BTD = self._stored(hidden_states.float())
        attended = self.self_attn(self.input_layernorm(x_BTD), position_embeddings, attention_mask, past_key_values)
        x_BTD = self._stored(x_BTD + attended)
        return self._stored(x_BTD + self.mlp(self.post_attention_layernorm(x_BTD)))

    def _stored(self, x_BTD: Tensor) -> Tensor:
        # Exact in fp32 before it is rounded while the two exponents are at most 16 apart.
        return snap(x_BTD, self.scheme.activation_block) if self.scheme.has("residual") else x_BTD


def _sixteen_bits(constant: Tensor) -> Tensor:
    return (constant.float() * _ROTATION_ONE).round_().div_(_ROTATION_ONE)


def _encoder(columns: int) -> llama.Encode:
    def encode(x: Tensor) -> tuple[Tensor, Tensor]:
        value, shift = blocks.integers(x, columns)
        return value.flatten(-2)[..., : x.shape[-1]].to(torch.int8), shift[..., 0].to(torch.int8)

    return encode


def _decoder(columns: int) -> llama.Decode:
    def decode(value: Tensor, shift: Tensor) -> Tensor:
        step = power_of_two(-shift.int()).repeat_interleave(columns, -1)
        return value.float().mul_(step[..., : value.shape[-1]])

    return decode
