"""Cross-entropy of a large vocabulary straight from the hidden states, without ever holding all logits.

The logits of a chunk of tokens become their own gradient in place, and the gradients of the hidden states and
of the output embedding are taken while the chunk is there: nothing is recomputed, and only they wait for the
backward pass.

Shapes: N tokens, D hidden width, V vocabulary, C tokens of one chunk, R tokens of one block of rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

CHUNK_TOKENS = 512
"""Enough tokens for the matrix products to run at full speed: 50 MB of bf16 logits at 49,152 words."""

_ROWS_ELEMENTS = 400_000
"""Logits that go through softmax together: 1.6 MB in fp32, so the later passes find them in the cache."""

_SLAB_WORDS = 8192
"""Rows of the output embedding whose gradient is multiplied at once, before it is added in fp32."""


def linear_cross_entropy(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    labels_N: Tensor,
    bias_V: Tensor | None = None,
    *,
    ignore_index: int = -100,
    chunk_tokens: int = CHUNK_TOKENS,
) -> Tensor:
    """The sum of -log softmax(hidden weight^T + bias)[label] over the trained labels, in nats.

    Matrix products run in the autocast type where autocast is on, else in the wider of the operands' types;
    softmax, its logarithm, and the sums over tokens and chunks are fp32 (fp64 for fp64 inputs).

    Args:
        hidden_ND: last hidden states.
        weight_VD: the output embedding; its gradient is computed only if it requires one.
        labels_N: the word that each hidden state should predict, int64.
        bias_V: added to the logits.
        ignore_index: the label of positions that are not trained; they are dropped before any work.
        chunk_tokens: tokens whose logits exist at one time; changes memory and speed, not the result.

    Returns:
        A scalar, fp32 or wider. Its backward pass runs once: a second one raises `RuntimeError`, even after
        `retain_graph`, and so does differentiating twice.
    """
    if not torch.is_grad_enabled():
        return token_nll(
            hidden_ND, weight_VD, labels_N, bias_V, ignore_index=ignore_index, chunk_tokens=chunk_tokens
        ).sum()
    kept = labels_N != ignore_index
    if not bool(kept.all()):
        hidden_ND, labels_N = hidden_ND[kept], labels_N[kept]
    loss: Any = _LinearCrossEntropy.apply(hidden_ND, weight_VD, labels_N, bias_V, chunk_tokens)
    return loss


@torch.no_grad()
def token_nll(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    labels_N: Tensor,
    bias_V: Tensor | None = None,
    *,
    ignore_index: int = -100,
    chunk_tokens: int = CHUNK_TOKENS,
) -> Tensor:
    """`(N,)` negative log-likelihoods in nats, fp32 or wider, 0 where ignored; never records a gradient.

    Arguments and arithmetic are those of `linear_cross_entropy`.
    """
    kept = labels_N != ignore_index
    hidden_KD, labels_K = hidden_ND[kept], labels_N[kept]
    dtype = _compute_dtype(hidden_ND, weight_VD)
    nll_K = hidden_ND.new_empty(len(labels_K), dtype=_statistics_dtype(dtype))
    for at, logits_CV in _logits(hidden_KD.to(dtype), weight_VD.to(dtype), bias_V, chunk_tokens):
        nll_K[at] = _differentiate_(logits_CV, labels_K[at], with_gradient=False)
    return nll_K.new_zeros(labels_N.shape).masked_scatter_(kept, nll_K)


class _LinearCrossEntropy(torch.autograd.Function):
    """Loss and gradients in one sweep over the tokens; the backward pass only scales."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: Tensor,
        weight_VD: Tensor,
        labels_N: Tensor,
        bias_V: Tensor | None,
        chunk_tokens: int,
    ) -> Tensor:
        need_hidden, need_weight, _, need_bias, _ = ctx.needs_input_grad
        dtype = _compute_dtype(hidden_ND, weight_VD)
        wide = _statistics_dtype(dtype)
        product_VD, product_ND = weight_VD.to(dtype), hidden_ND.to(dtype)
        loss = torch.zeros((), dtype=wide, device=hidden_ND.device)
        grad_ND = torch.empty_like(product_ND) if need_hidden else None
        grad_VD = torch.zeros_like(weight_VD, dtype=wide) if need_weight else None
        grad_V = torch.zeros_like(bias_V, dtype=wide) if need_bias and bias_V is not None else None
        for at, grad_CV in _logits(product_ND, product_VD, bias_V, chunk_tokens):
            loss += _differentiate_(grad_CV, labels_N[at], with_gradient=any(ctx.needs_input_grad)).sum()
            if grad_ND is not None:
                torch.mm(grad_CV, product_VD, out=grad_ND[at])
            if grad_VD is not None:
                for words in _slices(len(grad_VD), _SLAB_WORDS):
                    grad_VD[words] += grad_CV[:, words].t() @ product_ND[at]
            if grad_V is not None:
                grad_V += grad_CV.sum(0, dtype=wide)
        ctx.grads = (grad_ND, grad_VD, grad_V)
        ctx.dtypes = (hidden_ND.dtype, weight_VD.dtype, bias_V.dtype if bias_V is not None else None)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        # Scaled in place and given away: the embedding's gradient, the largest tensor here, exists only once.
        if ctx.grads is None:
            raise RuntimeError("linear_cross_entropy: its backward pass can run only once")
        (grad_ND, grad_VD, grad_V), ctx.grads = ctx.grads, None
        hidden_dtype, weight_dtype, bias_dtype = ctx.dtypes
        return (
            None if grad_ND is None else grad_ND.mul_(grad).to(hidden_dtype),
            None if grad_VD is None else grad_VD.mul_(grad).to(weight_dtype),
            None,
            None if grad_V is None else grad_V.mul_(grad).to(bias_dtype),
            None,
        )


def _compute_dtype(hidden_ND: Tensor, weight_VD: Tensor) -> torch.dtype:
    device = hidden_ND.device.type
    if torch.is_autocast_enabled(device) and hidden_ND.dtype != torch.float64:
        return torch.get_autocast_dtype(device)
    return torch.promote_types(hidden_ND.dtype, weight_VD.dtype)


def _statistics_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _logits(
    hidden_ND: Tensor, weight_VD: Tensor, bias_V: Tensor | None, chunk_tokens: int
) -> Iterator[tuple[slice, Tensor]]:
    """Chunk by chunk, the tokens and their logits `(C, V)`, in a buffer that the next chunk overwrites."""
    num_tokens = hidden_ND.shape[0]
    buffer_CV = hidden_ND.new_empty(min(chunk_tokens, num_tokens), weight_VD.shape[0])
    for at in _slices(num_tokens, chunk_tokens):
        logits_CV = torch.mm(hidden_ND[at], weight_VD.t(), out=buffer_CV[: at.stop - at.start])
        if bias_V is not None:
            logits_CV += bias_V
        yield at, logits_CV


def _differentiate_(logits_CV: Tensor, labels_C: Tensor, *, with_gradient: bool) -> Tensor:
    """Turns logits into the gradient of their loss, softmax - onehot(label), in place.

    Returns:
        The losses `(C,)`. Without gradient `logits_CV` stays as it is.
    """
    num_tokens, num_words = logits_CV.shape
    rows = max(1, _ROWS_ELEMENTS // num_words)
    wide_RV = logits_CV.new_empty(min(rows, num_tokens), num_words, dtype=_statistics_dtype(logits_CV.dtype))
    nll_C = wide_RV.new_empty(num_tokens)
    for at in _slices(num_tokens, rows):
        scratch_RV = wide_RV[: at.stop - at.start].copy_(logits_CV[at])
        labels_R1 = labels_C[at, None]
        top_R, label_R = scratch_RV.amax(-1), scratch_RV.gather(1, labels_R1)[:, 0]
        torch.softmax(scratch_RV, -1, out=scratch_RV)
        # log-sum-exp = top - log softmax(top): the likeliest word has a probability of at least 1/V, so this
        # logarithm is exact where the label's own probability would have underflowed.
        nll_C[at] = top_R - scratch_RV.amax(-1).log_() - label_R
        if with_gradient:
            scratch_RV.scatter_add_(1, labels_R1, scratch_RV.new_full((), -1.0).expand(labels_R1.shape))
            logits_CV[at] = scratch_RV
    return nll_C


def _slices(total: int, size: int) -> Iterator[slice]:
    return (slice(start, min(start + size, total)) for start in range(0, total, size))
