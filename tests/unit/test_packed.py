"""Directories with packed weights: back bit for bit, in one file or several, and what is wrong with them is said."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from overhaul import artifact, packed
from overhaul.errors import UserError
from overhaul.layers.int8 import Int8Linear
from overhaul.quantize.int8 import Int8
from tiny_models import MakeTiny

UP = "model.layers.0.mlp.up_proj"
IDS_BT = torch.arange(40).view(2, 20)


def quantized(source: Path, directory: Path, **fields: Any) -> artifact.Artifact:
    """Quantizes and writes; returns what was written from memory."""
    made = artifact.load(source)
    with torch.no_grad():
        Int8(**fields).apply(made.model, None)
    directory.mkdir()
    artifact.write_model(made, directory)
    return made


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS_BT).logits


@pytest.fixture
def out(tiny: Path, tmp_path: Path) -> Path:
    quantized(tiny, tmp_path / "out")
    return tmp_path / "out"


def rewritten(directory: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> Path:
    """The directory with other tensors."""
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


@pytest.mark.parametrize("tie", [True, False])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "fields",
    [{}, {"granularity": "row"}, {"granularity": "tensor"}, {"zero_point": True, "threshold": 0.0}],
    ids=lambda fields: "-".join(map(str, fields)) or "default",
)
def test_it_comes_back_bit_for_bit(make_tiny: MakeTiny, dtype: str, tie: bool, fields: dict[str, Any], tmp_path: Path):
    made = quantized(make_tiny(dtype=dtype, tie=tie, bias=True), tmp_path / "out", **fields)

    again = artifact.load(tmp_path / "out")

    assert again.dtype == getattr(torch, dtype)
    assert torch.equal(logits(again.model), logits(made.model))
    before, after = made.model.state_dict(), again.model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) and before[name].dtype == after[name].dtype for name in before)
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert ("lm_head.weight" in stored) == (not tie)
    assert not any(name.startswith("lm_head.SCB") for name in stored)


def test_written_again_it_has_the_same_bytes(out: Path, tmp_path: Path):
    again = artifact.load(out)
    (tmp_path / "again").mkdir()
    artifact.write_model(again, tmp_path / "again")

    for name in ("model.safetensors", "config.json", "generation_config.json"):
        assert (tmp_path / "again" / name).read_bytes() == (out / name).read_bytes()


def test_it_comes_back_from_several_files(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(packed, "SHARD", "40KB")
    made = quantized(tiny, tmp_path / "out")

    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) > 2
    assert (tmp_path / "out" / "model.safetensors.index.json").is_file()
    assert torch.equal(logits(artifact.load(tmp_path / "out").model), logits(made.model))


def test_in_another_precision_only_what_is_not_packed_is_cast(out: Path):
    model = artifact.load(out, dtype=torch.bfloat16).model
    layer = model.get_submodule(UP)

    assert isinstance(layer, Int8Linear)
    assert (layer.weight.dtype, layer.SCB.dtype) == (torch.int8, torch.float32)
    assert model.get_submodule("model.norm").weight.dtype == torch.bfloat16


@pytest.mark.parametrize("name", [f"{UP}.weight", f"{UP}.SCB", "model.norm.weight", "model.embed_tokens.weight"])
def test_a_missing_tensor_is_named(out: Path, name: str):
    # Without its constants a layer is no packed one: then it is the kind of number that is wrong.
    words = f"{UP}.weight is torch.int8" if name.endswith("SCB") else f"tensor {name} is missing"
    with pytest.raises(UserError, match=words):
        artifact.load(rewritten(out, lambda tensors: tensors.pop(name)))


def test_a_tensor_of_another_shape_is_named(out: Path):
    def cut(tensors: dict[str, torch.Tensor]) -> None:
        tensors[f"{UP}.weight"] = tensors[f"{UP}.weight"][:, :-1].contiguous()

    with pytest.raises(UserError, match=rf"{UP}.weight is \(128, 63\) in the file and \(128, 64\) by config.json"):
        artifact.load(rewritten(out, cut))


def test_constants_that_are_not_numbers_are_named(out: Path):
    with pytest.raises(UserError, match=f"{UP}.SCB has 1 values that are NaN"):
        artifact.load(rewritten(out, lambda tensors: tensors[f"{UP}.SCB"].__setitem__(0, float("nan"))))


def test_packed_weights_without_a_word_in_the_config_are_refused(out: Path):
    config = json.loads((out / "config.json").read_text())
    del config["quantization_config"]
    (out / "config.json").write_text(json.dumps(config))

    with pytest.raises(UserError, match=r"integers[\s\S]*quantization_config"):
        artifact.load(out)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"quant_method": "gptq", "bits": 4}, "gptq"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "4 bit"),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True, "llm_int8_has_fp16_weight": True}, "fp16_weight"),
    ],
    ids=["gptq", "4bit", "fp16"],
)
def test_formats_that_are_not_read_are_refused(tiny: Path, tmp_path: Path, settings: dict[str, Any], words: str):
    copy = shutil.copytree(tiny, tmp_path / "copy")
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"quantization_config": settings}))

    with pytest.raises(UserError, match=words):
        artifact.load(copy)
