"""Which task an example is of, where nobody says so: each task's model is asked how much it doubts."""

from __future__ import annotations

import math

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
