from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.intruders import reduce_intruder_dimension
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from command import contents, overhaul, refused
from overhaul import artifact
from overhaul.interop.peft import plain_lora
from overhaul.spectra import singular
from overhaul.stored import stored

pytestmark = pytest.mark.filterwarnings("ignore")  # peft warns of its own files

TRAIN = ["--data", "sample", "--steps", "8", "--seq-len", "32", "--lr", "1e-2", "--rank", "2"]
QUICK = ["--evaluate", "none", "--dtype", "fp32"]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OVERHAUL_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def tuned(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("tuned") / "whole"
    assert overhaul("adapt", "lora", tiny, "-o", out, *TRAIN, *QUICK).code == 0
    return out


@pytest.fixture(scope="module")
def adapter(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("tuned") / "adapter"
    assert overhaul("adapt", "lora", tiny, "-o", out, *TRAIN, *QUICK, "--no-merge").code == 0
    return out


def repaired(model: Path, out: Path, *flags: object) -> Path:
    done = overhaul("adapt", "repair", model, "-o", out, *flags, *QUICK)
    assert done.code == 0, done.err
    return out


def weights(directory: Path) -> dict[str, Tensor]:
    found = stored(str(directory))
    return {name: found.read(name) for name in found.shapes}


@pytest.mark.parametrize("scale", [0, 0.5, 1.5])
def test_scaling_moves_the_value_of_the_intruder_and_nothing_else(tiny, tuned, tmp_path, scale):
    after, before = weights(repaired(tuned, tmp_path / "out", "--scale", scale, "--k", 1)), weights(tuned)

    for name, weight_OI in before.items():
        was, is_now = singular(weight_OI), singular(after[name])
        wanted = was.values_R.clone()
        wanted[0] *= scale  # the change is strong: the first vector of every matrix is an intruder
        torch.testing.assert_close(is_now.values_R, wanted.sort(descending=True).values, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(
            after[name] - weight_OI,
            (scale - 1) * was.values_R[0] * torch.outer(was.left_OK[:, 0], was.right_IK[:, 0]),
            rtol=1e-4, atol=1e-5,
        )  # fmt: skip


def test_one_leaves_everything_as_it_was(tuned, tmp_path):
    after = repaired(tuned, tmp_path / "out", "--scale", 1)

    ours, theirs = (load_file(path / "model.safetensors") for path in (after, tuned))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize("rslora", [False, True])
def test_an_adapter_becomes_the_one_that_peft_makes(tiny, tmp_path, rslora):
    torch.manual_seed(0)
    config = LoraConfig(r=4, lora_alpha=12, use_rslora=rslora, target_modules=["q_proj", "v_proj", "down_proj"])
    theirs = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny), config)
    for name, parameter in theirs.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(0, 0.15)
    theirs.peft_config["default"].base_model_name_or_path = str(tiny)
    theirs.save_pretrained(str(tmp_path / "adapter"))
    before = contents(tmp_path / "adapter")
    told: list[str] = []
    reduce_intruder_dimension(theirs, logging_sink=told.append)

    out = repaired(tmp_path / "adapter", tmp_path / "out")

    ours = plain_lora(out)
    assert sum("Intruders: " in line for line in told) == 6, told
    assert contents(tmp_path / "adapter") == before
    for name, (A_RI, B_OR) in ours.factors.items():
        layer = theirs.get_submodule(f"base_model.model.{name}")
        change_OI = layer.get_delta_weight("intruder_reduced").detach()
        torch.testing.assert_close(ours.scale * B_OR @ A_RI, change_OI, rtol=1e-4, atol=1e-4)
        # Both have the roots of the singular values in both factors.
        torch.testing.assert_close(A_RI.norm(dim=1), B_OR.norm(dim=0), rtol=1e-4, atol=1e-5)


def test_a_repaired_adapter_loads_with_peft_over_the_first_base(tiny, adapter, tmp_path):
    out = repaired(adapter, tmp_path / "out")

    config = json.loads((out / "adapter_config.json").read_text())
    assert Path(config["base_model_name_or_path"]) == tiny
    ids = torch.arange(20)[None]
    with torch.no_grad():
        theirs = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny), str(out))(ids).logits
        ours = artifact.load(out).model(ids).logits
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_the_report_tells_what_the_rank_left_out(adapter, tmp_path):
    out = repaired(adapter, tmp_path / "out", "--scale", 0)

    (table,) = artifact.read_record(out)["tables"]
    base, tuned, after = stored(str(out)), stored(str(adapter)), stored(str(out))
    assert table["columns"][-1] == "lost by the rank"
    name, count, share, lost = table["rows"][0]
    assert int(count) >= 1
    assert 0 < float(lost) < 1
    moved = float((after.read(name) - tuned.read(name)).norm() / tuned.read(name).norm())
    assert moved < 1.01 * float(share) + float(lost)
    assert base.shapes == tuned.shapes


@pytest.mark.parametrize("control", ["others", "random"])
def test_controls_change_as_many_directions_of_another_kind(tuned, tmp_path, control):
    real, other = (weights(repaired(tuned, tmp_path / c, "--scale", 0, "--control", c)) for c in ("intruders", control))

    for name, weight_OI in weights(tuned).items():
        removed, instead = weight_OI - real[name], weight_OI - other[name]
        values, as_many = (torch.linalg.svdvals(one) for one in (removed, instead))
        assert int((values > 1e-3).sum()) == int((as_many > 1e-3).sum()) > 0
        overlap = float((removed * instead).sum() / removed.norm() / instead.norm())
        assert abs(overlap) < (1e-3 if control == "others" else 0.3)
        if control == "random":
            torch.testing.assert_close(instead.norm(), removed.norm(), rtol=1e-3, atol=0)


def test_an_adapter_is_repaired_merged_and_pruned(adapter, tmp_path):
    out = repaired(adapter, tmp_path / "repaired")
    done = overhaul("prune", "magnitude", out, "-o", tmp_path / "pruned", *QUICK)
    assert done.code == 0, done.err

    lineage = artifact.read_record(tmp_path / "pruned")["lineage"]
    assert [(step["verb"], step["method"]) for step in lineage] == [
        ("adapt", "lora"), ("adapt", "repair"), ("prune", "magnitude"),
    ]  # fmt: skip
    merged, pruned = weights(out), weights(tmp_path / "pruned")
    for name, weight_OI in pruned.items():
        kept = weight_OI != 0
        assert int(kept.sum()) == weight_OI.numel() // 2
        torch.testing.assert_close(weight_OI[kept], merged[name][kept])


def test_what_was_pruned_stays_zero(tiny, tmp_path):
    pruned, tuned = tmp_path / "pruned", tmp_path / "tuned"
    assert overhaul("prune", "magnitude", tiny, "-o", pruned, *QUICK).code == 0
    train = ["--data", "sample", "--steps", "8", "--seq-len", "32", "--lr", "1e-2"]
    assert overhaul("adapt", "perp", pruned, "-o", tuned, *train, "--train", "mask_lora", *QUICK).code == 0

    after = weights(repaired(tuned, tmp_path / "out"))

    before = weights(tuned)
    assert all(bool((after[name][weight_OI == 0] == 0).all()) for name, weight_OI in before.items())
    assert any(not torch.equal(after[name], weight_OI) for name, weight_OI in before.items())


# Mistakes.


def test_a_model_without_a_known_base_needs_one(tiny, tmp_path):
    refused(overhaul("adapt", "repair", tiny, "-o", tmp_path / "out", *QUICK), "tuned from", "--base MODEL")


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--scale", "-0.1"], ["scale", "greater than or equal to 0"]),
        (["--eps", "1"], ["eps", "less than 1"]),
        (["--eps", "0"], ["eps", "greater than 0"]),
        (["--k", "0"], ["k", "greater than 0"]),
    ],
)
def test_settings_out_of_range(tiny, tuned, tmp_path, flags, words):
    refused(overhaul("adapt", "repair", tuned, "-o", tmp_path / "out", *flags, *QUICK), *words)


@pytest.mark.parametrize(
    ("config", "why"),
    [
        ({"use_dora": True}, "use_dora"),
        ({"rank_pattern": {"q_proj": 2}}, "rank_pattern"),
        ({"trainable_token_indices": [1]}, "among its tensors"),
    ],
)
def test_adapters_that_are_no_plain_lora_are_refused(tiny, tmp_path, config, why):
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny), LoraConfig(r=4, **config))
    model.peft_config["default"].base_model_name_or_path = str(tiny)
    model.save_pretrained(str(tmp_path / "adapter"))

    done = overhaul("adapt", "repair", tmp_path / "adapter", "-o", tmp_path / "out", *QUICK)

    refused(done, why, "no plain LoRA")
    assert overhaul("measure", "spectra", tiny, tmp_path / "adapter").code == 0


def test_randlora_is_read_but_not_repaired(tiny, tmp_path):
    out = tmp_path / "randlora"
    train = ["--data", "sample", "--steps", "2", "--seq-len", "32", "--no-merge"]
    assert overhaul("adapt", "randlora", tiny, "-o", out, *train, *QUICK).code == 0

    refused(overhaul("adapt", "repair", out, "-o", tmp_path / "out", *QUICK), "RANDLORA")
    assert overhaul("measure", "spectra", tiny, out).code == 0


def test_an_adapter_that_peft_cannot_merge_is_refused(tiny, tmp_path):
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny), LoraConfig(r=4, lora_bias=True))
    model.peft_config["default"].base_model_name_or_path = str(tiny)
    model.save_pretrained(str(tmp_path / "adapter"))

    done = overhaul("adapt", "repair", tmp_path / "adapter", "-o", tmp_path / "out", *QUICK)

    refused(done, "cannot be merged into its base", "lora_bias")


def test_an_adapter_of_the_head_is_refused(make_tiny, tmp_path):
    base = make_tiny(tie=False)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(target_modules=["q_proj", "lm_head"]))
    model.peft_config["default"].base_model_name_or_path = str(base)
    model.save_pretrained(str(tmp_path / "adapter"))

    done = overhaul("adapt", "repair", tmp_path / "adapter", "-o", tmp_path / "out", *QUICK)

    refused(done, "adapts lm_head", "merge it")


def test_an_adapter_without_its_tensors_is_refused(tiny, adapter, tmp_path):
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "adapter_config.json").write_bytes((adapter / "adapter_config.json").read_bytes())
    (broken / "adapter_model.bin").write_bytes(b"")

    for words in (("adapt", "repair", broken, "-o", tmp_path / "out", *QUICK), ("measure", "spectra", tiny, broken)):
        refused(overhaul(*words), "has no adapter weights", "adapter_model.bin")


def test_a_matrix_of_zeros_is_left_alone(tiny, tmp_path):
    zeros = shutil.copytree(tiny, tmp_path / "zeros")
    stored_as = load_file(zeros / "model.safetensors")
    stored_as["model.layers.0.self_attn.q_proj.weight"].zero_()
    save_file(stored_as, zeros / "model.safetensors", metadata={"format": "pt"})

    done = overhaul("adapt", "repair", zeros, "-o", tmp_path / "out", "--base", tiny, "--k", 99, *QUICK)

    assert done.code == 0, done.err
    assert "no matrix has an intruder" in done.err
    assert "k 99 is more than" in done.err
