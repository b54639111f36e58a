"""`adapt randlora` and `adapt vera` through the command line, and how many numbers they train."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaConfig

from command import overhaul, refused
from overhaul.adapt.lora import LoRA
from overhaul.adapt.randlora import RandLoRA
from overhaul.adapt.vera import VeRA
from overhaul.select import select_linears

TRAIN = ("--data", "sample", "--steps", "2", "--seq-len", "32", "--batch-size", "2")
QUICK = (*TRAIN, "--dtype", "fp32", "--evaluate", "none")
SMOL = LlamaConfig(
    vocab_size=64, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
    num_key_value_heads=3,
)  # fmt: skip
"""SmolLM2-135M but for its vocabulary."""


@pytest.mark.parametrize(
    ("method", "expected"),
    [
        (RandLoRA(targets=("q_proj", "v_proj")), 368_640),
        (RandLoRA(), 1_722_240),
        (RandLoRA(rank=64), 910_080),
        (RandLoRA(rank=8), 6_595_200),
        (LoRA(rank=8), 2_442_240),
        (VeRA(), 30 * (3 * 576 + 2 * 192 + 2 * 1536 + 7 * 256)),
    ],
    ids=repr,
)
def test_it_trains_as_many_numbers_of_smollm2_as_the_formula_says(method: Any, expected: int):
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(SMOL)

    trained = method.attach(model, select_linears(model, method.targets))

    assert sum(parameter.numel() for parameter in trained) == expected


def test_a_rank_that_leaves_one_base_is_told(tiny: Path, tmp_path: Path):
    done = overhaul("adapt", "randlora", tiny, "-o", tmp_path / "out", "--rank", "32", *QUICK)

    assert "--rank 32 is not below the smaller side of 4 of 14 layers" in done.err, done.err
    assert "k_proj (32): they have a single base and 64 trained numbers" in done.err


@pytest.mark.parametrize("method", ["randlora", "vera"])
def test_an_adapter_kept_apart_is_a_model_for_every_verb(method: str, tiny: Path, tmp_path: Path):
    flags = ("--rank", "8", "--no-merge", *QUICK)
    assert overhaul("adapt", method, tiny, "-o", tmp_path / "adapter", *flags).code == 0
    measured = overhaul("measure", "perplexity", tmp_path / "adapter", "--data", "sample", "--json")
    pruned = overhaul("prune", "magnitude", tmp_path / "adapter", "-o", tmp_path / "pruned", "--evaluate", "none")

    assert (measured.code, pruned.code) == (0, 0), measured.err + pruned.err
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["peft_type"] == method.upper()


def test_the_nearest_lora_is_written_with_what_it_leaves_out(tiny: Path, tmp_path: Path):
    flags = ("--rank", "16", "--no-merge", *QUICK)
    own, low, full = (tmp_path / name for name in ("own", "low", "full"))
    assert overhaul("adapt", "randlora", tiny, "-o", own, *flags).code == 0
    assert overhaul("adapt", "randlora", tiny, "-o", low, *flags, "--as-lora", "4").code == 0
    assert overhaul("adapt", "randlora", tiny, "-o", full, *flags, "--as-lora", "64").code == 0

    table = json.loads((low / "overhaul.json").read_text())["tables"][0]
    assert len(table["rows"]) == 14
    assert all(0 < float(row[1].rstrip("%")) < 100 for row in table["rows"])
    assert json.loads((low / "adapter_config.json").read_text())["peft_type"] == "LORA"
    tensors = load_file(full / "adapter_model.safetensors")
    merged = {name: load(path) for name, path in (("own", own), ("full", full), ("low", low))}
    for name, parameter in merged["own"].items():
        torch.testing.assert_close(merged["full"][name], parameter, rtol=1e-4, atol=1e-5)
    assert tensors["base_model.model.model.layers.0.self_attn.k_proj.lora_A.weight"].shape == (64, 64)
    name = "model.layers.0.mlp.up_proj.weight"
    assert not torch.equal(merged["low"][name], merged["own"][name])


def load(path: Path) -> dict[str, torch.Tensor]:
    from overhaul import artifact

    return artifact.load(path).model.state_dict()


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (("--save-bases",), "--save-bases is for an adapter that is kept apart"),
        (("--as-lora", "4"), "--as-lora is for an adapter that is kept apart"),
        (("--no-merge", "--as-lora", "4", "--save-bases"), "leave --save-bases out"),
        (("--targets", "embed_tokens"), "model.embed_tokens (Embedding) is no linear layer"),
        (("--rank", "0"), "greater than 0"),
    ],
)
def test_what_does_not_go_together_is_refused(flags: tuple[str, ...], told: str, tiny: Path, tmp_path: Path):
    done = overhaul("adapt", "randlora", tiny, "-o", tmp_path / "out", *flags, *QUICK)

    refused(done, told)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("method", "told"), [("randlora", "without --no-merge"), ("vera", "perp --train mask_lora")])
def test_an_adapter_apart_from_a_pruned_model_is_refused(tiny: Path, tmp_path: Path, method: str, told: str):
    assert overhaul("prune", "magnitude", tiny, "-o", tmp_path / "half", "--evaluate", "none").code == 0

    words = ("--rank", "8", "--no-merge", *QUICK)
    done = overhaul("adapt", method, tmp_path / "half", "-o", tmp_path / "out", *words)

    refused(done, "pruned weights", told)
