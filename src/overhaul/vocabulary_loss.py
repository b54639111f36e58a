"""Losses over a large vocabulary straight from the hidden states, without ever holding all logits.

The logits of a chunk of tokens become their own gradient in place, and the gradients of the hidden states and
of the output embedding are taken while the chunk is there: nothing is recomputed, and only they wait for the
backward pass. What a loss makes of a chunk of logits is all that cross-entropy and divergences differ in.

Shapes: N tokens, D hidden width, V vocabulary, C tokens of one chunk, R tokens of one block of rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

CHUNK_TOKENS = 512
"""Enough tokens for the matrix products to run at full speed: 50 MB of bf16 logits at 49,152 words."""

_ROWS_ELEMENTS = 400_000
"""Logits that go through softmax together: 1.6 MB in fp32, so the later passes find them in the cache."""

_SLAB_WORDS = 8192
"""Rows of the output embedding whose gradient is multiplied at once, before it is added in fp32."""


class Differentiate(Protocol):
    """A loss as a function of a chunk of logits."""

    def __call__(self, at: slice, logits_CV: Tensor, *, with_gradient: bool) -> Tensor:
        """Turns logits into the gradient of their losses, in place; without gradient they stay as they are.

        Args:
            at: which tokens these are.
            logits_CV: their logits.
            with_gradient: whether the gradient is wanted.

        Returns:
            The losses `(C,)`, fp32 or wider.
        """
        ...


def linear_loss(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    bias_V: Tensor | None,
    differentiate_: Differentiate,
    *,
    chunk_tokens: int = CHUNK_TOKENS,
) -> Tensor:
    """The sum of a loss of the logits hidden weight^T + bias.

    Matrix products run in the autocast type where autocast is on, else in the wider of the operands' types;
    sums over tokens and chunks are fp32 (fp64 for fp64 inputs).

    Args:
        hidden_ND: last hidden states.
        weight_VD: the output embedding; its gradient is computed only if it requires one.
        bias_V: added to the logits.
        differentiate_: the loss.
        chunk_tokens: tokens whose logits exist at one time; changes memory and speed, not the result.

    Returns:
        A scalar, fp32 or wider. Its backward pass runs once: a second one raises `RuntimeError`, even after
        `retain_graph`, and so does differentiating twice.
    """
    if not torch.is_grad_enabled():
        return token_losses(hidden_ND, weight_VD, bias_V, differentiate_, chunk_tokens=chunk_tokens).sum()
    loss: Any = _LinearLoss.apply(hidden_ND, weight_VD, bias_V, differentiate_, chunk_tokens)
    return loss


@torch.no_grad()
def token_losses(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    bias_V: Tensor | None,
    differentiate_: Differentiate,
    *,
    chunk_tokens: int = CHUNK_TOKENS,
) -> Tensor:
    """`(N,)` losses, fp32 or wider; never records a gradient. Arguments are those of `linear_loss`."""
    dtype = compute_dtype(hidden_ND, weight_VD)
    losses_N = hidden_ND.new_empty(len(hidden_ND), dtype=statistics_dtype(dtype))
    for at, logits_CV in chunked_logits(hidden_ND.to(dtype), weight_VD.to(dtype), bias_V, chunk_tokens):
        losses_N[at] = differentiate_(at, logits_CV, with_gradient=False)
    return losses_N


def logits_loss(logits_NV: Tensor, differentiate_: Differentiate) -> Tensor:
    """The sum of a loss of logits that are there as a whole, as some models make them; a scalar, fp32 or wider."""
    if not torch.is_grad_enabled():
        return differentiate_(slice(0, len(logits_NV)), logits_NV, with_gradient=False).sum()
    loss: Any = _LogitsLoss.apply(logits_NV, differentiate_)
    return loss


class _LinearLoss(torch.autograd.Function):
    """Loss and gradients in one sweep over the tokens; the backward pass only scales."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: Tensor,
        weight_VD: Tensor,
        bias_V: Tensor | None,
        differentiate_: Differentiate,
        chunk_tokens: int,
    ) -> Tensor:
        need_hidden, need_weight, need_bias, *_ = ctx.needs_input_grad
        dtype = compute_dtype(hidden_ND, weight_VD)
        wide = statistics_dtype(dtype)
        product_VD, product_ND = weight_VD.to(dtype), hidden_ND.to(dtype)
        loss = torch.zeros((), dtype=wide, device=hidden_ND.device)
        grad_ND = torch.empty_like(product_ND) if need_hidden else None
        grad_VD = torch.zeros_like(weight_VD, dtype=wide) if need_weight else None
        grad_V = torch.zeros_like(bias_V, dtype=wide) if need_bias and bias_V is not None else None
        for at, grad_CV in chunked_logits(product_ND, product_VD, bias_V, chunk_tokens):
            loss += differentiate_(at, grad_CV, with_gradient=any(ctx.needs_input_grad)).sum()
            if grad_ND is not None:
                torch.mm(grad_CV, product_VD, out=grad_ND[at])
            if grad_VD is not None:
                for words in slices(len(grad_VD), _SLAB_WORDS):
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
        (grad_ND, grad_VD, grad_V), ctx.grads = _once(ctx.grads), None
        hidden_dtype, weight_dtype, bias_dtype = ctx.dtypes
        return (
            None if grad_ND is None else grad_ND.mul_(grad).to(hidden_dtype),
            None if grad_VD is None else grad_VD.mul_(grad).to(weight_dtype),
            None if grad_V is None else grad_V.mul_(grad).to(bias_dtype),
            None,
            None,
        )


class _LogitsLoss(torch.autograd.Function):
    """The same for logits that exist as a whole: one copy of them becomes their gradient."""

    @staticmethod
    def forward(ctx: Any, logits_NV: Tensor, differentiate_: Differentiate) -> Tensor:
        grad_NV = logits_NV.clone()
        losses_N = differentiate_(slice(0, len(grad_NV)), grad_NV, with_gradient=ctx.needs_input_grad[0])
        ctx.grads = grad_NV
        return losses_N.sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        grad_NV, ctx.grads = _once(ctx.grads), None
        return grad_NV.mul_(grad), None


def _once(grads: Any) -> Any:
    if grads is None:
        raise RuntimeError("a loss over the vocabulary: its backward pass can run only once")
    return grads


def compute_dtype(hidden_ND: Tensor, weight_VD: Tensor) -> torch.dtype:
    """The type of the matrix products: autocast's where it is on, else the wider of the operands'."""
    device = hidden_ND.device.type
    if torch.is_autocast_enabled(device) and hidden_ND.dtype != torch.float64:
        return torch.get_autocast_dtype(device)
    return torch.promote_types(hidden_ND.dtype, weight_VD.dtype)


def statistics_dtype(dtype: torch.dtype) -> torch.dtype:
    """The type of softmax, its logarithm and of sums: fp32, or `dtype` where that is wider."""
    return torch.promote_types(dtype, torch.float32)


def chunked_logits(
    hidden_ND: Tensor, weight_VD: Tensor, bias_V: Tensor | None, chunk_tokens: int
) -> Iterator[tuple[slice, Tensor]]:
    """Chunk by chunk, the tokens and their logits `(C, V)`, in a buffer that the next chunk overwrites."""
    num_tokens = hidden_ND.shape[0]
    buffer_CV = hidden_ND.new_empty(min(chunk_tokens, num_tokens), weight_VD.shape[0])
    for at in slices(num_tokens, chunk_tokens):
        logits_CV = torch.mm(hidden_ND[at], weight_VD.t(), out=buffer_CV[: at.stop - at.start])
        if bias_V is not None:
            logits_CV += bias_V
        yield at, logits_CV


def row_blocks(logits_CV: Tensor) -> Iterator[slice]:
    """Rows of logits that go through softmax together."""
    num_tokens, num_words = logits_CV.shape
    return slices(num_tokens, max(1, _ROWS_ELEMENTS // num_words))


def row_buffer(logits_CV: Tensor) -> Tensor:
    """Room for the largest of the `row_blocks`, in the type of statistics."""
    num_tokens, num_words = logits_CV.shape
    rows = min(max(1, _ROWS_ELEMENTS // num_words), num_tokens)
    return logits_CV.new_empty(rows, num_words, dtype=statistics_dtype(logits_CV.dtype))


def softmax_(logits_RV: Tensor) -> tuple[Tensor, Tensor]:
    """Turns logits into probabilities, in place.

    Returns:
        Two `(R,)` tensors: the highest logit, and what must be taken from it to get the log-sum-exp.
    """
    top_R = logits_RV.amax(-1)
    torch.softmax(logits_RV, -1, out=logits_RV)
    # log-sum-exp = top - log softmax(top): the likeliest word has a probability of at least 1/V, so this
    # logarithm is exact where another word's probability would have underflowed.
    return top_R, logits_RV.amax(-1).log_()


def slices(total: int, size: int) -> Iterator[slice]:
    """The range from 0 to `total` in pieces of `size`, the last one perhaps smaller."""
    return (slice(start, min(start + size, total)) for start in range(0, total, size))
