from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from safetensors.torch import load_file as load_tensors
from safetensors.torch import save_file

from command import overhaul, refused

TRAIN = ["--data", "sample", "--steps", "8", "--seq-len", "32", "--lr", "1e-2", "--evaluate", "none", "--dtype", "fp32"]


@pytest.fixture(scope="module")
def tuned(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("tuned") / "full"
    assert overhaul("adapt", "full", tiny, "-o", out, *TRAIN).code == 0
    return out


def changed(model: Path, out: Path, change: Callable[[str, torch.Tensor], torch.Tensor]) -> Path:
    """A copy of a model directory with other weights."""
    shutil.copytree(model, out)
    weights = {
        name: change(name, tensor).contiguous() for name, tensor in load_tensors(out / "model.safetensors").items()
    }
    save_file(weights, out / "model.safetensors", metadata={"format": "pt"})
    return out


def measured(*arguments: object) -> dict:
    done = overhaul("measure", "drift", *arguments, "--json")
    assert done.code == 0, done.err
    return json.loads(done.out)


def values(found: dict) -> dict[str, float]:
    return {row["metric"]: row["value"] for row in found["rows"]}


def test_a_copy_has_not_moved(tiny: Path, tmp_path: Path):
    found = measured(tiny, shutil.copytree(tiny, tmp_path / "copy"))

    assert set(values(found).values()) == {0}
    assert "drift/ratio" not in values(found)
    assert any("nothing was trained" in note for note in found["notes"])


@pytest.mark.parametrize("tie", [True, False], ids=["tied", "untied"])
def test_scaled_weights_have_moved_by_the_scale_less_one_everywhere(make_tiny, tmp_path: Path, tie: bool):
    model = make_tiny(tie=tie, bias=True)
    found = values(measured(model, changed(model, tmp_path / "scaled", lambda name, tensor: tensor * 1.25)))

    assert found.pop("drift/ratio") == pytest.approx(1, rel=1e-6)
    assert list(found.values()) == pytest.approx([0.25] * len(found), rel=1e-6)
    assert {"drift/block-00", "drift/block-01", "drift/bottom", "drift/top", "drift/kind/q_proj"} <= found.keys()
    assert {"drift/embedding", "drift/final-norm", "drift/kind/input_layernorm"} <= found.keys()
    assert ("drift/head" in found) is not tie


def test_it_is_what_numpy_computes_from_the_files(tiny: Path, tuned: Path):
    w_0, w_t = load_file(tiny / "model.safetensors"), load_file(tuned / "model.safetensors")

    def reference(part: str) -> float:
        before, after = (
            np.concatenate([w[name].astype(np.float64).ravel() for name in sorted(w_0) if part in name])
            for w in (w_0, w_t)
        )
        return float(np.linalg.norm(after - before) / np.linalg.norm(before))

    found = measured(tiny, tuned)

    told = values(found)
    bottom, top = reference(".layers.0."), reference(".layers.1.")
    assert (told["drift/block-00"], told["drift/block-01"]) == pytest.approx((bottom, top), rel=1e-6)
    assert (told["drift/bottom"], told["drift/top"]) == pytest.approx((bottom, top), rel=1e-6)
    assert told["drift/ratio"] == pytest.approx(bottom / top, rel=1e-6)
    assert told["drift/kind/down_proj"] == pytest.approx(reference("down_proj"), rel=1e-6)
    assert told["drift/embedding"] == pytest.approx(reference("embed_tokens"), rel=1e-6)
    for record in found["details"]:
        assert record["relative"] == pytest.approx(reference(record["name"]), rel=1e-5)
    assert {record["name"] for record in found["details"]} == set(w_0)


def test_few_blocks_are_halved_and_it_is_said(tiny: Path, tuned: Path):
    found = measured(tiny, tuned)

    assert any("2 blocks: 1 at the bottom and 1 at the top" in note for note in found["notes"])
    assert "notes" not in measured(tiny, tuned, "--ends", "1")


def test_an_adapter_is_merged_and_its_base_rests(tiny: Path, tmp_path: Path):
    for name, more in (("apart", ["--no-merge"]), ("merged", [])):
        assert overhaul("adapt", "lora", tiny, "-o", tmp_path / name, *TRAIN, *more).code == 0

    apart, merged = (values(measured(tiny, tmp_path / name)) for name in ("apart", "merged"))

    assert apart == pytest.approx(merged, rel=1e-3)
    assert apart["drift/kind/q_proj"] > 0
    assert apart["drift/kind/input_layernorm"] == apart["drift/embedding"] == 0


@pytest.mark.parametrize("method", ["int8", "bct"])
def test_a_quantized_model_has_moved_by_its_rounding(tiny: Path, tmp_path: Path, method: str):
    done = overhaul("quantize", method, tiny, "-o", tmp_path / "packed", "--evaluate", "none")
    assert done.code == 0, done.err

    found = values(measured(tiny, tmp_path / "packed"))

    assert 0 < found["drift/kind/q_proj"] < 0.02
    assert found["drift/ratio"] == pytest.approx(1, rel=0.3)


def test_factors_that_were_never_merged_are_measured_as_their_product(tiny: Path, tmp_path: Path):
    for name, more in (("apart", ["--no-merge"]), ("merged", [])):
        done = overhaul("adapt", "sltrain", tiny, "-o", tmp_path / name, *TRAIN, "--rank", "6", *more)
        assert done.code == 0, done.err

    apart, merged = (values(measured(tiny, tmp_path / name)) for name in ("apart", "merged"))

    assert apart == pytest.approx(merged, rel=1e-4)


def test_the_page_has_the_curve_and_every_matrix(tiny: Path, tuned: Path, tmp_path: Path):
    done = overhaul("measure", "drift", tiny, tuned, "--html", tmp_path / "page.html")
    assert done.code == 0, done.err

    page = (tmp_path / "page.html").read_text()
    assert "How far each block has moved" in page
    assert "model.layers.1.mlp.down_proj" in page


def test_a_base_of_zeros_gives_no_number_where_there_is_none(tiny: Path, tmp_path: Path):
    zeros = changed(tiny, tmp_path / "zeros", lambda name, w: w * ("layers.0." not in name))

    found = measured(zeros, tiny)

    assert "drift/block-00" not in values(found)
    assert values(found)["drift/block-01"] == 0
    assert any("drift/block-00" in note and "zero" in note for note in found["notes"])
    assert "Infinity" not in json.dumps(found)


# Mistakes.


def test_one_model_alone(tiny: Path):
    refused(overhaul("measure", "drift", tiny), "alone has no difference")


def test_models_with_other_layers(tiny: Path, tmp_path: Path):
    shrink = ["--layers", "1", "--ffn", "64", "--samples", "4", "--seq-len", "32", "--evaluate", "none"]
    assert overhaul("shrink", "minitron", tiny, "-o", tmp_path / "small", *shrink).code == 0

    refused(overhaul("measure", "drift", tiny, tmp_path / "small"), "has other layers than")


def test_tensors_that_only_one_model_has_are_left_out_and_named(make_tiny):
    found = measured(make_tiny(tie=False, bias=True), make_tiny(tie=False))

    assert any("q_proj.bias is left out" in note for note in found["notes"])
    assert "model.layers.0.self_attn.q_proj.bias" not in {record["name"] for record in found["details"]}


def test_a_norm_that_is_not_a_number_is_named(tiny: Path, tmp_path: Path):
    broken = changed(
        tiny, tmp_path / "broken", lambda name, w: w * (float("nan") if name == "model.norm.weight" else 1)
    )

    refused(overhaul("measure", "drift", tiny, broken), "tensor model.norm.weight has 64 values")


@pytest.mark.parametrize("ends", ["0", "-1"])
def test_no_blocks_at_the_ends(tiny: Path, ends: str):
    refused(overhaul("measure", "drift", tiny, tiny, "--ends", ends), "ends")
