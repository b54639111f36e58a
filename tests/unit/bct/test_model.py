from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from overhaul import artifact
from overhaul.bct.blocks import decode, encode
from overhaul.bct.layers import BlockEmbedding, BlockHead, BlockLinear, TiedHead
from overhaul.bct.model import (
    block_matrices,
    convert,
    matrices,
    refuse,
    round_in_place,
)
from overhaul.bct.scheme import Scheme
from overhaul.errors import UserError

Make = Callable[..., Path]
IDS = torch.arange(40).view(2, 20)


def read(path: Path) -> Any:
    return artifact.load(path, dtype=torch.float32).model


@torch.no_grad()
def logits(model: nn.Module) -> torch.Tensor:
    inner: Any = model
    return inner(IDS).logits


def test_what_is_stored_are_the_blocks_and_the_embedding(tiny):
    model = read(tiny)
    convert(model, Scheme(mode="w8a32"))

    found = block_matrices(model)
    assert sum(isinstance(m, BlockLinear) for m in found.values()) == 14
    assert isinstance(found["model.embed_tokens"], BlockEmbedding)
    assert isinstance(model.lm_head, TiedHead)
    assert {name for name, _ in model.named_parameters()} == {n for n, _ in model.named_parameters() if "norm" in n}


def test_an_output_embedding_of_its_own_is_stored_too(make_tiny: Make):
    model = read(make_tiny(tie=False))
    weight = model.lm_head.weight.detach().clone()
    convert(model, Scheme(mode="w8a32", embedding_block="1x32"))

    assert isinstance(model.lm_head, BlockHead)
    assert model.lm_head.block == (1, 32)
    assert (model.lm_head.dense() - weight).abs().max() < 0.01


@pytest.mark.parametrize("mode", ["w8a32", "w4a32"])
@pytest.mark.parametrize("architecture", ["llama", "opt"])
def test_storage_modes_compute_with_the_decoded_weights(mode, architecture, make_tiny: Make):
    path = make_tiny(architecture=architecture)
    packed, dense, scheme = read(path), read(path), Scheme(mode=mode)
    refuse(packed, scheme)

    convert(packed, scheme)
    with torch.no_grad():
        round_in_place(dense, scheme)

    torch.testing.assert_close(logits(packed), logits(dense), rtol=1e-5, atol=1e-5)


def test_single_tensors_may_have_another_width(tiny):
    model = read(tiny)
    convert(model, Scheme(mode="w4a32"), {"model.layers.1.mlp.up_proj": 8})

    assert {n: m.bits for n, m in block_matrices(model).items() if m.bits == 8} == {"model.layers.1.mlp.up_proj": 8}


def test_parts_that_are_left_out_stay_float(tiny):
    model = read(tiny)
    convert(model, Scheme(mode="w8a32", parts=("weights",)))

    assert isinstance(model.lm_head, nn.Linear)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    convert(other := read(tiny), Scheme(mode="w8a8", parts=("residual",)))
    assert block_matrices(other) == {}


def test_every_value_is_that_of_its_block(tiny):
    dense, model, scheme = read(tiny), read(tiny), Scheme(block="16x8")
    convert(model, scheme)

    for name, matrix in block_matrices(model).items():
        weight = dense.get_submodule(name).weight
        encoded = encode(weight, matrix.block, 8)
        assert torch.equal(matrix.rows(), decode(encoded.values, encoded.scale, encoded.block)), name


def test_blocks_that_become_zero_are_counted(tiny):
    model = read(tiny)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[3] = 2.0**-122

    assert convert(model, Scheme(mode="w8a32")) == 1


def test_a_tensor_with_nan_is_named(tiny):
    model = read(tiny)
    with torch.no_grad():
        model.model.layers[1].self_attn.k_proj.weight[0, :2] = torch.nan

    with pytest.raises(UserError, match=r"model\.layers\.1\.self_attn\.k_proj\.weight has 2 values"):
        list(matrices(model, Scheme()))


def test_a_tensor_beyond_its_scales_is_named(tiny):
    model = read(tiny)
    with torch.no_grad():
        model.model.layers[1].self_attn.k_proj.weight[0, 0] = 1e7

    with pytest.raises(UserError, match=r"model\.layers\.1\.self_attn\.k_proj\.weight has values above"):
        list(matrices(model, Scheme(scale="fp16")))
    list(matrices(model, Scheme()))


def test_other_architectures_can_be_stored_but_not_computed(make_tiny: Make):
    model = read(make_tiny(architecture="opt"))

    with pytest.raises(UserError, match="opt") as caught:
        refuse(model, Scheme(mode="w4a8"))
    assert "w4a32" in str(caught.value.hint)


def test_an_activation_without_a_table_is_refused(tiny):
    model = read(tiny)
    model.config.hidden_act = "quick_gelu"

    with pytest.raises(UserError, match="quick_gelu"):
        refuse(model, Scheme())
    refuse(model, Scheme(mode="w8a32"))


def test_sums_that_could_leave_int32_are_refused_by_name(tiny):
    model = read(tiny)
    model.model.layers[0].mlp.down_proj.in_features = 200_000

    with pytest.raises(UserError, match=r"model\.layers\.0\.mlp\.down_proj"):
        refuse(model, Scheme(accumulate="integer"))
    refuse(model, Scheme())


def test_an_embedding_that_does_more_than_look_up_is_refused(tiny):
    class Scaled(nn.Embedding):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            return super().forward(input) * 8

    model = read(tiny)
    model.model.embed_tokens = Scaled(*model.model.embed_tokens.weight.shape)

    with pytest.raises(UserError, match="embed_tokens is a Scaled"):
        refuse(model, Scheme(mode="w8a32"))
    refuse(model, Scheme(mode="w8a32", parts=("weights",)))


@pytest.mark.parametrize("mode", ["w8a8", "w8a32"])
def test_hidden_states_are_given(mode, tiny):
    model = read(tiny)
    convert(model, Scheme(mode=mode))

    with torch.no_grad():
        states = model(torch.arange(8)[None], output_hidden_states=True).hidden_states

    assert len(states) == model.config.num_hidden_layers + 1
    assert all(state.shape == (1, 8, model.config.hidden_size) for state in states)
