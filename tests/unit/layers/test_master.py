"""Linear layers with fp32 masters: autocast's results, without its copies of the weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from transformers import AutoModelForCausalLM

from overhaul.interop.fused import fused
from overhaul.layers.master import master_linear


@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16])
def test_results_and_gradients_are_autocast_s_bit_for_bit(with_bias: bool, x_dtype: torch.dtype):
    x = torch.randn(2, 5, 8, dtype=x_dtype, requires_grad=True)
    weight_OI = torch.randn(6, 8, requires_grad=True)
    bias_O = torch.randn(6, requires_grad=True) if with_bias else None
    grad = torch.randn(2, 5, 6, dtype=torch.bfloat16)

    def output_and_gradients(y: Tensor) -> list[Tensor]:
        inputs = [tensor for tensor in (x, weight_OI, bias_O) if tensor is not None]
        return [y.detach(), *torch.autograd.grad(y, inputs, grad)]

    with torch.autocast("cpu", torch.bfloat16):
        autocast = output_and_gradients(F.linear(x, weight_OI, bias_O))
    own = output_and_gradients(master_linear(x, weight_OI, bias_O, torch.bfloat16))

    for one, other in zip(own[:3], autocast[:3], strict=True):
        assert one.dtype == other.dtype
        assert torch.equal(one, other)
    if with_bias:  # summed in fp32 here, in bf16 there
        torch.testing.assert_close(own[3], autocast[3], rtol=0.02, atol=0.02)


def test_no_narrow_copy_of_a_weight_waits_for_the_backward_pass(tiny: Path):
    model = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)
    ids_BT = torch.arange(12).view(1, 12)
    weights = {tuple(m.weight.shape) for m in model.model.layers.modules() if isinstance(m, nn.Linear)}

    def narrow_weights() -> int:
        kept: list[Tensor] = []
        hooks = torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x)
        with hooks, torch.autocast("cpu", torch.bfloat16):
            model(ids_BT, labels=ids_BT)
        both_ways = weights | {shape[::-1] for shape in weights}
        return sum(x.dtype == torch.bfloat16 and tuple(x.shape) in both_ways for x in kept)

    plain = narrow_weights()
    with fused(model):
        assert narrow_weights() < plain


def test_a_frozen_weight_goes_the_usual_way():
    linear = nn.Linear(4, 3).to(torch.bfloat16).requires_grad_(False)
    x = torch.randn(2, 4, dtype=torch.bfloat16)
    own = linear(x)

    with fused(linear), torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(linear(x), own)


def test_an_inner_fused_leaves_the_outer_one_s_changes():
    model = nn.Sequential(nn.Linear(4, 4))

    with fused(model):
        with fused(model[0]):
            pass
        assert "forward" in vars(model[0])
    assert "forward" not in vars(model[0])
