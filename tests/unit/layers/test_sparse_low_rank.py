"""SLTrain's layer against its formula, what it keeps for the backward pass, its support, and how it begins."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from overhaul.errors import UserError
from overhaul.layers.sparse_low_rank import FEW_ROWS, SLTrainLinear, draw_support, generator_of, index_dtype

NUM_IN, NUM_OUT, RANK, DENSITY, ALPHA = 12, 10, 3, 0.2, 6.0
PARTS = ("factor_A", "factor_B", "values", "bias")


def trained(*, bias: bool = True, dtype: torch.dtype = torch.float64) -> SLTrainLinear:
    """A layer in the middle of training: B is no longer zero."""
    layer = SLTrainLinear.from_scratch(
        NUM_IN, NUM_OUT, rank=RANK, density=DENSITY, alpha=ALPHA, bias=bias, generator=torch.Generator().manual_seed(0)
    )
    nn.init.normal_(layer.factor_B, generator=torch.Generator().manual_seed(1))
    return layer.to(dtype)


def inputs(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, NUM_IN, generator=torch.Generator().manual_seed(2), dtype=dtype).requires_grad_()


def formula(layer: SLTrainLinear) -> Tensor:
    """The weight by plain autograd, the sparse part a dense matrix."""
    sparse = torch.zeros(NUM_OUT * NUM_IN, dtype=layer.values.dtype)
    sparse = sparse.scatter(0, layer.support.long(), layer.values)
    return ALPHA / RANK * layer.factor_B @ layer.factor_A + sparse.view(NUM_OUT, NUM_IN)


@pytest.mark.parametrize("shape", [(20,), (2, 7), (2, 3, 5)])
@pytest.mark.parametrize("bias", [True, False])
def test_outputs_and_gradients_are_the_formulas(shape: tuple[int, ...], bias: bool):
    layer, x = trained(bias=bias), inputs(*shape)
    leaves = [x, *layer.parameters()]

    y, reference = layer(x), F.linear(x, formula(layer), layer.bias)

    exact = {"rtol": 0, "atol": 1e-10}
    grad = torch.randn_like(y)
    torch.testing.assert_close(y, reference, **exact)
    torch.testing.assert_close(
        torch.autograd.grad(y, leaves, grad), torch.autograd.grad(reference, leaves, grad), **exact
    )


@pytest.mark.parametrize("frozen", [c for n in range(1, 5) for c in itertools.combinations(PARTS, n)])
def test_frozen_parts_get_no_gradient_and_the_others_theirs(frozen: tuple[str, ...]):
    layer, x = trained(), inputs(6)
    for name in frozen:
        getattr(layer, name).requires_grad_(False)

    layer(x).square().sum().backward()
    found = {name: getattr(layer, name).grad for name in PARTS} | {"x": x.grad}
    for tensor in (x, *layer.parameters()):
        tensor.grad = None
    F.linear(x, formula(layer), layer.bias).square().sum().backward()

    for name, grad in found.items():
        reference = x.grad if name == "x" else getattr(layer, name).grad
        assert (grad is None) == (reference is None) == (name in frozen)
        if grad is not None:
            torch.testing.assert_close(grad, reference, rtol=0, atol=1e-10)


def test_an_input_without_gradient_still_trains_the_parts():
    layer = trained()

    layer(inputs(6).detach()).sum().backward()

    assert all(getattr(layer, name).grad is not None for name in PARTS)


def test_gradcheck():
    layer = trained()

    def call(x: Tensor, A_RI: Tensor, B_OR: Tensor, values_K: Tensor, bias_O: Tensor) -> Any:
        given = dict(zip(PARTS, (A_RI, B_OR, values_K, bias_O), strict=True))
        return torch.func.functional_call(layer, given, (x,))

    assert torch.autograd.gradcheck(call, (inputs(2, 3), *(getattr(layer, name) for name in PARTS)))


def test_no_matrix_of_the_weights_size_is_kept_for_the_backward_pass():
    layer = SLTrainLinear.from_scratch(64, 48, rank=4, density=0.05, alpha=8.0)
    x, kept = torch.randn(32, 64, requires_grad=True), []

    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        y = layer(x)

    sizes = {tuple(tensor.shape) for tensor in kept}
    assert sizes == {(32, 64), (4, 64), (48, 4), (int(0.05 * 64 * 48),)}
    assert {tensor.untyped_storage().data_ptr() for tensor in kept} == {
        tensor.untyped_storage().data_ptr()
        for tensor in (x, layer.factor_A, layer.factor_B, layer.values, layer.support)
    }
    y.sum().backward()


def test_under_autocast_products_are_bf16_and_gradients_fp32():
    layer = SLTrainLinear.from_scratch(256, 192, rank=16, density=0.1, alpha=16.0)
    nn.init.normal_(layer.factor_B, std=0.1)
    x = torch.randn(4, 128, 256, requires_grad=True)
    leaves = [x, layer.factor_A, layer.factor_B, layer.values]

    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    reference = F.linear(x, layer.dense())
    grad = torch.randn_like(reference)
    grads, exact = torch.autograd.grad(y, leaves, grad.bfloat16()), torch.autograd.grad(reference, leaves, grad)

    assert y.dtype == torch.bfloat16
    assert (y - reference).norm() < 0.01 * reference.norm()
    for ours, theirs in zip(grads, exact, strict=True):
        assert ours.dtype == torch.float32
        assert (ours - theirs).norm() < 0.01 * theirs.norm()


@pytest.mark.parametrize("rows", [1, FEW_ROWS, FEW_ROWS + 1])
@pytest.mark.parametrize("bias", [True, False])
def test_few_rows_without_gradient_are_multiplied_without_the_weight(rows: int, bias: bool):
    layer, x = trained(bias=bias), inputs(rows)

    with torch.no_grad():
        y = layer(x)

    torch.testing.assert_close(y, layer(x), rtol=0, atol=1e-10)


@pytest.mark.parametrize("bias", [True, False])
def test_merged_is_unmerged(bias: bool):
    layer, x = trained(bias=bias), inputs(2, 7)

    merged = layer.merge()

    assert type(merged) is nn.Linear
    assert (merged.bias is not None) == bias
    torch.testing.assert_close(merged(x), layer(x), rtol=0, atol=1e-10)


def test_merging_into_bf16_rounds_once():
    layer = trained(dtype=torch.bfloat16)
    exact = formula(layer.double())

    merged = layer.to(torch.bfloat16).merge().weight

    assert merged.dtype == torch.bfloat16
    torch.testing.assert_close(merged.double(), exact, rtol=2**-8, atol=1e-6)


def test_without_a_support_it_is_the_product_that_lora_adds():
    from overhaul.layers.lora import LoRALinear

    base = nn.Linear(NUM_IN, NUM_OUT)
    layer = SLTrainLinear.from_linear(base, rank=RANK, density=DENSITY, alpha=ALPHA, support="none")
    nothing = nn.Linear(NUM_IN, NUM_OUT)
    nothing.weight.data.zero_()
    nothing.bias = base.bias
    lora = LoRALinear(nothing, layer.factor_A.detach(), layer.factor_B.detach(), ALPHA)

    x = inputs(5, dtype=torch.float32)

    assert len(layer.values) == 0
    assert not layer.values.requires_grad
    torch.testing.assert_close(layer(x), lora(x))
    torch.testing.assert_close(layer.dense(), lora.dense())


@pytest.mark.parametrize("support", ["random", "largest"])
def test_with_every_position_it_is_the_dense_layer(support: Any):
    base = nn.Linear(NUM_IN, NUM_OUT)

    layer = SLTrainLinear.from_linear(base, rank=RANK, density=1.0, alpha=ALPHA, support=support)

    assert layer.support.tolist() == list(range(NUM_IN * NUM_OUT))
    torch.testing.assert_close(layer.dense(), base.weight, rtol=0, atol=1e-6)


def test_at_full_rank_it_is_the_dense_layer():
    base = nn.Linear(NUM_IN, NUM_OUT)

    layer = SLTrainLinear.from_linear(base, rank=NUM_OUT, density=DENSITY, alpha=ALPHA)

    torch.testing.assert_close(layer.dense(), base.weight, rtol=0, atol=1e-6)


def test_a_rank_above_the_smaller_side_is_the_smaller_side():
    linear = nn.Linear(8, 4, bias=False)

    made = SLTrainLinear.from_linear(linear, rank=6, density=0.0, alpha=2.0)

    assert made.rank == 4
    torch.testing.assert_close(made.dense(), linear.weight.detach(), rtol=1e-5, atol=1e-6)


def test_few_rows_in_bf16_are_as_exact_as_many():
    """An output is the sum of a hundred numbers of the support: bf16 would round after each."""
    torch.manual_seed(0)
    layer = SLTrainLinear.from_linear(nn.Linear(2048, 512, bias=False), rank=8, density=0.05, alpha=8.0)
    x = torch.randn(FEW_ROWS, 2048).bfloat16()
    exact = x.double() @ layer.dense().detach().double().t()

    with torch.no_grad():
        few, many = layer(x), layer(torch.cat([x, x]))[: len(x)]

    errors = [float((y.double() - exact).norm() / exact.norm()) for y in (few, many)]
    assert errors[0] < 1.2 * errors[1] < 0.01


def test_converting_takes_the_best_product_and_what_it_leaves_at_the_support():
    base = nn.Linear(NUM_IN, NUM_OUT)
    error = torch.linalg.svdvals(base.weight.detach())[RANK:].square().sum().sqrt()
    made = {
        kind: SLTrainLinear.from_linear(base, rank=RANK, density=DENSITY, alpha=ALPHA, support=kind)
        for kind in ("none", "random", "largest")
    }
    left = {kind: (base.weight - layer.dense()).detach() for kind, layer in made.items()}

    torch.testing.assert_close(left["none"].norm(), error)
    for kind in ("random", "largest"):
        on_support = left[kind].flatten()[made[kind].support.long()]
        torch.testing.assert_close(on_support, torch.zeros_like(on_support), rtol=0, atol=1e-6)
    kept = left["none"].abs().flatten()[made["largest"].support.long()]
    assert kept.min() >= left["largest"].abs().max()
    assert left["largest"].norm() < left["random"].norm() < left["none"].norm()
    assert made["random"].bias is base.bias


def test_the_start_from_scratch_is_the_papers():
    generator = torch.Generator().manual_seed(8)
    layer = SLTrainLinear.from_scratch(400, 100, rank=32, density=0.05, alpha=8.0, bias=True, generator=generator)

    assert not layer.factor_B.any()
    assert len(layer.values) == int(0.05 * 400 * 100)
    for tensor, width in ((layer.factor_A, 400), (layer.values, 400), (layer.bias, 100)):
        assert tensor is not None
        bound = 1 / math.sqrt(width)
        assert tensor.abs().max() <= bound
        assert tensor.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.15)


def test_the_weight_has_a_higher_rank_than_its_product():
    weight = trained().dense()

    assert torch.linalg.matrix_rank(weight) > RANK
    assert torch.linalg.matrix_rank(weight) == NUM_OUT


# The support.


@pytest.mark.parametrize("count", [0, 1, 6, 60, 61, 119, 120])
def test_positions_are_different_sorted_and_inside(count: int):
    support_K = draw_support(NUM_OUT, NUM_IN, count, torch.Generator().manual_seed(3))

    assert len(support_K) == count
    assert support_K.dtype == torch.int32
    found = support_K.tolist()
    assert found == sorted(set(found))
    assert all(0 <= position < NUM_OUT * NUM_IN for position in found)


def test_every_set_of_positions_is_as_likely_as_any_other():
    generator, draws = torch.Generator().manual_seed(4), 6000
    found = Counter(tuple(draw_support(2, 3, 2, generator).tolist()) for _ in range(draws))

    assert len(found) == math.comb(6, 2)
    expected = draws / len(found)
    chi_square = sum((count - expected) ** 2 / expected for count in found.values())
    assert chi_square < 36.1  # 14 degrees of freedom: 1 in 1,000 fair draws is beyond


def test_positions_beyond_32_bits_are_int64():
    num_out, num_in = 2**16 + 1, 2**15
    support_K = draw_support(num_out, num_in, 2000, torch.Generator().manual_seed(5))

    assert index_dtype(2**31) == torch.int32
    assert index_dtype(2**31 + 1) == torch.int64
    assert support_K.dtype == torch.int64
    assert 2**31 - 2**24 < int(support_K[-1]) < num_out * num_in
    assert SLTrainLinear.empty(num_in, num_out, 1, 5, 1.0, bias=False, device="meta").support.dtype == torch.int64
    assert draw_support(2**17, 2**17, 2000).max() > 2**32


def test_a_layers_support_depends_on_seed_and_name_alone():
    def drawn(seed: int, name: str) -> list[int]:
        return draw_support(NUM_OUT, NUM_IN, 20, generator_of(seed, name)).tolist()

    torch.manual_seed(6)
    first = drawn(0, "a")
    torch.manual_seed(7)

    assert drawn(0, "a") == first
    assert drawn(0, "b") != first
    assert drawn(1, "a") != first


def test_a_state_brings_its_support():
    one, other = trained(), trained()
    other.support.copy_(draw_support(NUM_OUT, NUM_IN, len(other.support), generator_of(1, "")))
    x = inputs(6)

    other.load_state_dict(one.state_dict())

    assert torch.equal(other.support, one.support)
    assert torch.equal(other(x), one(x))


@pytest.mark.parametrize("wrong", [[5, 3], [3, 3], [-1, 3], [3, 120]])
def test_positions_that_are_none_are_refused(wrong: list[int]):
    layer = SLTrainLinear.empty(NUM_IN, NUM_OUT, RANK, 2, ALPHA, bias=False)
    state = layer.state_dict() | {"support": torch.tensor(wrong, dtype=torch.int32)}

    with pytest.raises(UserError, match="support is not a sorted list of positions in a weight of 10 x 12"):
        layer.load_state_dict(state)


def test_on_meta_nothing_is_drawn():
    layer = SLTrainLinear.from_scratch(4096, 11008, rank=1024, density=0.05, alpha=8.0, device="meta")

    assert all(tensor.is_meta for tensor in (*layer.parameters(), *layer.buffers()))
    assert sum(p.numel() for p in layer.parameters()) == (4096 + 11008) * 1024 + int(0.05 * 4096 * 11008)
