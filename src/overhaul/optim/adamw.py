"""AdamW (Loshchilov and Hutter, 2019) on fp32 masters."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn


def adamw(parameters: Iterable[nn.Parameter], *, lr: float, weight_decay: float = 0.0) -> torch.optim.Optimizer:
    """torch's fused AdamW; the parameters become fp32 in place.

    An update of 1e-4 of a bf16 weight would be rounded away, so trained tensors are fp32 and matrix products are
    cast by autocast.
    """
    masters = list(parameters)
    for parameter in masters:
        parameter.data = parameter.data.float()
    return torch.optim.AdamW(masters, lr=lr, weight_decay=weight_decay, fused=True)
