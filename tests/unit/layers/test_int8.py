"""The int8 layer: every kind of input, what it stores, what it is made of, and its gradient."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812

from overhaul import int8
from overhaul.errors import UserError
from overhaul.int8 import Kind
from overhaul.layers import int8 as int8_layers
from overhaul.layers.int8 import FEW_ROWS, Int8Linear


def linear(inputs: int = 64, outputs: int = 24, *, bias: bool = True, seed: int = 0) -> nn.Linear:
    torch.manual_seed(seed)
    return nn.Linear(inputs, outputs, bias=bias).eval()


def drawn(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def off(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found.detach().float() - wanted.detach().float()).norm() / wanted.detach().norm().float())


def test_by_the_equation():
    plain, x_NI = linear(bias=False), drawn(12, 64)
    x_NI[3, 7], x_NI[5, 20] = 30.0, -9.0
    layer = Int8Linear.from_linear(plain, Kind())

    left_NI = x_NI.index_fill(1, torch.tensor([7, 20]), 0.0)
    c_N1, c_O = left_NI.abs().amax(1, keepdim=True), plain.weight.abs().amax(1)
    # What stands beside the outlier in its column counts for the constant of its own row.
    c_N1 = torch.maximum(c_N1, x_NI.masked_fill(x_NI.abs() >= 6, 0).abs().amax(1, keepdim=True))
    q_NI, q_OI = (127 * left_NI / c_N1).round(), (127 * plain.weight / c_O[:, None]).round()
    dense_OC = q_OI[:, [7, 20]] * c_O[:, None] / 127
    wanted_NO = (q_NI @ q_OI.T) * c_N1 * c_O / 127**2 + x_NI[:, [7, 20]] @ dense_OC.T

    torch.testing.assert_close(layer(x_NI), wanted_NO, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("inputs", [64, 65, 7, 100])
@pytest.mark.parametrize("rows", [1, FEW_ROWS, FEW_ROWS + 1, 40])
def test_any_width_any_type_any_number_of_rows(rows: int, inputs: int, dtype: torch.dtype):
    plain, x = linear(inputs, 13), drawn(1, rows, inputs).to(dtype)

    y = Int8Linear.from_linear(plain, Kind())(x)

    assert (y.shape, y.dtype) == ((1, rows, 13), dtype)
    assert off(y, plain(x.float())) < 0.03


def test_inputs_that_are_not_contiguous_or_have_no_rows_or_one_axis():
    plain = linear()
    layer, x = Int8Linear.from_linear(plain, Kind()), drawn(64, 5, 4)

    assert off(layer(x.permute(1, 2, 0)), plain(x.permute(1, 2, 0))) < 0.02
    assert layer(torch.zeros(2, 0, 64)).shape == (2, 0, 24)
    assert off(layer(x[:, 0, 0]), plain(x[:, 0, 0])) < 0.02


@pytest.mark.parametrize("rows", [3, 30])
def test_outliers_are_multiplied_apart_and_threshold_zero_is_plain_int8(rows: int):
    plain, x = linear(), drawn(rows, 64)
    x[:, 9] *= 100

    apart, plainly = (Int8Linear.from_linear(plain, Kind(threshold=t))(x) for t in (6.0, 0.0))

    assert off(apart, plain(x)) < 0.01
    if rows > FEW_ROWS:
        assert off(plainly, plain(x)) > 3 * off(apart, plain(x))
        assert torch.equal(plainly, Int8Linear.from_linear(plain, Kind(threshold=1e9))(x))


@pytest.mark.parametrize("rows", [3, 30])
def test_kept_columns_are_those_of_the_dense_layer(rows: int):
    plain, x = linear(), drawn(rows, 64)
    x[:, [4, 40]] *= 1e4  # so large that only these columns are seen in the result
    layer = Int8Linear.from_linear(plain, Kind(), torch.tensor([4, 40]))

    assert torch.equal(layer.dense()[:, [4, 40]], plain.weight[:, [4, 40]])
    assert (layer.weight[:, [4, 40]] == 0).all()
    assert off(layer(x), plain(x)) < 1e-5


@pytest.mark.parametrize(
    ("granularity", "zero_point"), list(product(("vector", "row", "tensor"), (False, True))), ids=str
)
def test_merged_it_is_what_it_was_up_to_half_a_step(granularity, zero_point):
    plain = linear()
    layer = Int8Linear.from_linear(plain, Kind(granularity=granularity, zero_point=zero_point))

    merged = layer.merge()

    assert type(merged) is nn.Linear
    assert merged.bias is plain.bias
    assert torch.equal(merged.weight, layer.dense())
    assert ((merged.weight - plain.weight).abs() <= layer.scale.step * 0.5001).all()
    assert layer.num_weights == 64 * 24
    assert layer.num_nonzero() == int(layer.dense().count_nonzero())


def test_the_gradient_is_that_of_the_dequantized_weight_and_the_weight_has_none():
    layer, x = Int8Linear.from_linear(linear(), Kind()), drawn(2, 10, 64).requires_grad_()
    grad = drawn(2, 10, 24, seed=2)

    layer(x).backward(grad)

    torch.testing.assert_close(x.grad, grad @ layer.dense())
    assert [name for name, _ in layer.named_parameters()] == ["bias"]


def test_the_state_is_bitsandbytes_and_comes_back_bit_for_bit():
    plain = linear()
    layer = Int8Linear.from_linear(plain, Kind())
    state = layer.state_dict()

    assert {name: tensor.dtype for name, tensor in state.items()} == {
        "weight": torch.int8,
        "SCB": torch.float32,
        "weight_format": torch.uint8,
        "bias": torch.float32,
    }
    assert torch.equal(state["SCB"], plain.weight.abs().amax(1))
    again = Int8Linear.empty(linear(seed=5), Kind())
    again.load_state_dict(state)
    assert torch.equal(again(drawn(20, 64)), layer(drawn(20, 64)))


def test_constants_stay_fp32_when_the_model_is_cast():
    layer = Int8Linear.from_linear(linear(), Kind())
    constants_O = layer.SCB.clone()

    for cast in (layer.to(torch.bfloat16), layer.half(), nn.Sequential(layer).double()[0]):
        assert cast.SCB.dtype == torch.float32
        assert torch.equal(cast.SCB, constants_O)
        assert cast.weight.dtype == torch.int8


def test_a_weight_that_is_not_quantized_is_not_truncated_to_integers():
    with pytest.raises(UserError, match=r"not quantized[\s\S]*from_linear"):
        Int8Linear.empty(linear(), Kind()).load_state_dict(linear().state_dict(), strict=False)


def test_layers_that_read_the_same_tensor_share_its_integers(monkeypatch: pytest.MonkeyPatch):
    seen: list[int] = []
    quantize_rows = int8.quantize_rows
    monkeypatch.setattr(int8, "quantize_rows", lambda x, kind: seen.append(1) or quantize_rows(x, kind))
    one, other = (Int8Linear.from_linear(linear(seed=seed), Kind()) for seed in (0, 1))
    x = drawn(2, 10, 64)

    first = one(x), other(x)
    assert len(seen) == 1
    x.mul_(2)
    again = one(x)
    assert len(seen) == 2
    assert off(again, F.linear(x, one.dense(), one.bias)) < 0.02
    assert not torch.equal(first[0], again)


@pytest.mark.parametrize("rows", [1, 4, 8])
def test_tensors_at_any_address_are_read(rows: int):
    layer = Int8Linear.from_linear(linear(), Kind())
    x = drawn(rows, 64).bfloat16()
    wanted = layer(x)

    bytes_ = torch.empty(layer.weight.numel() + 64, dtype=torch.int8)
    start = 8 - bytes_.data_ptr() % 8
    layer.weight = bytes_[start : start + layer.weight.numel()].view_as(layer.weight).copy_(layer.weight)
    odd = torch.empty(rows * 64 + 1, dtype=torch.bfloat16)[1:].view(rows, 64).copy_(x)

    assert torch.equal(layer(odd), wanted)


def test_the_integers_of_one_tensor_are_kept_at_most_whatever_keeps_tensors_alive():
    layer = Int8Linear.from_linear(linear(), Kind())
    alive = [drawn(2, 10, 64) for _ in range(3)]

    for x in alive:
        layer(x)

    assert len(int8_layers._QUANTIZED) == 1


def test_under_autocast_the_result_has_autocasts_type():
    layer = Int8Linear.from_linear(linear(), Kind())
    with torch.autocast("cpu", torch.bfloat16):
        assert {layer(drawn(rows, 64)).dtype for rows in (2, 20)} == {torch.bfloat16}
