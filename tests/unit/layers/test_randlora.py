"""RandLoRA against its formula, against peft, in every path of its forward and backward."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from peft import RandLoraConfig, get_peft_model
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from overhaul.int8 import Kind
from overhaul.layers import adapters_off
from overhaul.layers.int8 import Int8Linear
from overhaul.layers.masked import MaskedLinear
from overhaul.layers.randlora import RandLoRALinear, randlora_linear, scaled_bases
from overhaul.random_bases import RandLoRABases

WIDE, TALL, SQUARE = (12, 8), (8, 12), (8, 8)
FEW, MANY = 3, 200
"""Tokens for which the bases are applied one after the other, and for which W + dW is made."""


def linear(shape: tuple[int, int], *, bias: bool = True) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(shape[1], shape[0], bias=bias)


def trained(base: Any, rank: int = 3, **how: Any) -> RandLoRALinear:
    """An adapter in the middle of training."""
    bases = RandLoRABases.draw([WIDE, TALL], rank, key=1)
    layer = RandLoRALinear.from_linear(base, bases, alpha=2.0 * rank, **({"paper": False} | how))
    torch.manual_seed(1)
    nn.init.normal_(layer.randlora_lambda)
    nn.init.normal_(layer.randlora_gamma)
    return layer


def formula(layer: RandLoRALinear) -> Tensor:
    """s * sum_n B_n diag(lambda_n) A diag(gamma_n), base by base."""
    A_Rd, B_DM = layer.bases.part(layer.out_features, layer.in_features)
    rank, num_bases = layer.randlora_lambda.shape
    total = torch.zeros(len(B_DM), A_Rd.shape[1])
    for n in range(num_bases):
        base_DR = torch.stack([B_DM[:, k * num_bases + n] for k in range(rank)], dim=1)
        total = total + base_DR @ layer.randlora_lambda[:, n].diag() @ A_Rd @ layer.randlora_gamma[n].diag()
    return layer.scale * (total if layer.in_features <= layer.out_features else total.t())


@pytest.mark.parametrize("shape", [WIDE, TALL, SQUARE])
@pytest.mark.parametrize("rank", [2, 3])
def test_the_increment_is_the_papers_sum(shape, rank):
    layer = trained(linear(shape), rank)

    torch.testing.assert_close(layer.increment(), formula(layer))


@pytest.mark.parametrize("shape", [(576, 576), (192, 576), (1536, 576), (576, 1536)])
def test_the_increment_has_full_rank(shape):
    bases = RandLoRABases.draw([shape], 32)
    layer = RandLoRALinear.from_linear(linear(shape), bases, 640.0, paper=False)
    nn.init.normal_(layer.randlora_lambda, generator=torch.Generator().manual_seed(0))
    nn.init.normal_(layer.randlora_gamma, generator=torch.Generator().manual_seed(1))
    A_Rd, B_DM = bases.part(*shape)

    # In double precision: the smallest of the singular values are below what fp32 resolves beside the largest.
    S_Md = scaled_bases(A_Rd.double(), layer.randlora_lambda.double(), layer.randlora_gamma.double(), layer.scale)

    assert torch.linalg.matrix_rank(B_DM.double() @ S_Md) == min(shape)


@pytest.mark.parametrize("tokens", [FEW, MANY])
@pytest.mark.parametrize("shape", [WIDE, TALL, SQUARE])
def test_starts_as_its_base_bit_for_bit(shape, tokens):
    base, x = linear(shape), torch.randn(1, tokens, shape[1])

    layer = RandLoRALinear.from_linear(base, RandLoRABases.draw([shape], 3), 60.0, paper=False)

    assert layer.weight is base.weight
    assert torch.equal(layer(x), base(x))
    assert layer.randlora_gamma.unique().item() == pytest.approx(1 / max(3, min(shape)))
    layer(x).sum().backward()
    assert layer.randlora_lambda.grad is not None
    assert layer.randlora_lambda.grad.abs().sum() > 0
    assert layer.randlora_gamma.grad is not None
    assert layer.randlora_gamma.grad.abs().sum() == 0


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("tokens", [FEW, MANY])
@pytest.mark.parametrize("shape", [WIDE, TALL, SQUARE])
def test_outputs_and_gradients_are_the_formulas(shape, tokens, bias):
    layer = trained(linear(shape, bias=bias))
    x = torch.randn(2, tokens, shape[1]).requires_grad_()
    leaves = [x, layer.randlora_lambda, layer.randlora_gamma] + ([layer.bias] if bias else [])
    assert layer.weight is not None

    y, reference = layer(x), F.linear(x, layer.weight + formula(layer), layer.bias)

    torch.testing.assert_close(y, reference, rtol=1e-4, atol=1e-4)
    grad = torch.randn_like(y)
    torch.testing.assert_close(
        torch.autograd.grad(y, leaves, grad), torch.autograd.grad(reference, leaves, grad), rtol=1e-4, atol=1e-3
    )


@pytest.mark.parametrize("tokens", [1, 60])
@pytest.mark.parametrize(("out", "width"), [(12, 8), (8, 12)])
def test_the_gradient_is_the_numerical_one(out, width, tokens):
    torch.manual_seed(0)
    rank, small, large = 3, 8, 12
    fixed = [torch.randn(rank, small).double(), torch.randn(large, rank * 3).double()]
    x, weight = torch.randn(tokens, width).double().requires_grad_(), torch.randn(out, width).double()
    scales = [torch.randn(rank, 3).double().requires_grad_(), torch.randn(3, small).double().requires_grad_()]

    assert torch.autograd.gradcheck(
        lambda x, a, b: randlora_linear(x, weight, None, a, b, *fixed, 0.5), (x, *scales), fast_mode=True
    )


def test_nothing_of_the_size_of_a_weight_is_kept_for_the_backward_pass():
    layer, kept = trained(linear(WIDE)), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        layer(torch.randn(50, 8))

    theirs = {layer.weight.data_ptr(), layer.bases.A_Rd.data_ptr()}  # pyright: ignore[reportOptionalMemberAccess]
    made = [t for t in kept if t.data_ptr() not in theirs and t.numel() >= 12 * 8]
    # The part of the shared bank that this layer reads, which is not contiguous, and its inputs.
    assert sorted(tuple(t.shape) for t in made) == [(12, 9), (50, 8)]


@pytest.mark.parametrize("shape", [WIDE, TALL, SQUARE])
def test_peft_computes_the_same_increment_from_the_same_numbers(shape):
    model = nn.ModuleDict({"up": linear(WIDE), "down": linear(TALL), "one": linear(shape)})
    config = RandLoraConfig(r=3, randlora_alpha=30, target_modules=list(model), projection_prng_key=1)
    theirs: Any = get_peft_model(model, config).base_model.model["one"]  # pyright: ignore
    layer = trained(linear(shape))
    layer.scale = 10.0

    with torch.no_grad():
        theirs.randlora_lambda["default"].copy_(layer.randlora_lambda)
        theirs.randlora_gamma["default"].copy_(layer.randlora_gamma)
    change = theirs.get_delta_weight("default")

    assert (layer.increment() - change).norm() / change.norm() < 1e-5


def test_the_papers_scale_is_smaller_by_the_root_of_the_number_of_bases():
    ours, papers = (trained(linear(WIDE), paper=paper).scale for paper in (False, True))

    assert ours / papers == pytest.approx(math.sqrt(3))


@pytest.mark.parametrize("shape", [WIDE, TALL])
def test_merged_is_unmerged(shape):
    layer, x = trained(linear(shape)), torch.randn(5, shape[1])

    torch.testing.assert_close(layer.merge()(x), layer(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("tokens", [FEW, MANY])
def test_pruned_weights_stay_zero_and_are_not_trained(tokens):
    base = linear(WIDE)
    mask = torch.rand(WIDE, generator=torch.Generator().manual_seed(2)) > 0.5
    layer = trained(MaskedLinear.from_linear(base, mask))
    x = torch.randn(tokens, 8).requires_grad_()
    leaves = [x, layer.randlora_lambda, layer.randlora_gamma]

    merged = layer.merge()
    y, reference = layer(x), F.linear(x, base.weight.detach() + mask * formula(layer), layer.bias)

    assert isinstance(merged, MaskedLinear)
    assert not merged.weight[~mask].any()
    torch.testing.assert_close(y, reference, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(
        torch.autograd.grad(y.square().sum(), leaves), torch.autograd.grad(reference.square().sum(), leaves),
        rtol=1e-3, atol=1e-2,
    )  # fmt: skip


def test_a_packed_base_computes_as_it_does_alone():
    base = linear((32, 16))
    packed = Int8Linear.from_linear(base, Kind())
    layer = RandLoRALinear.from_linear(packed, RandLoRABases.draw([(32, 16)], 3), 6.0, paper=False)
    x = torch.randn(4, 16)

    assert torch.equal(layer(x), packed(x))
    nn.init.normal_(layer.randlora_lambda)
    torch.testing.assert_close(layer(x), packed(x) + F.linear(x, layer.increment()), rtol=1e-4, atol=1e-4)
    assert layer.merge().weight.dtype == torch.float32


def test_dropout_hits_the_increment_alone():
    layer = trained(linear(WIDE), dropout=1.0)
    x = torch.randn(4, 8)

    assert torch.equal(layer.train()(x), F.linear(x, layer.weight, layer.bias))  # pyright: ignore[reportArgumentType]
    torch.testing.assert_close(layer.eval()(x), layer.merge()(x), rtol=1e-4, atol=1e-4)


def test_switched_off_it_is_its_base():
    base = linear(WIDE)
    layer, x = trained(base), torch.randn(4, 8)

    with adapters_off(nn.Sequential(layer)):
        assert torch.equal(layer(x), base(x))


def test_layers_share_one_bank_and_none_is_in_the_state():
    bases = RandLoRABases.draw([WIDE, TALL], 3)
    model = nn.ModuleList(RandLoRALinear.from_linear(linear(s), bases, 6.0, paper=False) for s in (WIDE, TALL)).double()

    assert model[0].bases is model[1].bases
    assert not any("bases" in name for name in model.state_dict())


def test_bf16_products_agree_with_fp32_to_their_rounding():
    layer, x = trained(linear(WIDE)), torch.randn(64, 8)
    exact = layer(x)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)

    assert y.dtype == torch.bfloat16
    assert (y.float() - exact).norm() / exact.norm() < 0.01


def test_a_row_of_the_scaled_bases_belongs_to_one_base_and_one_row_of_a():
    A_Rd = torch.tensor([[1.0, 10.0], [2.0, 20.0]])
    lambda_RN, gamma_Nd = torch.tensor([[1.0, 3.0], [5.0, 7.0]]), torch.tensor([[1.0, 1.0], [0.5, 0.5]])

    S_Md = scaled_bases(A_Rd, lambda_RN, gamma_Nd, 2.0)

    assert S_Md.tolist() == [[2, 20], [3, 30], [20, 200], [14, 140]]
