"""SGD whose weight decay is decoupled (Loshchilov and Hutter, 2019): torch's own adds it to the gradient."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn


class SGDW(torch.optim.SGD):
    """`theta <- (1 - lr decay) theta - lr v`, with the momentum v of the gradient alone.

    Args:
        parameters: what is trained, fp32.
        lr: learning rate.
        momentum: share of v that is left at each step.
        decay: decoupled weight decay; 0 makes it torch's SGD.
    """

    def __init__(
        self, parameters: Iterable[nn.Parameter], *, lr: float, momentum: float = 0.0, decay: float = 0.0
    ) -> None:
        super().__init__(parameters, lr=lr, momentum=momentum)
        self.decay = decay

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self.decay:
            with torch.no_grad():
                for group in self.param_groups:
                    for parameter in (p for p in group["params"] if p.grad is not None):
                        parameter.mul_(1 - group["lr"] * self.decay)
        super().step()
        return loss
