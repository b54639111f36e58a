"""Cross-entropy of a large vocabulary straight from the hidden states, without ever holding all logits.

Shapes: N tokens, D hidden width, V vocabulary, C tokens of one chunk, R tokens of one block of rows.
"""

from __future__ import annotations

import torch
from torch import Tensor

from overhaul.vocabulary_loss import (
    CHUNK_TOKENS,
    linear_loss,
    logits_loss,
    row_blocks,
    row_buffer,
    softmax_,
    token_losses,
)

IGNORE_INDEX = -100
"""torch's label of positions that are not trained."""


def linear_cross_entropy(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    labels_N: Tensor,
    bias_V: Tensor | None = None,
    *,
    ignore_index: int = IGNORE_INDEX,
    chunk_tokens: int = CHUNK_TOKENS,
) -> Tensor:
    """The sum of -log softmax(hidden weight^T + bias)[label] over the trained labels, in nats.

    Args:
        hidden_ND: last hidden states.
        weight_VD: the output embedding; its gradient is computed only if it requires one.
        labels_N: the word that each hidden state should predict, int64.
        bias_V: added to the logits.
        ignore_index: the label of positions that are not trained; they are dropped before any work.
        chunk_tokens: tokens whose logits exist at one time; changes memory and speed, not the result.

    Returns:
        A scalar, with the arithmetic and the single backward pass of `linear_loss`.
    """
    kept = labels_N != ignore_index
    if not bool(kept.all()):
        hidden_ND, labels_N = hidden_ND[kept], labels_N[kept]
    return linear_loss(hidden_ND, weight_VD, bias_V, _Labels(labels_N), chunk_tokens=chunk_tokens)


def logits_cross_entropy(logits_NV: Tensor, labels_N: Tensor, *, ignore_index: int = IGNORE_INDEX) -> Tensor:
    """The same from logits that are there as a whole."""
    kept = labels_N != ignore_index
    return logits_loss(logits_NV[kept], _Labels(labels_N[kept]))


@torch.no_grad()
def token_nll(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    labels_N: Tensor,
    bias_V: Tensor | None = None,
    *,
    ignore_index: int = IGNORE_INDEX,
    chunk_tokens: int = CHUNK_TOKENS,
) -> Tensor:
    """`(N,)` negative log-likelihoods in nats, fp32 or wider, 0 where ignored; never records a gradient.

    Arguments and arithmetic are those of `linear_cross_entropy`.
    """
    kept = labels_N != ignore_index
    nll_K = token_losses(hidden_ND[kept], weight_VD, bias_V, _Labels(labels_N[kept]), chunk_tokens=chunk_tokens)
    return nll_K.new_zeros(labels_N.shape).masked_scatter_(kept, nll_K)


class _Labels:
    """The loss of logits whose right words are known; its gradient is softmax - onehot(label)."""

    def __init__(self, labels_N: Tensor) -> None:
        self.labels_N = labels_N

    def __call__(self, at: slice, logits_CV: Tensor, *, with_gradient: bool) -> Tensor:
        labels_C, wide_RV = self.labels_N[at], row_buffer(logits_CV)
        nll_C = wide_RV.new_empty(len(logits_CV))
        for rows in row_blocks(logits_CV):
            scratch_RV = wide_RV[: rows.stop - rows.start].copy_(logits_CV[rows])
            labels_R1 = labels_C[rows, None]
            label_R = scratch_RV.gather(1, labels_R1)[:, 0]
            top_R, log_top_R = softmax_(scratch_RV)
            nll_C[rows] = top_R - log_top_R - label_R
            if with_gradient:
                scratch_RV.scatter_add_(1, labels_R1, scratch_RV.new_full((), -1.0).expand(labels_R1.shape))
                logits_CV[rows] = scratch_RV
        return nll_C
