"""`quantize int8`: which layers, which columns, what chains make of it, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file
from torch import nn

from command import overhaul, python, refused
from overhaul import artifact
from overhaul.errors import UserError
from overhaul.interop.bitsandbytes import OURS, THEIRS
from overhaul.layers.int8 import Int8Linear
from overhaul.layers.lora import PackedLoRALinear
from overhaul.packed import format_of
from overhaul.quantize.int8 import Int8, chosen
from tiny_models import MakeTiny

CALIB = [{"input_ids": torch.randint(3, 200, (4, 16), generator=torch.Generator().manual_seed(0))}]
QUICK = ["--evaluate", "none", "--dtype", "fp32"]
TRAIN = ["--data", "sample", "--batch-size", 2, "--seq-len", 32, "--lr", 3e-3]


@pytest.fixture
def model(tiny: Path) -> Any:
    return artifact.load(tiny).model


@pytest.fixture
def int8_directory(tiny: Path, tmp_path: Path) -> Path:
    assert overhaul("quantize", "int8", tiny, "-o", tmp_path / "int8", *QUICK).code == 0
    return tmp_path / "int8"


def int8_layers(model: nn.Module) -> dict[str, Int8Linear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, Int8Linear)}


def test_every_linear_layer_but_the_tied_head(model: Any):
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]

    Int8().apply(model, None)

    assert list(int8_layers(model)) == [name for name in names if name != "lm_head"]
    settings = model.config.quantization_config
    assert settings["quant_method"] == THEIRS
    assert settings["llm_int8_skip_modules"] == ["lm_head"]


def test_a_head_that_is_not_tied_is_skipped_unless_the_list_says_otherwise(make_tiny: MakeTiny):
    model = artifact.load(make_tiny(tie=False)).model

    assert "lm_head" not in chosen(model, ("lm_head",))
    assert "lm_head" in chosen(model, ())
    assert "lm_head" not in chosen(artifact.load(make_tiny()).model, ())


def test_layers_can_be_left_out_by_the_ends_of_their_names(model: Any):
    Int8(skip=("lm_head", "down_proj", "0.self_attn.q_proj")).apply(model, None)

    assert "model.layers.0.self_attn.q_proj" not in int8_layers(model)
    assert "model.layers.1.self_attn.q_proj" in int8_layers(model)
    assert not any(name.endswith("down_proj") for name in int8_layers(model))
    assert "model.layers.1.mlp.down_proj" in model.config.quantization_config["llm_int8_skip_modules"]


def test_columns_that_meet_outliers_are_kept(tiny: Path):
    dense, model = artifact.load(tiny).model, artifact.load(tiny).model
    for one in (dense, model):
        one.get_submodule("model.layers.1.input_layernorm").weight.data[5] = 40.0

    Int8(keep_outlier_columns=True).apply(model, CALIB)

    layer = int8_layers(model)["model.layers.1.self_attn.k_proj"]
    assert layer.outlier_columns is not None
    assert 5 in layer.outlier_columns.tolist()
    plain: Any = dense.get_submodule("model.layers.1.self_attn.k_proj")
    assert torch.equal(layer.dense()[:, 5], plain.weight[:, 5])
    assert format_of(model.config.quantization_config) == OURS


def test_kept_columns_come_back(make_tiny: MakeTiny, tmp_path: Path):
    words = ["--keep-outlier-columns", "--threshold", 2, "--samples", 2, "--seq-len", 32]
    done = overhaul("quantize", "int8", make_tiny(dtype="bfloat16"), "-o", tmp_path / "out", *words, *QUICK)
    assert done.code == 0, done.err

    model = artifact.load(tmp_path / "out").model
    stored = load_file(tmp_path / "out" / "model.safetensors")

    kept = {name: layer for name, layer in int8_layers(model).items() if layer.outlier_columns is not None}
    assert kept
    for name, layer in kept.items():
        assert torch.equal(layer.outlier_weight, stored[f"{name}.outlier_weight"])
        assert layer.outlier_weight is not None
        assert layer.outlier_weight.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("fields", "method"),
    [
        ({}, THEIRS),
        ({"granularity": "row"}, THEIRS),
        ({"threshold": 0.0}, THEIRS),
        ({"granularity": "tensor"}, OURS),
        ({"zero_point": True}, OURS),
    ],
    ids=str,
)
def test_what_bitsandbytes_would_compute_otherwise_does_not_go_by_its_name(model: Any, fields: Any, method: str):
    Int8(**fields).apply(model, None)

    assert format_of(model.config.quantization_config) == method


# Chains.


def test_pruned_weights_are_still_zero(tiny: Path, tmp_path: Path):
    pruned, out = tmp_path / "pruned", tmp_path / "int8"
    assert overhaul("prune", "magnitude", tiny, "-o", pruned, *QUICK).code == 0
    assert overhaul("quantize", "int8", pruned, "-o", out, *QUICK).code == 0

    before, layers = artifact.load(pruned).model, int8_layers(artifact.load(out).model)

    for name, layer in layers.items():
        masked: Any = before.get_submodule(name)
        assert (layer.weight[~masked.mask] == 0).all()
    assert not (out / "masks.safetensors").exists()
    assert json.loads(overhaul("show", out, "--json").out)["nonzero_share_blocks"] <= 0.5


def test_an_adapter_trains_on_top_and_is_read_back_apart(int8_directory: Path, tmp_path: Path):
    out = tmp_path / "adapter"
    done = overhaul("adapt", "lora", int8_directory, "-o", out, "--no-merge", "--steps", 16, *TRAIN, *QUICK)
    assert done.code == 0, done.err

    losses = [json.loads(line)["loss"] for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert sum(losses[-4:]) < sum(losses[:4]) - 0.1
    model = artifact.load(out).model
    layer = model.get_submodule("model.layers.0.mlp.up_proj")
    assert isinstance(layer, PackedLoRALinear)
    assert layer.lora_B.abs().sum() > 0
    base = int8_layers(artifact.load(int8_directory).model)["model.layers.0.mlp.up_proj"]
    assert isinstance(layer.base, Int8Linear)
    assert torch.equal(layer.base.weight, base.weight)


def test_merged_it_is_dense_and_says_so(int8_directory: Path, tmp_path: Path):
    out = tmp_path / "merged"
    words = ["--targets", "q_proj", "--steps", 2, *TRAIN, *QUICK]
    done = overhaul("adapt", "lora", int8_directory, "-o", out, *words)

    assert done.code == 0, done.err
    assert "the result is dense" in done.err
    assert "quantization_config" not in json.loads((out / "config.json").read_text())
    stored = load_file(out / "model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {torch.float32}
    base = int8_layers(artifact.load(int8_directory).model)["model.layers.0.mlp.up_proj"]
    assert torch.equal(stored["model.layers.0.mlp.up_proj.weight"], base.dense())


def test_it_is_measured_compared_shown_and_generates(tiny: Path, int8_directory: Path):
    small = ["--windows", 2, "--seq-len", 32]
    assert overhaul("measure", "perplexity", int8_directory, *small).code == 0
    compared = overhaul("compare", tiny, int8_directory, *small, "--json")
    assert compared.code == 0, compared.err
    dense, int8 = json.loads(compared.out)["rows"]
    assert int8["parameters"] == dense["parameters"]
    assert int8["perplexity"]["value"] == pytest.approx(dense["perplexity"]["value"], rel=0.01)
    assert int8["bytes"] < 0.6 * dense["bytes"]
    assert overhaul("generate", int8_directory, "--prompt", "It was", "--tokens", 5).code == 0


def test_decoding_with_a_cache_is_decoding_without(int8_directory: Path):
    model: Any = artifact.load(int8_directory).model
    ids_BT = torch.arange(30).view(1, 30)

    with torch.no_grad():
        whole = model(ids_BT).logits[0, -1]
        first = model(ids_BT[:, :-1], use_cache=True)
        step = model(ids_BT[:, -1:], past_key_values=first.past_key_values).logits[0, -1]

    # One row is multiplied with activations in 16 bit, thirty in int8.
    assert float((whole - step).norm() / whole.norm()) < 0.03


PEAK = """
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.initialization import no_init_weights
from overhaul import machine
from overhaul.quantize.int8 import Int8

def model(blocks):
    with no_init_weights():
        made = LlamaForCausalLM(LlamaConfig(num_hidden_layers=blocks, hidden_size=512, intermediate_size=2048,
                                            num_attention_heads=8, vocab_size=64)).eval()
    for parameter in made.parameters():
        parameter.data.fill_(0.01)
    return made

with torch.no_grad():
    Int8().apply(model(1), None)  # whatever is loaded at first use is there now
    large = model(24)
    machine.release_memory()
    machine.reset_peak_rss()
    before = machine.peak_rss_bytes()
    Int8().apply(large, None)
print((machine.peak_rss_bytes() - before) / sum(m.num_weights for m in large.modules() if hasattr(m, "num_weights")))
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's high-water mark")
def test_never_two_models_in_memory():
    done = python(PEAK)

    assert done.code == 0, done.err
    assert float(done.out) < 0.5, "bytes a weight on top of the dense model; all integers beside it would be 1"


# Mistakes.


@pytest.mark.parametrize("threshold", [-1, float("nan"), float("inf")])
def test_a_threshold_is_a_number_from_zero(threshold: float):
    with pytest.raises(ValidationError, match="threshold"):
        Int8(threshold=threshold)


def test_columns_are_not_kept_without_a_threshold():
    with pytest.raises(ValidationError, match="keep_outlier_columns"):
        Int8(threshold=0, keep_outlier_columns=True)


def test_a_layer_that_is_not_there_is_named(tiny: Path, tmp_path: Path):
    done = overhaul("quantize", "int8", tiny, "-o", tmp_path / "out", "--skip", "dawn_proj")

    refused(done, "dawn_proj", "down_proj")
    assert not (tmp_path / "out").exists()


def test_a_weight_that_is_not_finite_is_named_before_anything_changes(model: Any):
    model.get_submodule("model.layers.1.mlp.up_proj").weight.data[2, 3] = float("inf")

    with pytest.raises(UserError, match=r"model\.layers\.1\.mlp\.up_proj\.weight"):
        Int8().apply(model, None)
    assert not int8_layers(model)


def test_twice_is_refused(int8_directory: Path, tmp_path: Path):
    refused(overhaul("quantize", "int8", int8_directory, "-o", tmp_path / "out"), "is quantized", "bitsandbytes")
    with pytest.raises(UserError, match="already"):
        Int8().apply(artifact.load(int8_directory).model, None)


def test_what_needs_dense_weights_is_refused(int8_directory: Path, tmp_path: Path):
    for words in (["prune", "magnitude"], ["adapt", "full", "--data", "sample"]):
        refused(overhaul(*words[:2], int8_directory, "-o", tmp_path / "out", *words[2:]), "is quantized", "adapt lora")
