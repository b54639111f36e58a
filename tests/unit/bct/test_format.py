from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from bct_formula import formula_bytes
from command import contents, overhaul, python, refused
from overhaul import artifact, packed
from overhaul.bct.format import refuse, scheme_of
from overhaul.bct.model import block_matrices
from overhaul.bct.scheme import Scheme
from overhaul.errors import UserError

IDS = torch.arange(40).view(2, 20)
QUICK = ["--evaluate", "none", "--dtype", "fp32"]


def written(model: Path, out: Path, *more: object) -> Path:
    done = overhaul("quantize", "bct", model, "-o", out, *more, *QUICK)
    assert done.code == 0, done.err
    return out


@torch.no_grad()
def logits(path: Path) -> torch.Tensor:
    model: Any = artifact.load(path, dtype=torch.float32).model
    return model(IDS).logits


@pytest.mark.parametrize("mode", ["w8a8", "w4a8", "w8a32", "w4a32"])
@pytest.mark.parametrize("tie", [True, False])
def test_a_directory_is_read_as_it_was_written(mode, tie, make_tiny, tmp_path):
    out = written(make_tiny(tie=tie), tmp_path / "out", "--mode", mode, "--block", "3x40")
    first = artifact.load(out, dtype=torch.float32)
    (tmp_path / "again").mkdir()
    artifact.write_model(first, tmp_path / "again")

    tensors, again = (load_file(path / "model.safetensors") for path in (out, tmp_path / "again"))
    assert tensors.keys() == again.keys()
    assert all(torch.equal(tensors[name], again[name]) for name in tensors)
    assert packed.is_packed(first.model)


def test_scales_in_fp16_do_not_make_the_rest_fp16(make_tiny, tmp_path):
    out = written(make_tiny(dtype="bfloat16"), tmp_path / "out", "--mode", "w4a32", "--scale", "fp16")
    (tmp_path / "again").mkdir()

    made = artifact.load(out)
    artifact.write_model(made, tmp_path / "again")

    assert made.dtype == torch.bfloat16
    assert contents(out)["model.safetensors"] == contents(tmp_path / "again")["model.safetensors"]


def test_integers_that_config_says_nothing_of_are_refused(tiny, tmp_path):
    out = written(tiny, tmp_path / "out")
    config = json.loads((out / "config.json").read_text())
    del config["quantization_config"]
    (out / "config.json").write_text(json.dumps(config))

    with pytest.raises(UserError, match="weights as integers"):
        artifact.load(out)


def test_the_model_that_is_read_computes_what_the_written_one_did(tiny, tmp_path):
    from overhaul.quantize.bct import Bct

    model: Any = artifact.load(tiny, dtype=torch.float32).model
    with torch.no_grad():
        before = Bct(mode="w4a8").apply(model, None)(IDS).logits

    assert torch.equal(logits(written(tiny, tmp_path / "out", "--mode", "w4a8")), before)


@pytest.mark.parametrize("parts", [("matmul", "residual"), ("weights", "cache"), ("embedding", "norm")])
@pytest.mark.parametrize("tie", [True, False])
def test_parts_that_stay_float_are_stored_and_computed_as_such(parts, tie, make_tiny, tmp_path):
    from overhaul.quantize.bct import Bct

    path = make_tiny(tie=tie)
    model: Any = artifact.load(path, dtype=torch.float32).model
    with torch.no_grad():
        before = Bct(parts=parts).apply(model, None)(IDS).logits

    assert torch.equal(logits(written(path, tmp_path / "out", "--parts", *parts)), before)


def test_the_configuration_says_how_the_integers_lie(tiny, tmp_path):
    out = written(tiny, tmp_path / "out", "--mode", "w4a8", "--block", "2x64", "--parts", "weights", "norm")
    config = json.loads((out / "config.json").read_text())["quantization_config"]
    tensors = load_file(out / "model.safetensors")

    assert (config["format"], config["version"]) == ("bct", 1)
    assert scheme_of(config) == Scheme(mode="w4a8", block="2x64", parts=("weights", "norm"))
    assert tensors["model.layers.0.mlp.up_proj.weight"].shape == (128, 32)
    assert tensors["model.layers.0.mlp.up_proj.scale"].shape == (64, 1)
    assert tensors["model.embed_tokens.weight"].is_floating_point()


@pytest.mark.parametrize("mode", ["w8a8", "w4a32"])
def test_bytes_on_disk_are_those_of_the_formula_and_the_header(mode, tiny, tmp_path):
    out = written(tiny, tmp_path / "out", "--mode", mode)
    header = int.from_bytes((out / "model.safetensors").read_bytes()[:8], "little") + 8

    dense = artifact.load(tiny, dtype=torch.float32).model
    assert artifact.size_on_disk(out) == formula_bytes(dense, int(mode[1]), 64, 4) + header


def test_a_budget_chooses_widths_that_are_kept(tiny, tmp_path):
    out = written(tiny, tmp_path / "out", "--mode", "w4a32", "--budget", "0.2")
    model = artifact.load(out, dtype=torch.float32).model

    widths = {name: matrix.bits for name, matrix in block_matrices(model).items()}
    assert set(widths.values()) == {4, 8}
    dense_bytes = 4 * sum(p.numel() for p in artifact.load(tiny).model.parameters())
    assert sum(tensor.nbytes for tensor in load_file(out / "model.safetensors").values()) <= 0.2 * dense_bytes
    assert "within the budget" in (out / "report.html").read_text()


def test_dense_stores_what_plain_transformers_loads(tiny, tmp_path):
    from transformers import AutoModelForCausalLM

    out = written(tiny, tmp_path / "dense", "--mode", "w4a32", "--store", "dense")
    integers = written(tiny, tmp_path / "packed", "--mode", "w4a32")

    assert "quantization_config" not in json.loads((out / "config.json").read_text())
    plain: Any = AutoModelForCausalLM.from_pretrained(out)
    with torch.no_grad():
        torch.testing.assert_close(plain(IDS).logits, logits(integers), rtol=1e-5, atol=1e-5)


def test_commands_read_a_packed_directory(tiny, tmp_path):
    out = written(tiny, tmp_path / "out")
    before = contents(out)

    shown = json.loads(overhaul("show", out, "--json").out)
    assert shown["parameters"] == sum(p.numel() for p in artifact.load(tiny).model.parameters())
    assert 0.9 < shown["nonzero_share"] <= 1
    small = ["--windows", "2", "--seq-len", "32"]
    for command in (
        ["measure", "perplexity", out, *small],
        ["compare", tiny, out, *small],
        ["generate", out, "--prompt", "Once", "--tokens", "3"],
    ):
        done = overhaul(*command)
        assert done.code == 0, done.err
    assert contents(out) == before


def test_plain_transformers_refuses_a_packed_directory(tiny, tmp_path):
    from transformers import AutoModelForCausalLM

    out = written(tiny, tmp_path / "out")

    with pytest.raises(ValueError, match="quant"):
        AutoModelForCausalLM.from_pretrained(out)


def test_the_card_says_how_to_load_it(tiny, tmp_path, monkeypatch):
    card = (written(tiny, tmp_path / "out") / "README.md").read_text()
    monkeypatch.chdir(tmp_path)

    snippet = card.split("```python\n")[1].split("```")[0]
    done = python(snippet)
    assert done.code == 0, done.err
    assert len(done.out) > 1
    assert "AutoModelForCausalLM" not in card
    assert "base_model_relation: quantized" in card


@pytest.mark.parametrize("verb", [["quantize", "bct"], ["prune", "magnitude"], ["adapt", "lora"]])
def test_what_is_packed_is_not_changed_again(verb, tiny, tmp_path):
    out = written(tiny, tmp_path / "out")

    refused(overhaul(*verb, out, "-o", tmp_path / "twice", "--data", "sample", *QUICK), "quantized (bct)")
    assert not (tmp_path / "twice").exists()


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"version": 2}, "version 2"),
        ({"block": "0x4"}, "is no block"),
        ({"mode": "w2a2"}, "mode"),
    ],
)
def test_settings_that_are_not_known_are_refused(changed, said):
    settings = {"format": "bct", "version": 1, **Scheme().model_dump(mode="json"), "bits": {}}

    refuse(settings)
    with pytest.raises(UserError) as caught:
        refuse(settings | changed)
    assert said in str(caught.value)
