"""A convolution with kernels behind it: the identity at first, and then what is written out by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.functional import conv2d

from overhaul.layers.reprogrammed import Reprogrammed

CONVOLUTIONS: dict[str, dict[str, Any]] = {
    "plain": {"kernel_size": 3, "padding": 1},
    "strided": {"kernel_size": 7, "stride": 2, "padding": 3},
    "dilated": {"kernel_size": 3, "padding": 2, "dilation": 2},
    "grouped": {"kernel_size": 3, "padding": 1, "groups": 2},
    "without padding": {"kernel_size": 3},
    "one pixel": {"kernel_size": 1, "stride": 2, "bias": False},
}


def convolution(name: str) -> nn.Conv2d:
    torch.manual_seed(0)
    return nn.Conv2d(4, 6, **CONVOLUTIONS[name]).double()


def filled(layer: Reprogrammed) -> Reprogrammed:
    for parameter in layer.begin():
        getattr(layer, parameter).data.normal_()
    return layer


@pytest.mark.parametrize("form", ["behind", "residual", "parallel"])
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_it_begins_as_the_convolution(name: str, form: Any):
    x = torch.randn(2, 4, 9, 9, dtype=torch.float64)
    inner = convolution(name)

    assert torch.allclose(Reprogrammed(inner, form=form)(x), inner(x), atol=1e-12)


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_each_channel_is_convolved_with_its_own_kernel(name: str):
    x = torch.randn(2, 4, 9, 9, dtype=torch.float64)
    layer, inner = filled(Reprogrammed(convolution(name))), convolution(name)
    made = inner(x)
    by_hand = torch.stack(
        [conv2d(made[:, k : k + 1], layer.kernel[k : k + 1], padding=1)[:, 0] for k in range(6)], dim=1
    )

    assert torch.allclose(layer(x), by_hand, atol=1e-12)


def test_inside_the_border_it_is_one_convolution_with_a_wider_kernel():
    x = torch.randn(1, 4, 12, 12, dtype=torch.float64)
    inner = convolution("plain")
    layer = filled(Reprogrammed(inner))
    # Two convolutions in a row are one with the kernels convolved; torch's conv2d is a correlation, hence the flip.
    padded = nn.functional.pad(inner.weight, (2, 2, 2, 2)).transpose(0, 1)
    merged = conv2d(padded, layer.kernel.flip(-1, -2), groups=6).transpose(0, 1)
    bias = inner.bias * layer.kernel.sum(dim=(1, 2, 3))
    once = conv2d(x, merged, bias, padding=2)

    assert torch.allclose(layer(x)[..., 2:-2, 2:-2], once[..., 2:-2, 2:-2], atol=1e-10)


@pytest.mark.parametrize("name", ["plain", "strided", "one pixel"])
def test_residual_and_parallel_forms(name: str):
    x = torch.randn(2, 4, 9, 9, dtype=torch.float64)
    inner = convolution(name)
    residual, parallel = (filled(Reprogrammed(inner, form=form)) for form in ("residual", "parallel"))
    made = inner(x)
    again = conv2d(made, residual.kernel, padding=1, groups=6)

    assert torch.allclose(residual(x), made + residual.scale[None, :, None, None] * again, atol=1e-12)
    beside = conv2d(x, parallel.point, stride=inner.stride)
    assert torch.allclose(parallel(x), made + beside, atol=1e-12)
