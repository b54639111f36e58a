"""A cut model computes what the original computes without what was removed."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    ArceeConfig,
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
    SmolLM3Config,
)

from command import python
from overhaul.cut import NOBODY, Kept, cut
from overhaul.errors import UserError
from overhaul.interop import decoder
from overhaul.layers import swap
from overhaul.layers.masked import MaskedLinear
from overhaul.shapes import Shape

IDS = torch.arange(40).view(2, 20)
HEAD_DIM = 16
SIZES: dict[str, Any] = {
    "vocab_size": 97, "hidden_size": 72, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 6,
    "num_key_value_heads": 2, "head_dim": HEAD_DIM, "max_position_embeddings": 64, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": [2, 3, 4, 5],
}  # fmt: skip
WINDOW: dict[str, Any] = {"use_sliding_window": True, "sliding_window": 8}
CONFIGS: dict[str, Callable[[], Any]] = {
    "llama": lambda: LlamaConfig(**SIZES, tie_word_embeddings=True),
    "llama-untied": lambda: LlamaConfig(**SIZES),
    "llama-bias": lambda: LlamaConfig(**SIZES, attention_bias=True, mlp_bias=True),
    "mistral": lambda: MistralConfig(**SIZES, sliding_window=8),
    "qwen2": lambda: Qwen2Config(**SIZES, **WINDOW, max_window_layers=1, tie_word_embeddings=True),
    "qwen3": lambda: Qwen3Config(**SIZES, **WINDOW, max_window_layers=2),
    "smollm3": lambda: SmolLM3Config(**SIZES, no_rope_layer_interval=2),
    "arcee": lambda: ArceeConfig(**SIZES),
}


def random_model(config: Any) -> nn.Module:
    """With norms that are not one and biases that are not zero."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        made = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        with torch.no_grad():
            for name, parameter in made.named_parameters():
                parameter.normal_(1.0 if "norm" in name else 0.0, 0.2)
    return made.eval()


@pytest.fixture(params=CONFIGS)
def model(request: pytest.FixtureRequest) -> nn.Module:
    return random_model(CONFIGS[request.param]())


@pytest.fixture
def llama() -> nn.Module:
    return random_model(CONFIGS["llama"]())


@torch.no_grad()
def logits(of: Any) -> Tensor:
    return of(IDS).logits


def same(first: nn.Module, second: nn.Module) -> None:
    torch.testing.assert_close(logits(first), logits(second), rtol=1e-4, atol=1e-4)


def everything(model: nn.Module) -> Kept:
    return Kept.everything(decoder.find(model).shape)


def drawn(count: int, size: int) -> Tensor:
    """`count` different numbers below `size`, in no order."""
    return torch.randperm(size, generator=torch.Generator().manual_seed(count))[:count]


def with_zeroed_columns(model: nn.Module, projection: str, removed_LI: list[Tensor]) -> nn.Module:
    changed = copy.deepcopy(model)
    for block, removed_I in zip(decoder.find(changed).blocks, removed_LI, strict=True):
        block.get_submodule(projection).weight.data[:, removed_I] = 0
    return changed


def missing(kept_I: Tensor, size: int) -> Tensor:
    return torch.tensor([index for index in range(size) if index not in kept_I.tolist()])


# Identities.


def test_everything_kept_is_the_same_model(model: nn.Module):
    whole = cut(model, everything(model))

    assert torch.equal(logits(whole), logits(model))
    assert not {p.data_ptr() for p in whole.parameters()} & {p.data_ptr() for p in model.parameters()}


def test_another_order_of_everything_computes_the_same(model: nn.Module):
    shape = decoder.find(model).shape
    kept = everything(model)
    groups_LG = torch.stack([drawn(2, 2), torch.tensor([1, 0]), torch.tensor([0, 1]), torch.tensor([1, 0])])
    heads_LGK = groups_LG[:, :, None] * 3 + torch.tensor([2, 0, 1])

    shuffled = cut(
        model,
        replace(
            kept,
            hidden_D=drawn(shape.hidden, shape.hidden),
            ffn_LF=torch.stack([drawn(shape.ffn, shape.ffn).roll(layer) for layer in range(4)]),
            groups_LG=groups_LG,
            heads_LGK=heads_LGK,
        ),
    )

    same(shuffled, model)


def test_cut_neurons_are_zeroed_columns_of_down_proj(model: nn.Module):
    ffn_LF = torch.stack([drawn(20, 48), drawn(20, 48).flip(0), drawn(20, 47) + 1, torch.arange(20)])

    smaller = cut(model, replace(everything(model), ffn_LF=ffn_LF))

    same(smaller, with_zeroed_columns(model, "mlp.down_proj", [missing(kept_F, 48) for kept_F in ffn_LF]))


@pytest.mark.parametrize(
    "heads_LGK",
    [
        pytest.param([[[3, 4, 5]], [[0, 1, 2]], [[3, 4, 5]], [[3, 4, 5]]], id="whole groups"),
        pytest.param([[[2, 0], [3, 5]], [[0, 1], [3, 4]], [[1, 2], [4, 5]], [[0, 2], [5, 3]]], id="heads of a group"),
        pytest.param([[[4]], [[2]], [[0]], [[5]]], id="both"),
    ],
)
def test_cut_heads_are_zeroed_columns_of_o_proj(model: nn.Module, heads_LGK: list[list[list[int]]]):
    heads = torch.tensor(heads_LGK)

    smaller = cut(model, replace(everything(model), heads_LGK=heads, groups_LG=heads[:, :, 0] // 3))

    entries = [(kept_GK.flatten()[:, None] * HEAD_DIM + torch.arange(HEAD_DIM)).flatten() for kept_GK in heads]
    same(smaller, with_zeroed_columns(model, "self_attn.o_proj", [missing(kept, 6 * HEAD_DIM) for kept in entries]))


def test_cut_layers_are_skipped_layers(model: nn.Module):
    kept = everything(model)
    stays = torch.tensor([0, 3])
    layers = {"layers_L": stays, "ffn_LF": kept.ffn_LF[stays]}

    smaller = cut(model, replace(kept, **layers, groups_LG=kept.groups_LG[stays], heads_LGK=kept.heads_LGK[stays]))

    skipping = copy.deepcopy(model)
    for block in decoder.find(skipping).blocks[1:3]:
        block.forward = lambda hidden_states, *_, **__: hidden_states
    same(smaller, skipping)


def test_cut_channels_are_channels_that_carry_nothing(model: nn.Module):
    """The reference keeps all channels and writes 0 to those that are cut.

    Then its norms average the same squares over more channels: x / sqrt(S/d + eps) w, where the cut model has
    x / sqrt(S/d' + eps) w. With eps' = eps d'/d and w' = w sqrt(d'/d) both are equal.
    """
    wide = decoder.find(model).shape.hidden
    hidden_D = drawn(48, wide)
    kept = everything(model)

    smaller = cut(model, replace(kept, hidden_D=hidden_D))

    reference = copy.deepcopy(model)
    removed = missing(hidden_D, wide)
    inner: Any = reference.base_model
    inner.embed_tokens.weight.data[:, removed] = 0
    for block in inner.layers:
        for projection in (block.self_attn.o_proj, block.mlp.down_proj):
            projection.weight.data[removed] = 0
            if projection.bias is not None:
                projection.bias.data[removed] = 0
    for name, norm in reference.named_modules():
        if name.endswith("norm") and not name.endswith(("q_norm", "k_norm")):
            norm.variance_epsilon *= 48 / wide
            norm.weight.data *= (48 / wide) ** 0.5
    same(smaller, reference)


# What stock transformers makes of it.

LOAD = """
import sys
sys.modules["overhaul"] = None
import torch
from transformers import AutoModelForCausalLM
ids, made = torch.arange(40).view(2, 20), {}
for path in sys.argv[2:]:
    model = AutoModelForCausalLM.from_pretrained(path)
    said = [model.generate(ids, max_new_tokens=12, do_sample=False, use_cache=use, eos_token_id=96)
            for use in (True, False)]
    with torch.no_grad():
        made[path] = model(ids).logits, *said
torch.save(made, sys.argv[1])
"""


def of_each(shape: Shape) -> Kept:
    """Something of every axis."""
    kept, stays = Kept.everything(shape), torch.tensor([1, 2, 3])
    return Kept(
        layers_L=stays,
        hidden_D=drawn(48, shape.hidden),
        ffn_LF=kept.ffn_LF[stays, 8:40],
        groups_LG=kept.groups_LG[stays],
        heads_LGK=kept.heads_LGK[stays][:, :, :2],
    )


def test_stock_transformers_loads_it_and_its_cache_is_right(tmp_path: Path):
    models = {name: random_model(config()) for name, config in CONFIGS.items()}
    smaller: dict[Path, Any] = {
        tmp_path / name: cut(model, of_each(decoder.find(model).shape)) for name, model in models.items()
    }
    for path, made in smaller.items():
        made.save_pretrained(path)

    done = python(LOAD, tmp_path / "said.pt", *smaller)

    assert done.code == 0, done.err
    for path, (theirs, cached, uncached) in torch.load(tmp_path / "said.pt").items():
        made = smaller[Path(path)]
        assert torch.equal(theirs, logits(made)), path
        assert torch.equal(cached, uncached), path
        assert cached.shape[1] > 20
        assert [block.self_attn.layer_idx for block in made.base_model.layers] == [0, 1, 2]


def test_the_parameters_are_those_of_the_formula(model: nn.Module):
    found = decoder.find(model)
    kept = of_each(found.shape)
    smaller = cut(model, kept)

    assert found.architecture.parameters(found.shape) == sum(p.numel() for p in model.parameters())
    assert found.architecture.parameters(kept.shape) == sum(p.numel() for p in smaller.parameters())
    assert decoder.find(smaller).shape == kept.shape


def test_lists_of_the_configuration_go_with_their_layers():
    config = CONFIGS["smollm3"]()
    model = AutoModelForCausalLM.from_config(config)

    smaller: Any = cut(model, of_each(decoder.find(model).shape))

    assert config.no_rope_layers == [1, 0, 1, 0]
    assert smaller.config.no_rope_layers == [0, 1, 0]
    assert smaller.config.eos_token_id == [2, 3, 4, 5], "a list as long as there are layers, and none of them"


def test_a_shape_that_llamas_configuration_refuses_is_written_as_mistral(llama: Any):
    kept = replace(everything(llama), hidden_D=torch.arange(64))

    smaller: Any = cut(llama, kept)

    assert smaller.config.model_type == "mistral"
    assert smaller.config.sliding_window is None
    assert smaller.config.rope_parameters == llama.config.rope_parameters


def test_a_llama_with_biases_has_no_such_way_out():
    model = AutoModelForCausalLM.from_config(CONFIGS["llama-bias"]())

    with pytest.raises(UserError, match="cannot say") as refused:
        cut(model, replace(everything(model), hidden_D=torch.arange(64)))

    assert "--hidden a multiple of 6" in refused.value.allowed


# Masks, and the head residual.


def test_masks_are_cut_along_with_their_weights(llama: nn.Module):
    generator = torch.Generator().manual_seed(1)
    names = [name for name, module in llama.named_modules() if isinstance(module, nn.Linear) and "layers" in name]
    masks = {name: torch.rand(llama.get_submodule(name).weight.shape, generator=generator) > 0.5 for name in names}
    for name, mask_OI in masks.items():
        swap(llama, [name], lambda linear, mask=mask_OI: MaskedLinear.from_linear(linear, mask))

    smaller = cut(llama, of_each(decoder.find(llama).shape))

    for layer in smaller.modules():
        if isinstance(layer, MaskedLinear):
            assert layer.weight[~layer.mask].count_nonzero() == 0
            assert 0.4 < layer.mask.float().mean() < 0.6
    down = smaller.get_submodule("model.layers.0.mlp.down_proj")
    hidden_D = drawn(48, 72)
    assert torch.equal(down.mask, masks["model.layers.1.mlp.down_proj"][hidden_D][:, 8:40])
    assert sum(isinstance(module, MaskedLinear) for module in smaller.modules()) == 7 * 3


def test_the_head_residual_moves_a_kept_head_away_from_its_partner(llama: Any):
    kept = everything(llama)
    heads_LGK = kept.heads_LGK[:, :, :2]
    partners_LGK = torch.full_like(heads_LGK, NOBODY)
    partners_LGK[2, 1, 0] = 5  # head 3 of layer 2 takes over from head 5

    smaller: Any = cut(llama, replace(kept, heads_LGK=heads_LGK, partners_LGK=partners_LGK))

    def query(of: Any, layer: int) -> Tensor:
        return of.model.layers[layer].self_attn.q_proj.weight.unflatten(0, (-1, HEAD_DIM))

    before, after = query(llama, 2), query(smaller, 2)
    assert torch.equal(after[[0, 1, 3]], before[[0, 1, 4]])
    assert torch.equal(after[2], 2 * before[3] - before[5])
    assert torch.equal(query(smaller, 0), query(llama, 0)[[0, 1, 3, 4]])
