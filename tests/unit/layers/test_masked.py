from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from overhaul.layers.masked import MaskedLinear, pack_bits, unpack_bits


@pytest.mark.parametrize("shape", [(4, 8), (3, 5), (1, 1), (7, 16)])
def test_bits_are_packed_as_numpy_packs_them(shape: tuple[int, int]) -> None:
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(0)) > 0.5
    packed = pack_bits(mask)
    assert packed.numpy().tolist() == np.packbits(mask.numpy()).tolist()
    assert torch.equal(unpack_bits(packed, shape), mask)


def test_a_kept_weight_may_be_zero_and_a_pruned_one_must_be() -> None:
    linear = nn.Linear(3, 2)
    with torch.no_grad():
        linear.weight.copy_(torch.tensor([[0.0, 1.0, -2.0], [3.0, -0.5, 4.0]]))
    mask = torch.tensor([[True, True, False], [False, True, True]])

    layer = MaskedLinear.from_linear(linear, mask)

    assert layer.weight.tolist() == [[0.0, 1.0, 0.0], [0.0, -0.5, 4.0]]
    assert torch.equal(layer.mask, mask)
    assert layer.num_pruned == 2
    with torch.no_grad():
        layer.weight += 1
    layer.enforce()
    assert layer.weight.tolist() == [[1.0, 2.0, 0.0], [0.0, 0.5, 5.0]]
    assert not torch.signbit(layer.weight[~mask]).any(), "a pruned weight is +0, not -0"


def test_parameters_are_taken_over_and_the_state_dict_is_stock() -> None:
    linear = nn.Linear(3, 2)
    layer = MaskedLinear.from_linear(linear, torch.ones(2, 3, dtype=torch.bool))
    assert layer.weight is linear.weight
    assert layer.bias is linear.bias
    assert layer.state_dict().keys() == linear.state_dict().keys()
