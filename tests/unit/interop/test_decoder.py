"""What is found in a model, and what is said of one whose parts are not known."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, GemmaConfig

from overhaul import artifact
from overhaul.errors import UserError
from overhaul.interop import decoder
from overhaul.shapes import Shape


def test_the_shape_and_the_axes_of_a_llama(tiny: Path):
    found = decoder.find(artifact.load(tiny).model)

    assert found.shape == Shape(layers=2, hidden=64, ffn=128, heads=4, kv_groups=2)
    assert found.architecture.head_dim == 16
    assert found.axes["model.layers.1.self_attn.k_proj.weight"] == ("key", "hidden")
    assert found.axes["model.embed_tokens.weight"] == (None, "hidden")
    assert [type(block).__name__ for block in found.blocks] == ["LlamaDecoderLayer"] * 2


@pytest.mark.parametrize(("architecture", "linear"), [("opt", "self_attn.out_proj"), ("gpt2", "lm_head")])
def test_a_model_of_another_kind_is_refused_with_what_was_found(
    architecture: str, linear: str, make_tiny: Callable[..., Path]
):
    model = artifact.load(make_tiny(architecture=architecture)).model

    with pytest.raises(UserError, match="Linear layers found") as refused:
        decoder.find(model)

    assert linear in refused.value.given
    assert "llama" in refused.value.allowed


def test_a_model_that_scales_its_embedding_is_refused():
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "vocab_size": 32}
    model = AutoModelForCausalLM.from_config(
        GemmaConfig(**sizes, num_attention_heads=2, num_key_value_heads=1, head_dim=16)
    )

    with pytest.raises(UserError, match="GemmaForCausalLM cannot be cut"):
        decoder.find(model)


def test_a_parameter_that_is_not_known_is_named(tiny: Path):
    model = artifact.load(tiny).model
    model.get_submodule("model.layers.1.mlp").register_parameter("gain", nn.Parameter(torch.ones(1)))

    with pytest.raises(UserError, match=r"model\.layers\.1\.mlp\.gain"):
        decoder.find(model)


def test_blocks_of_different_widths_are_refused(tiny: Path):
    model = artifact.load(tiny).model
    model.get_submodule("model.layers.1.mlp").up_proj = nn.Linear(64, 96, bias=False)

    with pytest.raises(UserError, match="one width for all blocks") as refused:
        decoder.find(model)

    assert "model.layers.1.mlp.up_proj.weight" in refused.value.given
