"""Kernels for int8 products: exact or not chosen."""

from __future__ import annotations

import pytest
import torch

from overhaul import int8_products
from overhaul.errors import UserError
from overhaul.int8_products import Integers, scaled_product

CPU = torch.device("cpu")


def operands(rows: int, inputs: int, outputs: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(0)
    x_NI = torch.randint(-128, 128, (rows, inputs), generator=draw).float()
    weight_OI = torch.randint(-128, 128, (outputs, inputs), generator=draw).to(torch.int8)
    x_NI[0], weight_OI[0] = -128, -128
    return x_NI, weight_OI, torch.rand(outputs, generator=draw)


@pytest.mark.parametrize("name", ["int_mm", "fp32"])
@pytest.mark.parametrize("shape", [(9, 1, 1), (17, 65, 7), (3, 1024, 5), (33, 2050, 3)])
def test_the_sums_are_exact_for_any_shape(name: str, shape: tuple[int, int, int]):
    x_NI, weight_OI, step_O = operands(*shape)

    found = int8_products.KERNELS[name](Integers(x_NI), weight_OI, step_O)

    exact = (x_NI.long() @ weight_OI.long().T).float() * step_O
    assert torch.equal(found, exact)


def test_whatever_is_chosen_gives_the_same_bits():
    x_NI, weight_OI, step_O = operands(40, 96, 24)

    assert torch.equal(
        scaled_product(Integers(x_NI), weight_OI, step_O), int8_products.fp32(Integers(x_NI), weight_OI, step_O)
    )


def test_a_kernel_that_saturates_or_fails_is_never_chosen(monkeypatch: pytest.MonkeyPatch):
    def saturating(integers_NI: Integers, weight_OI: torch.Tensor, step_O: torch.Tensor) -> torch.Tensor:
        return (integers_NI.fp32_NI @ weight_OI.float().T).clamp(max=2.0**15) * step_O

    def absent(*_: object) -> torch.Tensor:
        raise AttributeError("no such operation")

    kernels = {"saturating": saturating, "absent": absent, "fp32": int8_products.fp32}
    monkeypatch.setattr(int8_products, "KERNELS", kernels)
    monkeypatch.setattr(int8_products, "_seconds", lambda kernel, *_, **__: 1.0 if kernel is kernels["fp32"] else 0.0)

    assert int8_products.fastest.__wrapped__(32, 8, 64, CPU, 1) == "fp32"


def test_the_faster_of_two_exact_kernels_is_chosen(monkeypatch: pytest.MonkeyPatch):
    seconds = {int8_products.fp32: 2.0, int8_products.int_mm: 1.0}
    monkeypatch.setattr(int8_products, "_seconds", lambda kernel, *_, **__: seconds.get(kernel, 9.0))

    assert int8_products.fastest.__wrapped__(32, 8, 64, CPU, 1) == "int_mm"


def test_a_kernel_can_be_pinned_by_its_name(monkeypatch: pytest.MonkeyPatch):
    x_NI, weight_OI, step_O = operands(9, 16, 4)
    monkeypatch.setenv(int8_products.PIN, "int_mm")
    monkeypatch.setattr(int8_products, "fastest", lambda *_: pytest.fail("measured"))
    scaled_product(Integers(x_NI), weight_OI, step_O)

    monkeypatch.setenv(int8_products.PIN, "int_nm")
    with pytest.raises(UserError, match=r"int_nm[\s\S]*int_mm"):
        scaled_product(Integers(x_NI), weight_OI, step_O)


def test_how_many_times_as_long_as_fp32():
    name, ratio = int8_products.slowdown(16, 32, CPU)

    assert name in int8_products.KERNELS
    assert ratio > 0
