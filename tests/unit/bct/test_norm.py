from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from overhaul.bct.blocks import integers, power_of_two, snap
from overhaul.bct.norm import layer_norm, rms_norm

EPSILON = 1e-5


def hidden(width: int, columns: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    x_ND = torch.randn(32, width, generator=generator) * torch.logspace(-3, 3, 32)[:, None]
    x_ND[:, 3] *= 50  # as language models have it
    return snap(x_ND, columns)


def half_step(y: Tensor, columns: int) -> Tensor:
    """The largest error of rounding, for each element, where `y` is the result."""
    _, shift = integers(y, columns)
    value, _ = integers(y, columns)
    step = power_of_two(-shift).expand(value.shape).flatten(-2)
    return step[..., : y.shape[-1]] / 2


@pytest.mark.parametrize(("width", "columns"), [(64, 16), (64, 64), (72, 16), (20, 7)])
def test_rms_norm_is_torchs_in_fp64_within_half_a_step(width, columns):
    x_ND = hidden(width, columns)
    weight_D = snap(torch.randn(width, generator=torch.Generator().manual_seed(1)), columns)

    y_ND = rms_norm(x_ND, weight_D, EPSILON, columns)

    exact_ND = F.rms_norm(x_ND.double(), (width,), weight_D.double(), EPSILON)
    # Rounding to the grid, and three roundings of fp32 before it.
    assert ((y_ND - exact_ND).abs() <= half_step(y_ND, columns) * (1 + 2**-14) + exact_ND.abs() * 2**-22).all()


@pytest.mark.parametrize(("width", "columns"), [(64, 16), (72, 16)])
def test_layer_norm_is_torchs_in_fp64_within_half_a_step(width, columns):
    x_ND = hidden(width, columns) + 0.0
    x_ND = snap(x_ND + 2 * x_ND.abs().amax(-1, keepdim=True), columns)
    generator = torch.Generator().manual_seed(1)
    weight_D, bias_D = (snap(torch.randn(width, generator=generator), columns) for _ in range(2))

    y_ND = layer_norm(x_ND, weight_D, bias_D, EPSILON, columns)

    exact_ND = F.layer_norm(x_ND.double(), (width,), weight_D.double(), bias_D.double(), EPSILON)
    slack_ND = (exact_ND.abs() + bias_D.abs() + 1) * 2**-21
    assert ((y_ND - exact_ND).abs() <= half_step(y_ND, columns) * (1 + 2**-14) + slack_ND).all()


def test_weights_are_rounded_to_8_bits():
    x_ND, weight_D = hidden(64, 16), torch.linspace(0.5, 1.5, 64)

    assert torch.equal(rms_norm(x_ND, weight_D, EPSILON, 16), rms_norm(x_ND, snap(weight_D, 16), EPSILON, 16))


def test_a_row_of_zeros_stays_zero():
    assert (rms_norm(torch.zeros(2, 32), torch.ones(32), EPSILON, 16) == 0).all()
