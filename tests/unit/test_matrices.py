"""The manifest: every parameter once, each with what it is for."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM

from overhaul.matrices import manifest

Make = Callable[..., Path]


def load(path: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(path)


@pytest.mark.parametrize("tie", [True, False])
def test_a_llama_has_four_attention_three_mlp_matrices_and_two_norms_a_block(make_tiny: Make, tie: bool):
    model = load(make_tiny(tie=tie))
    listed = manifest(model)

    assert [one.parameter for one in listed] == list(model.parameters())
    for block in range(2):
        assert Counter(one.category for one in listed if one.block == block) == {"attention": 4, "mlp": 3, "norm": 2}
    outside = {one.name: one.category for one in listed if one.block is None}
    head = {} if tie else {"lm_head.weight": "head"}
    assert outside == {"model.embed_tokens.weight": "embedding", "model.norm.weight": "norm"} | head


def test_mlp_layers_that_lie_beside_the_attention_are_mlp(make_tiny: Make):
    listed = {one.name: one for one in manifest(load(make_tiny(architecture="opt", bias=True)))}

    assert listed["model.decoder.layers.1.fc1.weight"].category == "mlp"
    assert listed["model.decoder.layers.1.fc1.weight"].block == 1
    assert listed["model.decoder.layers.0.self_attn.q_proj.bias"].category == "attention"
    assert listed["model.decoder.layers.0.self_attn_layer_norm.weight"].category == "norm"
    assert listed["model.decoder.embed_positions.weight"].category == "other"
