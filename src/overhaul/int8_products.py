"""Products of int8 matrices with the kernels that torch has, the fastest on this machine chosen by measurement.

The clock decides only between kernels that give the same bits: every candidate is compared with a product that is exact
by construction before it may be chosen, so that a choice that differs from run to run changes no number.

    int_mm    `torch._int_mm`: integer instructions (AVX512-VNNI, AMX) where the processor has them, a plain loop if not
    onednn    `onednn.qlinear_pointwise`: the same with the first factor of the scale fused; without VNNI instructions
              it saturates, is found out by the comparison and left alone
    bf16      integers up to 256 are exact in bf16 and their products in fp32, where bf16 instructions add them
    fp32      the same in fp32; exact while sums stay below 2^24, hence in pieces of 1,024 inputs

`OVERHAUL_INT8_KERNEL` pins one of them. Letters of shapes: N tokens, I inputs, O outputs.
"""

from __future__ import annotations

import functools
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from overhaul.errors import UserError, did_you_mean

PIN = "OVERHAUL_INT8_KERNEL"
_LEAST_ROWS = 17
PIECE = 1024
"""Inputs whose products, at most 128 x 128, add up to no more than 2^24: exact in fp32."""
MEASURED_ROWS = (32, 128)
"""Fewer than 64 rows are measured as the first, more as the second: all kernels take time in proportion from there."""
HOPELESS = 4.0
"""A kernel that takes this many times as long as the best so far is not measured again."""


class Integers:
    """The integers (N, I) of a left operand, as fp32 and, from when a kernel asks for them, as int8."""

    __slots__ = ("_int8", "fp32_NI")

    def __init__(self, fp32_NI: Tensor) -> None:
        self.fp32_NI = fp32_NI
        self._int8: Tensor | None = None

    @property
    def as_int8(self) -> Tensor:
        """As int8; converted once."""
        if self._int8 is None:
            self._int8 = self.fp32_NI.to(torch.int8)
        return self._int8


Kernel = Callable[[Integers, Tensor, Tensor], Tensor]
"""`(integers_NI, weight_OI int8, step_O fp32) -> (sum over I) * step_O`, fp32 (N, O)."""


def scaled_product(integers_NI: Integers, weight_OI: Tensor, step_O: Tensor) -> Tensor:
    """x W^T in int32, rounded to fp32 and multiplied by the step of each output: fp32 (N, O)."""
    num_rows = len(integers_NI.fp32_NI)
    measured = MEASURED_ROWS[num_rows >= 64]
    pinned = os.environ.get(PIN, "")
    name = pinned or fastest(measured, *weight_OI.shape, weight_OI.device, torch.get_num_threads())
    if name not in KERNELS:
        raise UserError(f"{PIN}={name}", allowed=", ".join(KERNELS), hint=did_you_mean(name, KERNELS))
    return KERNELS[name](integers_NI, weight_OI, step_O)


@functools.cache
def fastest(num_rows: int, num_outputs: int, num_inputs: int, device: torch.device, _threads: int) -> str:
    """The name of the kernel that multiplies matrices of this shape in the least time, of those that are exact."""
    draw = torch.Generator().manual_seed(0)
    rows_NI = torch.randint(-128, 128, (num_rows, num_inputs), generator=draw).float()
    weight_OI = torch.randint(-128, 128, (num_outputs, num_inputs), generator=draw).to(torch.int8)
    rows_NI[0], weight_OI[0] = 127, 127  # a sum that saturating instructions get wrong
    rows_NI, weight_OI, step_O = rows_NI.to(device), weight_OI.to(device), torch.rand(num_outputs).to(device)
    exact_NO = fp32(Integers(rows_NI), weight_OI, step_O)
    best = {"fp32": _seconds(fp32, rows_NI, weight_OI, step_O)}
    for name, kernel in KERNELS.items():
        if name != "fp32" and _is_exact(kernel, Integers(rows_NI), weight_OI, step_O, exact_NO):
            best[name] = _seconds(kernel, rows_NI, weight_OI, step_O, hopeless=HOPELESS * min(best.values()))
    return min(best, key=lambda name: best[name])


def slowdown(num_outputs: int, num_inputs: int, device: torch.device) -> tuple[str, float]:
    """The fastest kernel for many rows, and its time over that of an fp32 product of the same shape."""
    num_rows = MEASURED_ROWS[-1]
    name = fastest(num_rows, num_outputs, num_inputs, device, torch.get_num_threads())
    rows_NI, weight_OI = torch.ones(num_rows, num_inputs, device=device), torch.ones(num_outputs, num_inputs)
    weight_OI, step_O = weight_OI.to(device), torch.ones(num_outputs, device=device)
    plain = _seconds(lambda rows, weight_OI, _: rows.fp32_NI @ weight_OI.t(), rows_NI, weight_OI, step_O)
    return name, _seconds(KERNELS[name], rows_NI, weight_OI.to(torch.int8), step_O) / plain


def _is_exact(kernel: Kernel, rows_NI: Integers, weight_OI: Tensor, step_O: Tensor, exact_NO: Tensor) -> bool:
    try:
        return torch.equal(kernel(rows_NI, weight_OI, step_O), exact_NO)
    except (RuntimeError, AttributeError):  # an operation that this build or this device does not have
        return False


def _seconds(
    kernel: Kernel, rows_NI: Tensor, weight_OI: Tensor, step_O: Tensor, *, hopeless: float = float("inf")
) -> float:
    """The best of a few runs, the conversion of the rows among them."""
    best = float("inf")
    for _ in range(4):
        began = time.perf_counter()
        kernel(Integers(rows_NI), weight_OI, step_O)
        if rows_NI.is_cuda:
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - began)
        if best > hopeless:
            break
    return best


def int_mm(integers_NI: Integers, weight_OI: Tensor, step_O: Tensor) -> Tensor:
    """With `torch._int_mm`; on CUDA it takes no fewer than 17 rows, so fewer are filled up."""
    q_NI = integers_NI.as_int8
    num_rows = len(q_NI)
    if q_NI.is_cuda and num_rows < _LEAST_ROWS:
        q_NI = F.pad(q_NI, (0, 0, 0, _LEAST_ROWS - num_rows))
    return torch.mul(torch.ops.aten._int_mm(q_NI, weight_OI.t())[:num_rows], step_O)


def onednn(integers_NI: Integers, weight_OI: Tensor, step_O: Tensor) -> Tensor:
    """With oneDNN's quantized linear layer; the weight is laid out anew in every call, for a copy would double it."""
    operations = torch.ops.onednn
    packed = operations.qlinear_prepack(weight_OI, None)
    zeros_O = torch.zeros(len(step_O), dtype=torch.int64)
    return operations.qlinear_pointwise(
        integers_NI.as_int8, 1.0, 0, packed, step_O, zeros_O, None, 1.0, 0, torch.float32, "none", [], ""
    )


def fp32(integers_NI: Integers, weight_OI: Tensor, step_O: Tensor) -> Tensor:
    """With fp32 products of whole numbers, in pieces that cannot lose a bit."""
    pieces = zip(integers_NI.fp32_NI.split(PIECE, 1), weight_OI.split(PIECE, 1), strict=True)
    # Autocast would round the sums, not only the operands.
    with torch.autocast(weight_OI.device.type, enabled=False):
        sums = [rows_NP @ weight_OP.float().t() for rows_NP, weight_OP in pieces]
    if len(sums) == 1:
        return sums[0].mul_(step_O)
    return torch.mul(torch.stack([sum_NO.int() for sum_NO in sums]).sum(0, dtype=torch.int32), step_O)


def bf16(integers_NI: Integers, weight_OI: Tensor, step_O: Tensor) -> Tensor:
    """As `fp32`, with operands that bf16 instructions may round: whole numbers up to 256 stay what they are."""
    if not torch.cpu._is_avx512_bf16_supported():
        raise RuntimeError("no bf16 instructions")
    with _bf16_operands():
        return fp32(integers_NI, weight_OI, step_O)


@contextmanager
def _bf16_operands() -> Iterator[None]:
    settings = torch.backends.mkldnn.matmul  # pyright: ignore[reportAttributeAccessIssue]
    before = settings.fp32_precision
    settings.fp32_precision = "bf16"
    try:
        yield
    finally:
        settings.fp32_precision = before


KERNELS: dict[str, Kernel] = {"int_mm": int_mm, "onednn": onednn, "bf16": bf16, "fp32": fp32}
