"""Causal attention by chunks: torch's own result and gradients."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812
from transformers import AutoModelForCausalLM
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from overhaul.interop.fused import fused
from overhaul.layers.attention import CHUNK_TOKENS, causal_attention


@pytest.mark.parametrize("num_tokens", [1, 5, CHUNK_TOKENS, CHUNK_TOKENS + 3])
@pytest.mark.parametrize(("heads", "shared"), [(4, 4), (6, 2), (3, 1)])
def test_output_and_gradients_are_torch_s(num_tokens: int, heads: int, shared: int):
    q, k, v = (torch.randn(2, count, num_tokens, 8, requires_grad=True) for count in (heads, shared, shared))
    grad_BTHD = torch.randn(2, num_tokens, heads, 8)

    def output_and_gradients(out_BTHD: Tensor) -> list[Tensor]:
        return [out_BTHD.detach(), *torch.autograd.grad(out_BTHD, (q, k, v), grad_BTHD)]

    own = output_and_gradients(causal_attention(q, k, v, 0.3))
    torchs = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.3, enable_gqa=True)

    for one, other in zip(own, output_and_gradients(torchs.transpose(1, 2)), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_no_token_sees_a_later_one():
    q, k, v = (torch.randn(1, 1, 6, 4) for _ in range(3))
    changed = v.clone()
    changed[:, :, 4:] = 100.0

    before, after = causal_attention(q, k, v, 1.0), causal_attention(q, k, changed, 1.0)

    assert torch.equal(before[:, :4], after[:, :4])
    assert not torch.equal(before[:, 4], after[:, 4])


def test_a_padded_batch_keeps_its_mask(tiny: Path):
    model = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.bfloat16)
    ids_BT, mask_BT = torch.arange(10).view(1, 10), torch.tensor([[0] * 4 + [1] * 6])

    own = model(ids_BT, attention_mask=mask_BT).logits
    with fused(model):
        inside = model(ids_BT, attention_mask=mask_BT).logits
        plain = model(ids_BT).logits

    torch.testing.assert_close(inside[:, 4:], own[:, 4:], rtol=0.05, atol=0.05)
    assert (plain[:, 4:] - own[:, 4:]).abs().max() > 0.1


def test_afterwards_attention_is_transformers_again(tiny: Path):
    model = AutoModelForCausalLM.from_pretrained(tiny)

    before = ALL_ATTENTION_FUNCTIONS["sdpa"]

    with fused(model), fused(model):
        assert ALL_ATTENTION_FUNCTIONS["sdpa"] is not before

    assert ALL_ATTENTION_FUNCTIONS["sdpa"] is before
