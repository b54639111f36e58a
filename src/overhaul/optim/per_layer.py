"""Updates in the backward pass: each parameter as soon as its gradient is there, which is then freed."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

TakeNorm = Callable[[], Tensor]
"""The norm of all gradients since it was last taken."""


@contextlib.contextmanager
def updating(optimizer: torch.optim.Optimizer, refuse: Callable[[Tensor], None]) -> Iterator[TakeNorm]:
    """Inside, `backward` steps the optimizer for one parameter after the other; at most one gradient is alive.

    Args:
        optimizer: its step must pass over parameters without a gradient.
        refuse: called with the norm of each gradient before it is used; raises for one that is not finite. What
            came before it in the backward pass, the later layers, has been updated by then.
    """
    squares: list[Tensor] = []

    def update(parameter: Tensor) -> None:
        assert parameter.grad is not None
        norm = torch.linalg.vector_norm(parameter.grad)
        refuse(norm)
        squares.append(norm.square())
        optimizer.step()
        parameter.grad = None

    def take() -> Tensor:
        norm = torch.stack(squares).sum().sqrt()
        squares.clear()
        return norm

    trained = [p for group in optimizer.param_groups for p in group["params"]]
    hooks = [p.register_post_accumulate_grad_hook(update) for p in trained]
    try:
        yield take
    finally:
        for hook in hooks:
            hook.remove()
