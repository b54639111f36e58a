"""Which matrices are drawn: counts by hand, balance over blocks, and what is refused."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, Phi3Config

from overhaul.errors import UserError
from overhaul.halves import Halves, Matrix, draw, matrices, select, train_half
from overhaul.matrices import Category, Listed, manifest

Make = Callable[..., Path]
HALF = Halves()


def load(path: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(path)


@pytest.fixture(scope="module")
def smol_shaped() -> nn.Module:
    """A model of SmolLM2-135M's shape, without weights."""
    config: Any = LlamaConfig(
        num_hidden_layers=30, hidden_size=576, intermediate_size=1536, num_attention_heads=9, num_key_value_heads=3,
        vocab_size=49152, tie_word_embeddings=True,
    )  # fmt: skip
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def llama_like(blocks: int) -> list[Matrix]:
    """The matrices of a Llama, by name only."""
    names = {"attention": "qkvo", "mlp": ("up", "gate", "down"), "norm": ("one", "two")}
    return [
        Matrix(f"{block}.{kind}.{name}", (f"{block}.{kind}.{name}",), kind, block)
        for block in range(blocks)
        for kind, of in names.items()
        for name in of
    ]


def by_block(drawn: list[Matrix], category: str) -> Counter[int]:
    return Counter(one.block for one in drawn if one.category == category)


def test_half_of_smollm2_is_the_papers_rule(smol_shaped: nn.Module):
    drawn = draw(matrices(manifest(smol_shaped)), HALF, seed=0, number=1)

    assert set(by_block(drawn, "attention").values()) == {2}
    assert Counter(by_block(drawn, "mlp").values()) == {2: 15, 1: 15}
    assert set(by_block(drawn, "norm").values()) == {1}
    assert len(by_block(drawn, "attention")) == len(by_block(drawn, "norm")) == 30


def test_the_realised_share_counts_the_embedding_and_groups_of_heads(smol_shaped: nn.Module):
    half = train_half(smol_shaped.requires_grad_(True), HALF, seed=0, draw=1)

    assert half.counts == {"attention": (60, 120), "mlp": (45, 90), "norm": (30, 60)}
    trained = sum(p.numel() for p in smol_shaped.parameters() if p.requires_grad)
    assert half.share == trained / sum(p.numel() for p in smol_shaped.parameters())
    assert 0.57 < half.share < 0.64
    frozen = train_half(smol_shaped.requires_grad_(True), Halves(freeze_embeddings=True), seed=0, draw=1)
    assert frozen.share == pytest.approx(half.share - 49152 * 576 / sum(p.numel() for p in smol_shaped.parameters()))


@pytest.mark.parametrize(("blocks", "twos"), [(2, 1), (5, 2), (7, 3)])
def test_an_odd_block_is_one_of_those_with_one_mlp_matrix(blocks: int, twos: int):
    counts = by_block(draw(llama_like(blocks), HALF, seed=3, number=1), "mlp")

    assert Counter(counts[block] for block in range(blocks)) == {2: twos, 1: blocks - twos}


@pytest.mark.parametrize("share", [0.4, 0.5, 0.6, 0.7, 1.0])
def test_other_shares_are_exact_over_the_blocks(share: float):
    drawn = draw(llama_like(10), Halves(share=share), seed=1, number=2)

    for category, each in (("attention", 4), ("mlp", 3), ("norm", 2)):
        counts = by_block(drawn, category)
        assert sum(counts.values()) == round(share * each * 10)
        assert max(counts.values()) - min(counts[block] for block in range(10)) <= 1


@pytest.mark.parametrize(("level", "expected"), [("layer", 5 * 9), ("model", 45)])
def test_the_other_levels(level: Any, expected: int):
    drawn = draw(llama_like(10), Halves(level=level), seed=1, number=1)

    assert len(drawn) == expected
    per_block = Counter(one.block for one in drawn)
    assert (set(per_block.values()) == {9}) == (level == "layer")


def test_a_draw_follows_from_seed_and_number_alone():
    found = llama_like(6)
    first = draw(found, HALF, seed=0, number=1)

    assert {one.name for one in draw(found[::-1], HALF, seed=0, number=1)} == {one.name for one in first}
    for seed, number in ((0, 2), (1, 1)):
        assert {one.name for one in draw(found, HALF, seed=seed, number=number)} != {one.name for one in first}


@pytest.mark.parametrize("level", ["category", "layer", "model"])
def test_every_matrix_is_trained_in_half_of_the_draws(level: Any):
    """Each draw is independent, so a count over 50 draws spreads by 7%: 15% is two of that, 30% more than four."""
    found = llama_like(30)
    draws = [draw(found, Halves(level=level), seed=0, number=number) for number in range(1, 51)]
    times = Counter(one.name for drawn in draws for one in drawn)
    shares = [times[one.name] / 50 for one in found]

    assert statistics.fmean(shares) == pytest.approx(0.5)
    assert all(0.2 <= share <= 0.8 for share in shares)
    assert statistics.fmean(0.35 <= share <= 0.65 for share in shares) > 0.9


def test_a_bias_follows_its_matrix(make_tiny: Make):
    model = load(make_tiny(architecture="opt", bias=True))
    half = train_half(model, HALF, seed=0, draw=1)

    for name, parameter in model.named_parameters():
        if name.endswith(".bias") and ".layers." in name:
            assert parameter.requires_grad == model.get_parameter(name[: -len("bias")] + "weight").requires_grad
    assert half.counts == {"attention": (4, 8), "mlp": (2, 4), "norm": (2, 4)}


def test_fused_matrices_are_trained_by_whole_layers_only():
    config: Any = Phi3Config(
        num_hidden_layers=2, hidden_size=32, intermediate_size=64, num_attention_heads=2, vocab_size=64, pad_token_id=0
    )
    model = AutoModelForCausalLM.from_config(config)

    for level in ("category", "model"):
        with pytest.raises(UserError, match=r"qkv_proj.weight holds several matrices[^$]*--level layer"):
            select(manifest(model), Halves(level=level), seed=0, number=1)
    half = train_half(model, Halves(level="layer"), seed=0, draw=1)
    assert len({name.split(".")[2] for name in half.names if name.startswith("model.layers.")}) == 1


def listed(*names: tuple[str, Category, int]) -> list[Listed]:
    return [
        Listed(name, nn.Parameter(torch.zeros(2, 2)), category, block, name.rpartition(".")[0])
        for name, category, block in names
    ]


def test_experts_count_one_by_one():
    names: list[tuple[str, Category, int]] = [
        (f"{block}.experts.{expert}.{way}.weight", "mlp", block)
        for block in range(2)
        for expert in range(4)
        for way in ("up", "down")
    ]
    names += [(f"{block}.attn.{way}.weight", "attention", block) for block in range(2) for way in "qkvo"]
    drawn = select(listed(*names), HALF, seed=0, number=1)

    assert Counter(name.split(".")[0] for name in drawn if "experts" in name) == {"0": 4, "1": 4}


def test_blocks_without_attention_are_told_apart_only_if_asked():
    without = listed(*((f"{block}.mixer.{way}.weight", "mlp", block) for block in range(2) for way in ("a", "b")))

    with pytest.raises(
        UserError, match=r"block 0 has no attention matrices; it has 0.mixer.a.weight[^$]*--level model"
    ):
        select(without, HALF, seed=0, number=1)
    assert len(select(without, Halves(level="model"), seed=0, number=1)) == 2


@pytest.mark.parametrize(("choice", "says"), [
    (Halves(share=0.2), "none of the 4 norm matrices"),
    (Halves(share=0.1, level="layer"), "none at all"),
])  # fmt: skip
def test_a_share_that_trains_nothing(choice: Halves, says: str):
    with pytest.raises(UserError, match=says):
        draw(llama_like(2), choice, seed=0, number=1)


def test_what_was_frozen_stays_frozen(tiny: Path):
    model = load(tiny)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("layers.0" not in name)
    half = train_half(model, HALF, seed=0, draw=1)

    assert half.parameters
    assert not any("layers.0" in name for name in half.names)
    with pytest.raises(UserError, match="nothing is left to train"):
        train_half(model.requires_grad_(False), HALF, seed=0, draw=2)


@pytest.mark.parametrize(("tie", "flag", "frozen"), [
    (True, "freeze_embeddings", "model.embed_tokens.weight"),
    (False, "freeze_embeddings", "model.embed_tokens.weight"),
    (False, "freeze_head", "lm_head.weight"),
    (True, "freeze_final_norm", "model.norm.weight"),
])  # fmt: skip
def test_what_lies_outside_of_the_blocks_is_trained_unless_it_is_named(
    make_tiny: Make, tie: bool, flag: str, frozen: str
):
    path = make_tiny(tie=tie)
    outside = {one.name for one in manifest(load(path)) if one.block is None}

    assert train_half(load(path), HALF, seed=0, draw=1).names >= outside
    names = train_half(load(path), Halves.model_validate({flag: True}), seed=0, draw=1).names
    assert outside - names == {frozen}


def test_a_tied_head_cannot_be_frozen_by_itself(tiny: Path):
    with pytest.raises(UserError, match="--freeze-embeddings"):
        train_half(load(tiny), Halves(freeze_head=True), seed=0, draw=1)
