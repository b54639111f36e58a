"""Causal attention for training in bf16 on a processor: matrix products of a few query rows with all earlier keys.

torch's own kernel for this case works through small tiles, head by head, and takes longer.

Shapes: B windows, T tokens, H query heads, K key and value heads, G = H / K query heads that share one, D head width,
C query tokens of a chunk, S keys that the chunk sees; U = B K products at a time, each of R = G C rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

CHUNK_TOKENS = 64
"""Few enough for the half of the scores that a causal mask hides to be left out, and for them to stay in the cache."""


def causal_attention(q_BHTD: Tensor, k_BKTD: Tensor, v_BKTD: Tensor, scale: float) -> Tensor:
    """softmax(scale q k^T, earlier and own tokens) v, as `(B, T, H, D)`.

    Scores and probabilities are kept in the type of the inputs, sums are taken in fp32: in bf16 the gradients of a
    model are as far from those in fp32 as with torch's kernel. Memory grows with T, not with its square: the backward
    pass makes the probabilities again (Dao et al., 2022). Differentiating twice raises `RuntimeError`.
    """
    y: Any = _CausalAttention.apply(q_BHTD, k_BKTD, v_BKTD, scale)
    return y


class _CausalAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q_BHTD: Tensor, k_BKTD: Tensor, v_BKTD: Tensor, scale: float) -> Tensor:
        (B, H, T, D), K = q_BHTD.shape, k_BKTD.shape[1]
        q_BKGTD = q_BHTD.reshape(B, K, H // K, T, D)
        k_UTD, v_UTD = k_BKTD.reshape(B * K, T, D), v_BKTD.reshape(B * K, T, D)
        out_BTKGD = v_BKTD.new_empty(B, T, K, H // K, D)
        for at in _chunks(T):
            probability_URS = _probabilities(_rows(q_BKGTD, at), k_UTD, at, scale)
            out_URD = torch.bmm(probability_URS, v_UTD[:, : at.stop])
            out_BTKGD[:, at] = out_URD.view(B, K, H // K, -1, D).permute(0, 3, 1, 2, 4)
        ctx.save_for_backward(q_BKGTD, k_UTD, v_UTD)
        ctx.scale = scale
        return out_BTKGD.view(B, T, H, D)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_BTHD: Tensor) -> tuple[Tensor | None, ...]:
        q_BKGTD, k_UTD, v_UTD = ctx.saved_tensors
        B, K, G, T, D = q_BKGTD.shape
        grad_BKGTD = grad_BTHD.reshape(B, T, K, G, D).permute(0, 2, 3, 1, 4)
        grad_q_BKGTD = torch.empty_like(q_BKGTD)
        grad_k_UTD, grad_v_UTD = (torch.zeros_like(x, dtype=torch.float32) for x in (k_UTD, v_UTD))
        for at in _chunks(T):
            seen = slice(0, at.stop)
            q_URD, grad_URD = _rows(q_BKGTD, at), _rows(grad_BKGTD, at)
            probability_URS = _probabilities(q_URD, k_UTD, at, ctx.scale)
            grad_v_UTD[:, seen] += torch.bmm(probability_URS.mT, grad_URD)
            grad_URS = torch.bmm(grad_URD, v_UTD[:, seen].mT)
            grad_URS = torch.ops.aten._softmax_backward_data(grad_URS, probability_URS, -1, grad_URS.dtype)
            grad_q_BKGTD[:, :, :, at] = _scaled_bmm(grad_URS, k_UTD[:, seen], ctx.scale).view(B, K, G, -1, D)
            grad_k_UTD[:, seen] += _scaled_bmm(grad_URS.mT, q_URD, ctx.scale)
        grad_k_BKTD, grad_v_BKTD = (grad.to(k_UTD.dtype).view(B, K, T, D) for grad in (grad_k_UTD, grad_v_UTD))
        return grad_q_BKGTD.view(B, K * G, T, D), grad_k_BKTD, grad_v_BKTD, None


def _chunks(num_tokens: int) -> Iterator[slice]:
    return (slice(first, min(first + CHUNK_TOKENS, num_tokens)) for first in range(0, num_tokens, CHUNK_TOKENS))


def _rows(x_BKGTD: Tensor, at: slice) -> Tensor:
    """(U, R, D): the chunk's tokens in all heads that share keys, below each other."""
    B, K, _, _, D = x_BKGTD.shape
    return x_BKGTD[:, :, :, at].reshape(B * K, -1, D)


def _probabilities(q_URD: Tensor, k_UTD: Tensor, at: slice, scale: float) -> Tensor:
    """(U, R, S), zero where a key is later than the query."""
    score_URS = _scaled_bmm(q_URD, k_UTD[:, : at.stop].mT, scale)
    size = at.stop - at.start
    later_CC = score_URS.new_full((size, size), float("-inf")).triu_(1)
    score_URS[:, :, at].unflatten(1, (-1, size)).add_(later_CC)
    return score_URS.softmax(-1)


def _scaled_bmm(left: Tensor, right: Tensor, scale: float) -> Tensor:
    """scale left right, rounded once."""
    return torch.baddbmm(left.new_empty(()), left, right, beta=0, alpha=scale)
