"""Refresh learning (Wang et al., ICLR 2024): unlearn the current batch a little, then learn it.

It wraps any optimizer, since an optimizer is called with a closure: the closure gives a gradient to go up, and then
the wrapped optimizer calls it again to go down. To first order that favours regions that are flat, as the Fisher
information weighs them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn


def langevin(
    gradient: Tensor, fisher: Tensor | float, *, rate: float, noise: float, damping: float, normal: Tensor
) -> Tensor:
    """The step up as the paper writes it: `rate P g + noise sqrt(2 rate P) z`, with `P = 1 / (F + damping)`.

    Args:
        gradient: g, of the whole objective on the current batch.
        fisher: F, diagonal.
        rate: gamma.
        noise: 1 for Langevin dynamics, 0 for none.
        damping: what keeps the inverse finite where F is zero; the paper has none, and does not say how it does.
        normal: z, standard normal, of the gradient's shape.
    """
    inverse = 1.0 / (torch.as_tensor(fisher, dtype=gradient.dtype) + damping)
    return rate * inverse * gradient + noise * (2 * rate * inverse).sqrt() * normal


def released(
    weight: Tensor,
    gradient: Tensor,
    fisher: Tensor | float,
    *,
    rate: float,
    noise: float,
    damping: float,
    normal: Tensor,
) -> Tensor:
    """The step up as the authors' code has it: `rate (d + noise z) / (1 + damping F)`, d as long as the weight.

    Args:
        weight: the tensor, whose norm d takes; one of zeros does not move but for the noise.
        gradient: of the cross-entropy of the current batch alone.
        fisher: F, zero until the first task ends.
        rate: 1e-5 there.
        noise: 1e-3 there.
        damping: 1e-3 there.
        normal: z, standard normal, of the weight's shape.
    """
    direction = weight.norm() / (gradient.norm() + 1e-20) * gradient
    return rate * (direction + noise * normal) / (1.0 + damping * torch.as_tensor(fisher, dtype=gradient.dtype))


class Refresh(torch.optim.Optimizer):
    """An optimizer whose every n-th step is taken from where the batch was unlearnt.

    Args:
        inner: what takes the step down; its groups, state and rates are this one's.
        up: `(weight, gradient, fisher, normal) -> step`, added to each weight.
        every: steps of which one begins with unlearning.
        times: steps up before it.
        fisher: by parameter; asked for at each step. Parameters that it has not count as 0.
        buffers: of the model, such as running statistics: what unlearning does to them is undone.
        focus: entered while the gradient to go up is taken, to let some terms count alone.
        seed: of the noise.
    """

    def __init__(
        self,
        inner: torch.optim.Optimizer,
        up: Callable[[Tensor, Tensor, Tensor | float, Tensor], Tensor],
        *,
        every: int,
        times: int = 1,
        fisher: Callable[[], Mapping[nn.Parameter, Tensor]] = dict,
        buffers: Sequence[Tensor] = (),
        focus: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext,
        seed: int = 0,
    ) -> None:
        # Nothing of the base class is set up: it is there for isinstance, and all else is the inner one's.
        self.inner, self.up, self.every, self.times = inner, up, every, times
        self.fisher, self.buffers, self.focus = fisher, list(buffers), focus
        self.done, self.dice = 0, torch.Generator().manual_seed(seed)

    @property
    def param_groups(self) -> list[dict[str, Any]]:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Those of the optimizer that is wrapped."""
        return self.inner.param_groups

    @property
    def state(self) -> Any:  # pyright: ignore[reportIncompatibleVariableOverride]
        """That of the optimizer that is wrapped."""
        return self.inner.state

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.inner.zero_grad(set_to_none)

    def step(self, closure: Callable[[], Any]) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Up, if this is a step for it, then down."""
        if self.done % self.every == 0:
            for _ in range(self.times):
                self._unlearn(closure)
        self.done += 1
        return self.inner.step(closure)

    def _unlearn(self, closure: Callable[[], Any]) -> None:
        with _as_before(self.buffers), torch.random.fork_rng(devices=[]), self.focus():
            closure()
        known = self.fisher()
        with torch.no_grad():
            for parameter in (p for group in self.param_groups for p in group["params"] if p.grad is not None):
                normal = torch.randn(parameter.shape, generator=self.dice).to(parameter)
                parameter += self.up(parameter, parameter.grad, known.get(parameter, 0.0), normal)

    def state_dict(self) -> dict[str, Any]:
        return {**self.inner.state_dict(), "refresh": {"done": self.done, "dice": self.dice.get_state()}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        own = state_dict["refresh"]
        self.done = own["done"]
        self.dice.set_state(own["dice"])
        self.inner.load_state_dict({name: value for name, value in state_dict.items() if name != "refresh"})


@contextlib.contextmanager
def _as_before(buffers: Sequence[Tensor]) -> Iterator[None]:
    """Tensors have their values again at the end."""
    kept = [buffer.clone() for buffer in buffers]
    yield
    with torch.no_grad():
        for buffer, before in zip(buffers, kept, strict=True):
            buffer.copy_(before)
