"""Channels of a linear layer mapped once more: the identity at first, then a loop over time, and never ahead."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from overhaul.layers.channel_mapped import ChannelMapped, Reading


def layer(kernel: int, *, bias: bool = True) -> ChannelMapped:
    torch.manual_seed(0)
    return ChannelMapped(nn.Linear(5, 6, bias=bias).double(), Reading(), kernel=kernel)


def filled(made: ChannelMapped) -> ChannelMapped:
    made.kernel.data.normal_()
    return made


@pytest.mark.parametrize("kernel", [1, 2, 3, 4])
def test_it_begins_as_the_linear_layer_to_the_bit(kernel: int):
    x = torch.randn(2, 7, 5, dtype=torch.float64)
    assert torch.equal(layer(kernel)(x), layer(kernel).linear(x))


@pytest.mark.parametrize("kernel", [1, 2, 3, 9])
def test_it_is_a_loop_over_channels_and_tokens(kernel: int):
    made, x = filled(layer(kernel)), torch.randn(2, 7, 5, dtype=torch.float64)
    y = made.linear(x)
    by_hand = torch.zeros_like(y)
    for t in range(7):
        for j in range(kernel):
            if (source := t - (kernel - 1) + j) >= 0:
                by_hand[:, t] += made.kernel[:, j] * y[:, source]

    assert torch.allclose(made(x), by_hand, atol=1e-12)


def test_a_later_token_changes_nothing_before_it():
    made, x = filled(layer(3)), torch.randn(1, 7, 5, dtype=torch.float64)
    other = x.clone()
    other[0, 4] += 1

    assert torch.equal(made(x)[:, :4], made(other)[:, :4])
    assert not torch.allclose(made(x)[:, 4:7], made(other)[:, 4:7])


def test_what_a_text_was_filled_up_with_counts_as_nothing():
    made, x = filled(layer(3)), torch.randn(1, 4, 5, dtype=torch.float64)
    alone = made(x)
    made.reading.mask_BT = torch.tensor([[0, 0, 1, 1, 1, 1]])
    together = made(torch.cat([torch.randn(1, 2, 5, dtype=torch.float64), x], dim=1))

    assert torch.allclose(together[:, 2:], alone, atol=1e-12)


@pytest.mark.parametrize("bias", [True, False])
def test_factors_merge_and_kernels_do_not(bias: bool):
    made, x = filled(layer(1, bias=bias)), torch.randn(3, 7, 5, dtype=torch.float64)
    merged = made.merge()

    assert type(merged) is nn.Linear
    assert torch.allclose(merged(x), made(x), atol=1e-12)
    assert (merged.bias is not None) == bias
    with pytest.raises(ValueError, match="no linear map of one"):
        layer(2).merge()
    with pytest.raises(ValueError, match="a kernel over 0 tokens"):
        layer(0)
