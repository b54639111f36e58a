"""Which task an example is of, where nobody says so: each task's model is asked how much it doubts."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor


def entropies(logits_NC: Tensor, temperature: float = 1.0) -> Tensor:
    """`(N,)` entropy of each prediction as a share of the largest there is, so that heads of any width compare.

    Args:
        logits_NC: of one task's classes. A head of one class never doubts: it is given a whole doubt instead.
        temperature: that logits are divided by.

    Returns:
        From 0 to 1.
    """
    classes = logits_NC.shape[1]
    if classes == 1:
        return torch.ones(len(logits_NC))
    log_p = (logits_NC.double() / temperature).log_softmax(dim=1)
    return (-(log_p.exp() * log_p).sum(dim=1) / math.log(classes)).float()


def over_views(plain_NC: Tensor, views: Iterable[Tensor], copies: int = 1) -> Tensor:
    """`(N, C)` mean logits over an example's views (Roy et al., 2023): means of logits, not of probabilities.

    Args:
        plain_NC: of the examples as they are.
        views: `(N, C)` of each of their other views, such as augmented ones.
        copies: how often the examples as they are count; without views they are all there is.
    """
    # As differences from it: views that are no different leave the plain logits as they are, to the bit.
    total_NC, count = torch.zeros_like(plain_NC, dtype=torch.float64), copies
    for view_NC in views:
        total_NC += view_NC.double() - plain_NC
        count += 1
    return (plain_NC + total_NC / count).to(plain_NC.dtype)
