"""AdamW with moments of 8 bits in blocks (Dettmers et al., 2022), by bitsandbytes, on fp32 masters."""

from __future__ import annotations

import importlib.util
import logging
import math
from collections.abc import Iterable

import torch
from torch import nn

from overhaul.errors import UserError

BLOCK, SMALLEST = 256, 4096
"""Numbers that share a scale; tensors with fewer numbers than the second keep moments of 32 bits."""
MAP_BYTES = 2 * 256 * 4
"""Of the two tables of what 8 bits stand for, one pair for all parameters."""


def adamw8bit(parameters: Iterable[nn.Parameter], *, lr: float, weight_decay: float = 0.0) -> torch.optim.Optimizer:
    """bitsandbytes' AdamW8bit; the parameters become fp32 in place.

    Raises:
        UserError: bitsandbytes is not installed.
    """
    if importlib.util.find_spec("bitsandbytes") is None:
        raise UserError("--optimizer adamw8bit needs bitsandbytes", hint="pip install 'bitsandbytes>=0.50'")
    log = logging.getLogger("bitsandbytes")
    level = log.level
    log.setLevel(logging.ERROR)  # on a processor it warns of a kernel of another part that it does not find
    from bitsandbytes.optim import AdamW8bit  # pyright: ignore - optional

    log.setLevel(level)
    masters = list(parameters)
    for parameter in masters:
        parameter.data = parameter.data.float()
    return AdamW8bit(masters, lr=lr, weight_decay=weight_decay, min_8bit_size=SMALLEST)


def state_bytes(parameter: torch.Tensor) -> int:
    """Of one parameter's moments, without the tables."""
    count = parameter.numel()
    return 8 * count if count < SMALLEST else 2 * (count + 4 * math.ceil(count / BLOCK))
