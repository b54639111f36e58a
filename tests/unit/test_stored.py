from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from command import overhaul, refused
from images import write_cnn
from overhaul import artifact
from overhaul.errors import UserError
from overhaul.select import block_linears
from overhaul.stored import base_of, refuse_other_base, stored

pytestmark = pytest.mark.filterwarnings("ignore")  # peft warns of its own files

TRAIN = ["--data", "sample", "--steps", "2", "--seq-len", "32", "--evaluate", "none", "--dtype", "fp32"]


def adapter(base: Path, out: Path, **config: object) -> Path:
    """A PEFT directory with random factors."""
    torch.manual_seed(0)
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base),
        LoraConfig(**{"r": 4, "lora_alpha": 12, "target_modules": ["q_proj", "down_proj"], **config}),  # pyright: ignore
    )
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(0, 0.1)
    model.peft_config["default"].base_model_name_or_path = str(base)
    model.save_pretrained(str(out))
    return out


def test_a_directory_is_read_layer_by_layer(tiny: Path):
    layers = block_linears(artifact.load(tiny).model)

    found = stored(str(tiny))

    assert list(found.shapes) == list(layers)
    for name, layer in layers.items():
        assert found.shapes[name] == tuple(layer.weight.shape)
        assert torch.equal(found.read(name), layer.weight.detach())


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"use_rslora": True},
        {"use_dora": True},
        {"alpha_pattern": {"q_proj": 3}},
        {"rank_pattern": {"down_proj": 2}},
    ],
    ids=str,
)
def test_adapters_are_merged_with_their_true_scale(tiny: Path, tmp_path: Path, config: dict[str, object]):
    out = adapter(tiny, tmp_path / "adapter", **config)
    merged = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny), str(out)).merge_and_unload()

    found = stored(str(out))

    for name in found.shapes:
        torch.testing.assert_close(found.read(name), merged.get_submodule(name).weight.detach(), rtol=1e-5, atol=1e-6)


def test_packed_weights_are_dequantized(tiny: Path, tmp_path: Path):
    assert overhaul("quantize", "int8", tiny, "-o", tmp_path / "int8", "--evaluate", "none").code == 0

    found, dense = stored(str(tmp_path / "int8")), stored(str(tiny))

    for name in dense.shapes:
        torch.testing.assert_close(found.read(name), dense.read(name), rtol=0.02, atol=2e-3)


def test_an_adapter_over_packed_weights_has_the_layers_of_its_base(tiny: Path, tmp_path: Path):
    packed, lora = tmp_path / "int8", tmp_path / "lora"
    assert overhaul("quantize", "int8", tiny, "-o", packed, "--evaluate", "none").code == 0
    assert overhaul("adapt", "lora", packed, "-o", lora, *TRAIN, "--lr", "1e-2", "--no-merge").code == 0

    base, tuned = stored(str(packed)), stored(str(lora))

    refuse_other_base(base, tuned)
    assert base.shapes == tuned.shapes == stored(str(tiny)).shapes
    assert all(not torch.equal(base.read(name), tuned.read(name)) for name in base.shapes)


def test_other_layers_are_listed(tiny: Path, make_tiny, tmp_path: Path):
    shrink = ["--layers", "1", "--ffn", "64", "--samples", "4", "--seq-len", "32", "--evaluate", "none"]
    assert overhaul("shrink", "minitron", tiny, "-o", tmp_path / "small", *shrink).code == 0

    with pytest.raises(UserError, match=r"gate_proj: \(128, 64\) and \(64, 64\).*and \d+ more"):
        refuse_other_base(stored(str(tiny)), stored(str(tmp_path / "small")))


def test_an_adapter_of_another_base_is_refused(tiny: Path, make_tiny, tmp_path: Path):
    out = adapter(tiny, tmp_path / "adapter")

    refuse_other_base(stored(str(tiny)), stored(str(out)))
    with pytest.raises(UserError, match="adapter of other weights"):
        refuse_other_base(stored(str(make_tiny(tie=False, bias=True))), stored(str(out)))


def test_an_adapter_whose_base_was_changed_since_is_refused(tiny: Path, tmp_path: Path):
    base = shutil.copytree(tiny, tmp_path / "base")
    assert overhaul("adapt", "lora", base, "-o", tmp_path / "lora", *TRAIN, "--no-merge").code == 0
    weights = load_file(base / "model.safetensors")
    save_file({name: 2 * tensor for name, tensor in weights.items()}, base / "model.safetensors")

    with pytest.raises(UserError, match="whose weights were changed since"):
        refuse_other_base(stored(str(base)), stored(str(tmp_path / "lora")))
    assert base_of(str(tmp_path / "lora")) is None


def test_the_base_is_where_the_lineage_began(tiny: Path, tmp_path: Path):
    first, second, lora = (tmp_path / name for name in ("first", "second", "lora"))
    assert overhaul("adapt", "full", tiny, "-o", first, *TRAIN).code == 0
    assert overhaul("adapt", "lora", first, "-o", second, *TRAIN).code == 0
    assert overhaul("adapt", "lora", first, "-o", lora, *TRAIN, "--no-merge").code == 0

    assert base_of(str(tiny)) is None
    assert base_of(str(second)) == str(tiny)
    assert base_of(str(lora)) == str(first)
    record = json.loads((second / "overhaul.json").read_text())
    record["lineage"][0]["parents"][0]["hash"] = "0" * 64  # it was changed since
    (second / "overhaul.json").write_text(json.dumps(record))
    assert base_of(str(second)) == str(first)


def test_an_image_classifier_is_refused(tmp_path: Path):
    cnn = write_cnn(tmp_path / "cnn")
    for what in ("spectra", "drift"):
        refused(overhaul("measure", what, cnn, cnn), "is a model of another kind: image classifier")
