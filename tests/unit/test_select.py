from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch import nn
from transformers import AutoModelForCausalLM

from overhaul.errors import UserError
from overhaul.layers import swap
from overhaul.layers.lora import LoRALinear
from overhaul.select import block_linears, has_adapters, select_linears


@pytest.fixture(scope="module")
def model(tiny: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(tiny)


def test_the_linear_layers_of_the_blocks_and_no_others(model: nn.Module):
    names = list(block_linears(model))

    assert len(names) == 2 * 7
    assert all(name.startswith("model.layers.") for name in names)
    assert select_linears(model) == names


def test_targets_are_ends_of_names(model: nn.Module):
    assert select_linears(model, ["q_proj"]) == [f"model.layers.{n}.self_attn.q_proj" for n in (0, 1)]
    assert select_linears(model, ["1.mlp.up_proj"]) == ["model.layers.1.mlp.up_proj"]


def test_an_end_is_a_whole_name(model: nn.Module):
    with pytest.raises(UserError, match="no linear layer is called '_proj'"):
        select_linears(model, ["_proj", "q_proj"])
    with pytest.raises(UserError, match=r"allowed: down_proj, .*, v_proj"):
        select_linears(model, ["zzz"])


@pytest.mark.parametrize(("target", "kind"), [("embed_tokens", "Embedding"), ("lm_head", "Linear")])
def test_what_is_no_linear_layer_of_the_blocks_is_named_with_its_class(model: nn.Module, target: str, kind: str):
    with pytest.raises(UserError, match=rf"{target} \({kind}\) is no linear layer of the blocks"):
        select_linears(model, [target])


@pytest.mark.parametrize("architecture", ["opt"])
def test_other_architectures(make_tiny: Callable[..., Path], architecture: str):
    other = AutoModelForCausalLM.from_pretrained(make_tiny(architecture=architecture))

    assert len(block_linears(other)) == 2 * 6


def test_adapters_are_seen(tiny: Path):
    model = AutoModelForCausalLM.from_pretrained(tiny)
    assert not has_adapters(model)

    swap(model, ["model.layers.0.mlp.up_proj"], lambda old: LoRALinear.from_linear(old, 2, 4.0, 0.0))  # pyright: ignore

    assert has_adapters(model)
