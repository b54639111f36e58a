"""RMSNorm in one node: the model's own result and gradients, and only where the model's own is that formula."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from overhaul.interop.fused import fused
from overhaul.layers.rms_norm import rms_norm


def test_by_hand():
    x = torch.tensor([[3.0, 4.0]])  # mean square 12.5

    y = rms_norm(x, torch.tensor([1.0, 10.0]), 0.0, torch.float32)

    torch.testing.assert_close(y, torch.tensor([[3.0, 40.0]]) / 12.5**0.5)


def test_gradients_are_those_of_finite_differences():
    x = torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True)
    weight_D = torch.randn(5, dtype=torch.float64, requires_grad=True)

    assert torch.autograd.gradcheck(lambda x, w: rms_norm(x, w, 1e-5, torch.float64), (x, weight_D))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_computes_and_learns_the_same(tiny: Path, dtype: torch.dtype):
    model = AutoModelForCausalLM.from_pretrained(tiny)
    ids_BT = torch.arange(40).view(2, 20)

    def loss_and_gradients() -> list[torch.Tensor]:
        model.zero_grad()
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            loss = model(ids_BT, labels=ids_BT).loss
        loss.backward()
        return [loss.detach(), *(p.grad.clone() for p in model.parameters())]

    own = loss_and_gradients()
    with fused(model):
        in_one_node = loss_and_gradients()

    for one, other in zip(own, in_one_node, strict=True):
        error = (one - other).norm() / one.norm()
        assert error < (1e-5 if dtype == torch.float32 else 2e-2)


def test_under_autocast_the_result_is_what_linear_layers_read():
    norm = LlamaRMSNorm(8)

    with fused(norm), torch.autocast("cpu", torch.bfloat16):
        assert norm(torch.randn(2, 8)).dtype == torch.bfloat16


@pytest.mark.parametrize("norm", [GemmaRMSNorm(8), nn.LayerNorm(8)])
def test_other_norms_stay_as_they_are(norm: nn.Module):
    with torch.no_grad():
        norm.weight.normal_()
    x = torch.randn(2, 8)
    own = norm(x)

    with fused(norm):
        assert torch.equal(norm(x), own)


def test_afterwards_the_forward_is_the_class_s_own():
    norm = LlamaRMSNorm(8)

    with fused(norm):
        assert "forward" in vars(norm)

    assert "forward" not in vars(norm)
