"""bitsandbytes, given the same weights and threshold, stores the same bytes and computes the same to 16-bit rounding.

Its layer is put into evaluation mode: in training mode on a processor it multiplies dequantized weights in float.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from command import overhaul
from overhaul import artifact
from overhaul.int8 import Kind
from overhaul.layers.int8 import Int8Linear

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("default")]
bnb: Any = pytest.importorskip("bitsandbytes")

IDS_BT = torch.randint(3, 500, (2, 24), generator=torch.Generator().manual_seed(0))
QUICK = ["--evaluate", "none", "--dtype", "fp32"]


@pytest.fixture(autouse=True)
def quiet(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    caplog.set_level("ERROR", logger="bitsandbytes")
    return None


def layers(inputs: int, outputs: int, threshold: float, *, bias: bool) -> tuple[Any, Int8Linear]:
    """The same weights in both."""
    torch.manual_seed(0)
    plain = nn.Linear(inputs, outputs, bias=bias).half().eval()
    theirs = bnb.nn.Linear8bitLt(inputs, outputs, bias=bias, has_fp16_weights=False, threshold=threshold)
    theirs.load_state_dict(plain.state_dict())
    return theirs.to("cpu").eval(), Int8Linear.from_linear(plain, Kind(threshold=threshold))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("threshold", [6.0, 3.0, 0.0])
@pytest.mark.parametrize("shape", [(64, 24), (576, 192), (1536, 576), (100, 33)])
def test_a_layer(shape: tuple[int, int], threshold: float, bias: bool):
    theirs, ours = layers(*shape, threshold, bias=bias)
    x = torch.randn(3, 11, shape[0], generator=torch.Generator().manual_seed(1)).half()
    x[0, 3, 7], x[2, 5, 20] = 40.0, -8.0

    with torch.no_grad():
        wanted, found = theirs(x), ours(x)

    state = theirs.state_dict()
    assert torch.equal(state["weight"], ours.weight)
    assert torch.equal(state["SCB"], ours.SCB)
    # fp16 has 11 bits; sums of products are rounded to it once or twice.
    assert (found.float() - wanted.float()).abs().max() <= 2**-9 * wanted.float().abs().max()


@pytest.fixture(params=["float32", "bfloat16"])
def dense(request: pytest.FixtureRequest, make_tiny: Any) -> Path:
    return make_tiny(dtype=request.param, tie=request.param == "bfloat16", bias=True)


@pytest.mark.parametrize(
    "fields", [[], ["--granularity", "row"], ["--threshold", 0], ["--skip", "lm_head", "down_proj"]]
)
def test_transformers_reads_what_overhaul_wrote(dense: Path, tmp_path: Path, fields: list[object]):
    out = tmp_path / "out"
    done = overhaul("quantize", "int8", dense, "-o", out, *fields, *QUICK)
    assert done.code == 0, done.err

    theirs = AutoModelForCausalLM.from_pretrained(out).eval()
    ours = artifact.load(out).model

    assert isinstance(theirs.model.layers[0].mlp.up_proj, bnb.nn.Linear8bitLt)
    assert isinstance(theirs.model.layers[0].mlp.down_proj, bnb.nn.Linear8bitLt) == ("down_proj" not in fields)
    with torch.no_grad():
        wanted, found = theirs(IDS_BT).logits.float(), ours(IDS_BT).logits.float()
    assert float((found - wanted).norm() / wanted.norm()) < 0.01


def test_overhaul_reads_what_transformers_wrote(dense: Path, tmp_path: Path):
    theirs = AutoModelForCausalLM.from_pretrained(
        dense, quantization_config=BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=5.0)
    ).eval()
    theirs.save_pretrained(tmp_path / "theirs")
    for file in dense.glob("tokenizer*"):
        (tmp_path / "theirs" / file.name).write_bytes(file.read_bytes())

    ours = artifact.load(tmp_path / "theirs").model

    layer = ours.get_submodule("model.layers.0.mlp.up_proj")
    assert isinstance(layer, Int8Linear)
    assert layer.kind == Kind(threshold=5.0)
    with torch.no_grad():
        wanted, found = theirs(IDS_BT).logits.float(), ours(IDS_BT).logits.float()
    assert float((found - wanted).norm() / wanted.norm()) < 0.01


def test_both_write_the_same_tensors(make_tiny: Any, tmp_path: Path):
    dense = make_tiny(dtype="bfloat16")
    AutoModelForCausalLM.from_pretrained(
        dense, quantization_config=BitsAndBytesConfig(load_in_8bit=True)
    ).save_pretrained(tmp_path / "theirs")
    assert overhaul("quantize", "int8", dense, "-o", tmp_path / "ours", *QUICK).code == 0

    wanted, found = (load_file(tmp_path / side / "model.safetensors") for side in ("theirs", "ours"))
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) and found[name].dtype == wanted[name].dtype for name in wanted)


@pytest.mark.parametrize("fields", [["--zero-point"], ["--granularity", "tensor"]])
def test_transformers_refuses_what_bitsandbytes_would_compute_otherwise(
    dense: Path, tmp_path: Path, fields: list[object]
):
    assert overhaul("quantize", "int8", dense, "-o", tmp_path / "out", *fields, *QUICK).code == 0

    with pytest.raises(ValueError, match="quant_method"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "out")


def test_peft_reads_an_adapter_over_an_int8_directory(dense: Path, tmp_path: Path):
    from peft import PeftModel

    base, adapter = tmp_path / "int8", tmp_path / "adapter"
    train = ["--data", "sample", "--steps", 6, "--batch-size", 2, "--seq-len", 32, "--lr", 3e-3, "--no-merge"]
    assert overhaul("quantize", "int8", dense, "-o", base, *QUICK).code == 0
    assert overhaul("adapt", "lora", base, "-o", adapter, *train, *QUICK).code == 0

    config = json.loads((adapter / "adapter_config.json").read_text())
    theirs = AutoModelForCausalLM.from_pretrained(config["base_model_name_or_path"])
    theirs = PeftModel.from_pretrained(theirs, str(adapter)).eval()
    ours = artifact.load(adapter).model

    with torch.no_grad():
        wanted, found = theirs(IDS_BT).logits.float(), ours(IDS_BT).logits.float()
        alone = artifact.load(base).model(IDS_BT).logits.float()
    assert float((found - wanted).norm() / wanted.norm()) < 0.01
    assert float((found - alone).norm() / alone.norm()) > 0.02
