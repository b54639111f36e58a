"""Statistics of what flows into linear layers: channel norms, Hessians, largest magnitudes.

Letters of shapes: B windows in a batch, T tokens in a window, N tokens, I input features.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Literal

import torch
from torch import Tensor, nn

from overhaul.errors import UserError

Statistic = Literal["input_norm", "hessian", "absmax"]
"""2-norm of each input (I,); `2/N sum x x^T` (I, I); largest magnitude of each input (I,)."""


class StopForward(BaseException):
    """Everything needed from this forward pass has been seen; `except Exception` lets it through."""


class _Sums:
    """Running statistics of the inputs of a block's linear layers, one for all that read the same tensor.

    That two layers read the same tensor is a property of the block's code, so the first pass decides it. The
    tensor seen last is held, hence `is` cannot be fooled by a freed tensor's reused address.
    """

    def __init__(self, kind: Statistic) -> None:
        self.kind: Statistic = kind
        self.sums: dict[str, Tensor] = {}
        self.counts: dict[str, int] = {}
        self.leader: dict[str, str] = {}
        self.finished: dict[str, Tensor] = {}
        self.last_input: Tensor | None = None
        self.last_name = ""

    def see(self, name: str, x: Tensor, real_BT: Tensor | None) -> None:
        """Adds the input of the layer `name`."""
        if name not in self.leader:
            self.leader[name] = self.leader[self.last_name] if x is self.last_input else name
        self.last_input, self.last_name = x, name
        if self.leader[name] != name:
            return
        x_NI = _rows(x, real_BT)
        self.counts[name] = self.counts.get(name, 0) + len(x_NI)
        if name not in self.sums:
            width = x_NI.shape[1]
            shape = (width, width) if self.kind == "hessian" else (width,)
            self.sums[name] = torch.zeros(shape, dtype=torch.float32, device=x.device)
        if len(x_NI):
            _ADD[self.kind](self.sums[name], x_NI)

    def result(self, name: str) -> Tensor:
        """The statistic of the layer `name`, shared with the other readers of its input."""
        leader = self.leader.get(name)
        if leader is None or self.counts[leader] == 0:
            raise UserError(
                f"no calibration token reaches {name}, so nothing is known about its inputs",
                hint="more or more varied calibration data: --samples, --data",
            )
        if leader not in self.finished:
            self.finished[leader] = _finish(self.kind, self.sums.pop(leader), self.counts[leader])
            if not self.finished[leader].isfinite().all():
                raise UserError(f"the inputs of {name} contain NaN or infinity", hint="--dtype float32")
        return self.finished[leader]


@torch.no_grad()
def collect(
    linears: Mapping[str, nn.Linear],
    passes: Iterable[tuple[Callable[[], object], Tensor | None]],
    kind: Statistic,
) -> dict[str, Tensor]:
    """One statistic of the inputs of each layer, over all passes, in fp32.

    A pass is left as soon as it has reached every layer once: the last product, often the largest, is spared.

    Args:
        linears: layers by name.
        passes: a function that runs the layers, and which of its tokens (B, T) are real, None for all.
        kind: which statistic.

    Returns:
        Name -> statistic. Layers that read the same tensor share one object.
    """
    sums = _Sums(kind)
    waiting: set[str] = set()
    real_BT: Tensor | None = None

    def before(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def see(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            sums.see(name, args[0], real_BT)
            waiting.discard(name)
            if not waiting:
                raise StopForward

        return see

    handles = [linear.register_forward_pre_hook(before(name)) for name, linear in linears.items()]
    try:
        for run, real_BT in passes:  # noqa: B007 the hooks read it
            waiting.update(linears)
            with suppress(StopForward):
                run()
            sums.last_input = None
    finally:
        for handle in handles:
            handle.remove()
    return {name: sums.result(name) for name in linears}


def _rows(x: Tensor, real_BT: Tensor | None) -> Tensor:
    """The tokens (N, I) of a layer's input, without padding where the layout still shows which they are.

    A mixture's expert gets a selection of tokens whose origin is lost: there padding cannot be told apart.
    """
    x_NI = x.flatten(0, -2)
    return x_NI if real_BT is None or len(x_NI) != real_BT.numel() else x_NI[real_BT.flatten()]


def _add_squares(sum_I: Tensor, x_NI: Tensor) -> None:
    # Small pieces stay in the cache between the conversion, the square and the sum.
    for piece_NI in x_NI.split(128):
        sum_I += piece_NI.float().square().sum(dim=0)


def _add_products(sum_II: Tensor, x_NI: Tensor) -> None:
    """Adds the upper triangle of `x^T x`, in block rows; what is below the diagonal blocks stays 0."""
    with _exact_bf16_products(x_NI.dtype):
        x_NI = x_NI.float()
        for start in range(0, x_NI.shape[1], 384):
            rows = slice(start, start + 384)
            sum_II[rows, start:].addmm_(x_NI[:, rows].T, x_NI[:, start:])


def _add_absmax(sum_I: Tensor, x_NI: Tensor) -> None:
    torch.maximum(sum_I, x_NI.abs().amax(dim=0).float(), out=sum_I)


_ADD: Mapping[Statistic, Callable[[Tensor, Tensor], None]] = {
    "input_norm": _add_squares,
    "hessian": _add_products,
    "absmax": _add_absmax,
}


def _finish(kind: Statistic, total: Tensor, count: int) -> Tensor:
    if kind == "input_norm":
        return total.sqrt_()
    if kind == "hessian":
        upper_II = total.triu_().mul_(2 / count)
        return upper_II + upper_II.triu(1).T
    return total


@contextmanager
def _exact_bf16_products(dtype: torch.dtype) -> Iterator[None]:
    """Lets fp32 products round their operands to bf16 where that changes nothing: they are bf16 values.

    The sums stay fp32; on processors with bf16 instructions this is up to three times as fast.
    """
    settings = torch.backends.mkldnn.matmul  # pyright: ignore[reportAttributeAccessIssue]
    before = settings.fp32_precision
    if dtype == torch.bfloat16:
        settings.fp32_precision = "bf16"
    try:
        yield
    finally:
        settings.fp32_precision = before
