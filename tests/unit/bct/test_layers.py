from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812

from overhaul.bct.blocks import decode, encode, snap
from overhaul.bct.layers import BlockEmbedding, BlockHead, BlockLinear, RoundedLinear, TiedHead
from overhaul.bct.scheme import Scheme
from overhaul.layers import is_adapter, merge_all


def linear(num_in: int = 24, num_out: int = 10, bias: bool = True) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(num_in, num_out, bias=bias)


def stored(dense: nn.Linear, scheme: Scheme, bits: int | None = None) -> BlockLinear:
    layer = BlockLinear(dense.in_features, dense.out_features, dense.bias, bits or scheme.bits, scheme)
    layer.fill(encode(dense.weight, layer.block, layer.bits, scheme.scale))
    return layer


def inputs(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("block", ["1x8", "2x8", "row", "tensor", "3x7"])
@pytest.mark.parametrize("mode", ["w8a32", "w4a32"])
@pytest.mark.parametrize("scale", ["shift", "fp16", "fp32"])
def test_a_stored_layer_is_the_layer_of_its_decoded_weight(mode, block, scale):
    dense, scheme = linear(), Scheme(mode=mode, block=block, scale=scale)
    layer, x = stored(dense, scheme), inputs(2, 3, 24)

    encoded = encode(dense.weight, layer.block, scheme.bits, scale)
    weight_OI = decode(encoded.values, encoded.scale, encoded.block)
    assert torch.equal(layer.dense(), weight_OI)
    assert torch.equal(layer(x), F.linear(x, weight_OI, dense.bias))
    assert torch.equal(layer.merge()(x), layer(x))


def test_bf16_inputs_are_multiplied_in_bf16():
    layer = stored(linear(), Scheme(mode="w8a32"))

    assert layer(inputs(2, 24).bfloat16()).dtype == torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(inputs(2, 24)).dtype == torch.bfloat16


@pytest.mark.parametrize("mode", ["w8a8", "w4a8"])
def test_a_computing_layer_rounds_what_flows_in_and_out(mode):
    dense, scheme = linear(), Scheme(mode=mode, activation_block=8, block="1x8")
    layer, x = stored(dense, scheme), inputs(5, 24)

    wanted = snap(snap(x, 8) @ layer.dense().t() + snap(dense.bias, 8), 8)
    torch.testing.assert_close(layer(x), wanted)
    assert torch.equal(layer(x), snap(layer(x), 8))


def test_integer_sums_are_near_those_in_fp32_and_do_not_depend_on_the_batch():
    dense = linear(96, 32)
    layers = {how: stored(dense, Scheme(accumulate=how, block="4x16")) for how in ("float", "integer")}
    x = inputs(7, 96)

    apart = (layers["integer"](x) - layers["float"](x)).abs().max()
    assert apart <= 2**-5
    assert torch.equal(layers["integer"](x)[2:3], layers["integer"](x[2:3]))


def test_a_float_layer_between_blocks_keeps_its_weight():
    dense = linear()
    layer = RoundedLinear.from_linear(dense, Scheme(activation_block=8))

    assert layer.weight is dense.weight
    torch.testing.assert_close(layer(inputs(5, 24)), snap(dense(snap(inputs(5, 24), 8)), 8), atol=2**-6, rtol=0)


@pytest.mark.parametrize("block", ["1x8", "3x8", "tensor"])
def test_looking_up_decodes_the_rows_that_are_needed(block, monkeypatch):
    scheme = Scheme(mode="w4a32", embedding_block=block)
    embedding = BlockEmbedding(12, 16, 4, scheme, torch.bfloat16)
    embedding.fill(encode(inputs(12, 16), embedding.block, 4))
    decoded = []
    monkeypatch.setattr("overhaul.bct.blocks.decode", lambda *a: decoded.append(a[0].shape) or decode(*a))

    found = embedding(torch.tensor([[3, 11], [0, 3]]))

    assert decoded == [(4, 16)]
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, embedding.rows()[[3, 11, 0, 3]].view(2, 2, 16).bfloat16())


def test_a_tied_head_has_no_tensor_of_its_own():
    scheme = Scheme(embedding_block="1x8")
    embedding = BlockEmbedding(12, 16, 8, scheme, torch.float32)
    embedding.fill(encode(inputs(12, 16), embedding.block))
    head = TiedHead(embedding)

    assert not head.state_dict()
    assert (head.num_weights, embedding.num_weights) == (0, 192)
    assert torch.equal(head(inputs(3, 16)), inputs(3, 16) @ embedding.rows().t())


def test_logits_are_not_rounded():
    scheme = Scheme(activation_block=8)
    head = BlockHead(24, 10, None, 8, scheme)
    head.fill(encode(linear().weight, head.block))

    assert torch.equal(head(inputs(3, 24)), inputs(3, 24) @ head.dense().t())


def test_counts_and_bytes_are_those_of_the_tensors():
    layer = stored(linear(23, 10), Scheme(mode="w4a32", block="1x8"))

    assert layer.num_weights == 230
    assert layer.num_nonzero() == int(layer.dense().count_nonzero())
    assert sum(buffer.nbytes for buffer in layer.buffers()) == 10 * 12 + 10 * 3


def test_merging_adapters_leaves_stored_layers_alone():
    model = nn.Sequential(stored(linear(), Scheme()))

    assert not is_adapter(model[0])
    assert isinstance(merge_all(model)[0], BlockLinear)


def test_casting_a_model_leaves_scales_as_they_are():
    layer = stored(linear(), Scheme(mode="w8a32", scale="fp16"))
    before = layer.scale.clone()

    layer.to(torch.bfloat16)

    assert layer.bias.dtype == torch.bfloat16
    assert torch.equal(layer.scale, before)
    assert layer.scale.dtype == torch.float16
