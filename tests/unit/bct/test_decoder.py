from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from overhaul import artifact
from overhaul.bct.blocks import snap
from overhaul.bct.decoder import BlockMLP, BlockNorm
from overhaul.bct.model import convert
from overhaul.bct.scheme import PARTS, Scheme
from overhaul.interop.llama import CodedLayer

Make = Callable[..., Path]
IDS = torch.randint(0, 512, (2, 24), generator=torch.Generator().manual_seed(0))
COMPUTED = PARTS[2:]


def made(path: Path, **fields: Any) -> Any:
    model = artifact.load(path, dtype=torch.float32).model
    convert(model, Scheme(**{"activation_block": 16, "block": "1x32", **fields}))
    return model


@torch.no_grad()
def logits(model: nn.Module, **inputs: Any) -> torch.Tensor:
    inner: Any = model
    return inner(**{"input_ids": IDS, **inputs}).logits


@pytest.fixture
def dense(tiny: Path) -> torch.Tensor:
    return logits(artifact.load(tiny, dtype=torch.float32).model)


def apart(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


def test_with_every_part_off_but_one_the_rest_is_the_models_own(tiny, dense, monkeypatch):
    monkeypatch.setattr("overhaul.bct.decoder.snap", lambda x, columns: x)

    for part in ("residual", "cache"):
        found = logits(made(tiny, parts=(part,)), use_cache=False)
        torch.testing.assert_close(found, dense, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("part", COMPUTED)
def test_each_part_changes_something_and_little(part, tiny, dense):
    assert 1e-6 < apart(logits(made(tiny, parts=(part,))), dense) < 0.05


def test_all_parts_together_are_near_the_model(tiny, dense):
    assert apart(logits(made(tiny)), dense) < 0.05
    assert apart(logits(made(tiny, mode="w4a8")), dense) < 0.4


def test_biases_and_heads_of_their_own_are_computed(make_tiny: Make):
    path = make_tiny(tie=False, bias=True)
    dense = logits(artifact.load(path, dtype=torch.float32).model)

    assert apart(logits(made(path)), dense) < 0.05


@pytest.mark.parametrize("columns", [5, 16, 64, 1000])
def test_blocks_need_not_divide_anything(columns, tiny, dense):
    assert apart(logits(made(tiny, activation_block=columns, cache_block=columns, block=f"3x{columns}")), dense) < 0.1


@torch.no_grad()
def token_by_token(model: Any) -> tuple[torch.Tensor, Any]:
    found, cache = [], None
    for place in range(IDS.shape[1]):
        out = model(input_ids=IDS[:, place : place + 1], past_key_values=cache, use_cache=True)
        found.append(out.logits)
        cache = out.past_key_values
    return torch.cat(found, 1), cache


@pytest.mark.parametrize("cache_block", [5, 16])
def test_integer_sums_give_the_same_bits_token_by_token(cache_block, tiny):
    model = made(tiny, accumulate="integer", cache_block=cache_block)
    model.lm_head = nn.Identity()  # logits are summed in fp32, in an order of its own

    assert torch.equal(token_by_token(model)[0], logits(model))


def test_fp32_sums_agree_token_by_token_but_for_values_that_were_nearly_a_tie(tiny):
    model = made(tiny)

    stepwise, at_once = token_by_token(model)[0], logits(model)

    assert apart(stepwise, at_once) < 0.02


def test_later_tokens_do_not_change_earlier_ones(tiny):
    model = made(tiny, accumulate="integer")
    other = IDS.clone()
    other[:, 12:] = 7

    assert torch.equal(logits(model)[:, :12], logits(model, input_ids=other)[:, :12])


def test_the_cache_holds_integers(tiny):
    _, cache = token_by_token(made(tiny))

    layer = cache.layers[1]
    assert isinstance(layer, CodedLayer)
    assert layer.keys.dtype == layer.key_scale.dtype == torch.int8
    assert (layer.keys.shape, layer.key_scale.shape) == ((2, 2, 24, 16), (2, 2, 24, 1))
    assert layer.bytes == 2 * 2 * 2 * 24 * (16 + 1)


def test_what_is_appended_leaves_the_rest_of_the_cache_alone(tiny):
    model = made(tiny)
    with torch.no_grad():
        cache = model(input_ids=IDS[:, :10], use_cache=True).past_key_values
        before = cache.layers[0].keys.clone()
        model(input_ids=IDS[:, 10:11], past_key_values=cache, use_cache=True)

    assert cache.get_seq_length() == 11
    assert torch.equal(cache.layers[0].keys[..., :10, :], before)


def test_padding_on_the_left_changes_nothing_that_is_seen(tiny):
    model = made(tiny, accumulate="integer")
    mask = torch.ones_like(IDS)
    mask[0, :5] = 0
    positions = (mask.cumsum(-1) - 1).clamp_min(0)

    padded = logits(model, attention_mask=mask, position_ids=positions)
    alone = logits(model, input_ids=IDS[:1, 5:])

    # Keys that stand elsewhere fall into other blocks of probabilities.
    assert apart(padded[:1, 5:], alone) < 0.05
    assert padded.isfinite().all()


@pytest.mark.parametrize("how", [{}, {"num_beams": 3}])
def test_it_generates_with_a_cache_what_it_generates_without(how, tiny):
    model = made(tiny, accumulate="integer")
    common = {"input_ids": IDS[:1, :8], "max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, **how}

    with torch.no_grad():
        cached, anew = (model.generate(**common, use_cache=use) for use in (True, False))

    assert torch.equal(cached, anew)


def test_the_gated_product_is_that_of_two_rounded_tensors(tiny):
    model = made(tiny)
    mlp: BlockMLP = model.model.layers[0].mlp
    x = snap(torch.randn(1, 4, 64, generator=torch.Generator().manual_seed(2)), 16)

    with torch.no_grad():
        gate, up = mlp.gate_proj(x), mlp.up_proj(x)
        wanted = mlp.down_proj(snap(mlp.table(gate, 16) * up, 16))
        assert torch.equal(mlp(x), wanted)


def test_the_residual_lies_on_the_grid_after_every_block(tiny):
    model, seen = made(tiny), []
    for layer in model.model.layers:
        layer.register_forward_hook(lambda _, args, out: seen.append(out))

    logits(model)

    assert len(seen) == 2
    assert all(torch.equal(x, snap(x, 16)) for x in seen)
    assert isinstance(model.model.norm, BlockNorm)
