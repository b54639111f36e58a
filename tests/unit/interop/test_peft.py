"""PEFT's directories: ours are read by peft to the same logits, peft's by us."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, RandLoraConfig, VeraConfig, get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from overhaul import artifact
from overhaul.adapt.lora import LoRA
from overhaul.adapt.randlora import RandLoRA
from overhaul.adapt.vera import VeRA
from overhaul.errors import UserError
from overhaul.interop.peft import read_adapter, write_adapter
from overhaul.layers import Adapter, merge_all
from overhaul.select import select_linears

IDS = torch.arange(24)[None]
OURS = {
    "lora": LoRA(rank=4),
    "rslora": LoRA(rank=4, rslora=True),
    "randlora": RandLoRA(rank=8, alpha=160, key=5, merge=False),
    "randlora-paper": RandLoRA(rank=8, alpha=16, scale_mode="paper", merge=False),
    "randlora-sparse": RandLoRA(rank=8, alpha=160, bases="sparse", merge=False),
    "randlora-saved": RandLoRA(rank=8, alpha=160, save_bases=True, merge=False),
    "randlora-some": RandLoRA(rank=8, alpha=160, targets=("layers.0.self_attn.q_proj", "down_proj"), merge=False),
    "vera": VeRA(rank=8, key=5),
}
THEIRS: dict[str, Any] = {
    "randlora": RandLoraConfig(r=8, randlora_alpha=160, projection_prng_key=5),
    "randlora-sparse": RandLoraConfig(r=8, randlora_alpha=160, sparse=True),
    "vera": VeraConfig(r=8, projection_prng_key=5),
    "lora-rs": LoraConfig(r=4, use_rslora=True),
    "lora-dora": LoraConfig(r=4, use_dora=True),
}
# peft says of its own adapters without bases that they may not be read, and its files are read with a warning.
pytestmark = pytest.mark.filterwarnings("ignore")


def load(path: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(path)


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model.eval()(IDS).logits


def shake(model: nn.Module) -> None:
    """What is trained is no longer where it began; small, so that differences show and logits stay sane."""
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if any(part in name for part in ("lora", "vera")):
            nn.init.normal_(parameter, std=0.02)


def adapted(path: Path, method: Any) -> Any:
    model = load(path)
    method.attach(model, select_linears(model, method.targets))
    shake(model)
    return model


@pytest.mark.parametrize("name", OURS)
def test_peft_reads_what_is_written_here(name: str, tiny: Path, tmp_path: Path):
    model = adapted(tiny, OURS[name])

    write_adapter(model, tiny, tmp_path)
    theirs = PeftModel.from_pretrained(load(tiny), str(tmp_path))

    torch.testing.assert_close(logits(theirs), logits(model), rtol=1e-4, atol=1e-4)
    assert (logits(model) - logits(load(tiny))).abs().max() > 1e-3


def test_rank_stabilised_scaling_is_that_of_peft():
    linear = nn.Linear(8, 8)
    theirs = get_peft_model(nn.ModuleDict({"one": linear}), LoraConfig(r=4, target_modules=["one"], use_rslora=True,
                            lora_alpha=16)).base_model.model["one"].scaling["default"]  # pyright: ignore  # fmt: skip
    model = nn.ModuleDict({"one": nn.Linear(8, 8)})

    LoRA(rank=4, alpha=16, rslora=True).attach(model, ["one"])

    assert model["one"].scale == theirs == 8


@pytest.mark.parametrize("name", OURS)
def test_what_is_written_comes_back_to_the_same_bits(name: str, tiny: Path, tmp_path: Path):
    model = adapted(tiny, OURS[name])

    write_adapter(model, tiny, tmp_path)
    again = load(tiny)
    read_adapter(again, tmp_path, packed=False)

    close = (
        {"rtol": 0.0, "atol": 0.0} if name not in ("lora", "rslora", "randlora-paper") else {"rtol": 1e-5, "atol": 1e-5}
    )
    torch.testing.assert_close(logits(again), logits(merge_all(model)), **close)
    assert not any(isinstance(module, Adapter) for module in again.modules())


@pytest.mark.parametrize("save", [True, False])
@pytest.mark.parametrize("name", THEIRS)
def test_what_peft_writes_is_read_here(name: str, save: bool, tiny: Path, tmp_path: Path):
    config = copy.deepcopy(THEIRS[name])
    config.target_modules = ["q_proj", "v_proj", "up_proj"]
    if hasattr(config, "save_projection"):
        config.save_projection = save
    theirs = get_peft_model(load(tiny), config)
    shake(theirs)
    theirs.save_pretrained(str(tmp_path))

    ours = load(tiny)
    read_adapter(ours, tmp_path, packed=False)

    torch.testing.assert_close(logits(ours), logits(theirs), rtol=1e-4, atol=1e-4)


def test_a_randlora_file_holds_little_beside_what_was_trained(tiny: Path, tmp_path: Path):
    model = adapted(tiny, OURS["randlora"])
    trained = sum(p.nbytes for p in model.parameters() if p.requires_grad)

    write_adapter(model, tiny, tmp_path / "alone")
    write_adapter(adapted(tiny, OURS["randlora-saved"]), tiny, tmp_path / "saved")

    sizes = {name: (tmp_path / name / "adapter_model.safetensors").stat().st_size for name in ("alone", "saved")}
    assert sizes["alone"] < 1.2 * trained
    stored = load_file(tmp_path / "saved" / "adapter_model.safetensors")
    banks = [tensor for key, tensor in stored.items() if key.endswith(("_A", "_B"))]
    assert len(banks) == 2
    assert sizes["saved"] == pytest.approx(sizes["alone"] + sum(t.nbytes for t in banks), abs=500)


@pytest.mark.parametrize("name", ["randlora", "vera"])
def test_other_bases_than_those_of_the_training_are_refused(name: str, tiny: Path, tmp_path: Path):
    write_adapter(adapted(tiny, OURS[name]), tiny, tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | {"projection_prng_key": 6}))

    with pytest.raises(UserError, match="key 6 are not those that the adapter was trained with"):
        artifact.load(tmp_path)


def test_saved_bases_need_no_key(tiny: Path, tmp_path: Path):
    model = adapted(tiny, OURS["randlora-saved"])
    write_adapter(model, tiny, tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | {"projection_prng_key": 6}))

    again = load(tiny)
    read_adapter(again, tmp_path, packed=False)

    assert torch.equal(logits(again), logits(merge_all(model)))
