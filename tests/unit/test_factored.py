"""Models of factors: the paper's sizes, fresh ones, converted ones, on disk and back."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig

from overhaul import artifact, factored
from overhaul.errors import UserError
from overhaul.layers import dequantize_all
from overhaul.layers.masked import MaskedLinear
from overhaul.layers.sparse_low_rank import SLTrainLinear
from tiny_models import MakeTiny

IDS_BT = torch.arange(40).view(2, 20)
FORM: dict[str, Any] = {"rank": 6, "density": 0.05, "alpha": 16.0}
UP = "model.layers.0.mlp.up_proj"


def llama(
    hidden: int, ffn: int, layers: int, vocabulary: int = 32000, *, tie: bool = False, **more: Any
) -> LlamaConfig:
    return LlamaConfig(
        hidden_size=hidden, intermediate_size=ffn, num_hidden_layers=layers, vocab_size=vocabulary,
        num_attention_heads=hidden // 64, tie_word_embeddings=tie, **more,
    )  # fmt: skip


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS_BT).logits


@pytest.fixture
def written(tiny: Path, tmp_path: Path) -> Path:
    """The tiny model, converted and kept so."""
    return write(tiny, tmp_path / "out")[0]


def write(source: Path, directory: Path, **changed: Any) -> tuple[Path, artifact.Artifact]:
    made = artifact.load(source)
    factored.convert(made.model, **(FORM | changed))
    directory.mkdir()
    artifact.write_model(made, directory)
    return directory, made


@pytest.mark.parametrize(
    ("hidden", "ffn", "layers", "rank", "millions"),
    [(512, 1376, 8, 128, 43.5), (768, 2048, 12, 256, 96.5), (1024, 2736, 24, 256, 194.3), (2048, 5461, 24, 512, 645.5)],
    ids=["60M", "130M", "350M", "1B"],
)
def test_the_papers_four_models_have_the_papers_numbers_of_parameters(
    hidden: int, ffn: int, layers: int, rank: int, millions: float
):
    model = factored.from_config(llama(hidden, ffn, layers), rank=rank, density=0.03, alpha=32.0, device="meta")
    found = sum(p.numel() for p in model.parameters())

    a_block = (4 * 2 * hidden + 3 * (hidden + ffn)) * rank + 4 * int(0.03 * hidden**2) + 3 * int(0.03 * hidden * ffn)
    assert found == 2 * 32000 * hidden + layers * a_block + (2 * layers + 1) * hidden
    assert round(found / 1e6, 1) == millions
    assert all(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()) if tensor.numel() > 64)


@pytest.mark.parametrize("tie", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_a_fresh_model_is_that_of_transformers_but_for_its_layers(tie: bool, bias: bool):
    config = llama(128, 256, 2, 512, tie=tie, attention_bias=bias)
    model: Any = factored.from_config(config, rank=16, density=0.05, alpha=16.0)
    peer: Any = AutoModelForCausalLM.from_config(llama(128, 256, 2, 512, tie=tie, attention_bias=bias))

    assert not any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))
    assert len(factored.factored_layers(model)) == 14
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tie
    torch.testing.assert_close(model.model.rotary_emb.inv_freq, peer.model.rotary_emb.inv_freq, rtol=0, atol=0)
    torch.testing.assert_close(model.model.norm.weight, peer.model.norm.weight, rtol=0, atol=0)
    std = peer.model.embed_tokens.weight.std().item()
    assert model.model.embed_tokens.weight.std().item() == pytest.approx(std, rel=0.02)
    assert logits(model).isfinite().all()


def test_a_fresh_model_depends_on_its_seed():
    def support(seed: int) -> torch.Tensor:
        model = factored.from_config(llama(128, 256, 1, 64), rank=16, density=0.05, alpha=16.0, seed=seed)
        return factored.factored_layers(model)[UP].support

    assert torch.equal(support(0), support(0))
    assert not torch.equal(support(0), support(1))


def test_merged_it_answers_as_before(tiny: Path):
    model = artifact.load(tiny).model
    layers = factored.convert(model, **FORM)
    for layer in layers.values():
        nn.init.normal_(layer.values, std=0.1)
    before = logits(model)

    dequantize_all(model)

    assert all(type(model.get_submodule(name)) is nn.Linear for name in layers)
    assert getattr(model.config, "quantization_config", None) is None
    torch.testing.assert_close(logits(model), before, rtol=0, atol=1e-4)


def test_what_is_lost_is_said(tiny: Path, capsys: pytest.CaptureFixture[str]):
    model = artifact.load(tiny).model
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}

    layers = factored.convert(model, **FORM)

    errors = {}
    for name, layer in layers.items():
        weight_OI = weights[f"{name}.weight"]
        errors[name] = ((weight_OI - layer.dense()).norm() / weight_OI.norm()).item()
    told = " ".join(capsys.readouterr().err.split())
    assert f"14 layers converted: the weights are off by {sum(errors.values()) / 14:.0%} of their norm" in told
    assert f"{max(errors, key=lambda name: errors[name])} by {max(errors.values()):.0%}" in told


# On disk.


@pytest.mark.parametrize("tie", [True, False])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("support", ["random", "none"])
def test_it_comes_back_bit_for_bit(make_tiny: MakeTiny, dtype: str, tie: bool, support: str, tmp_path: Path):
    directory, made = write(make_tiny(dtype=dtype, tie=tie, bias=True), tmp_path / "out", support=support)

    again = artifact.load(directory)

    assert again.dtype == getattr(torch, dtype)
    assert torch.equal(logits(again.model), logits(made.model))
    before, after = made.model.state_dict(), again.model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) and before[name].dtype == after[name].dtype for name in before)
    stored = load_file(directory / "model.safetensors")
    assert stored[f"{UP}.support"].dtype == torch.int32
    assert f"{UP}.weight" not in stored
    assert ("lm_head.weight" in stored) == (not tie)


def test_a_fresh_model_is_written_and_read_too(tiny: Path, tmp_path: Path):
    made = artifact.load(tiny)
    fresh = factored.from_config(made.model.config, **FORM)
    (tmp_path / "out").mkdir()
    artifact.write_model(made.changed(fresh.eval(), None), tmp_path / "out")  # pyright: ignore - the step is not read

    assert torch.equal(logits(artifact.load(tmp_path / "out").model), logits(fresh))


def test_transformers_alone_refuses_it(written: Path):
    with pytest.raises(ValueError, match="quant"):
        AutoModelForCausalLM.from_pretrained(written)


def configured(directory: Path, target: Path, **changed: Any) -> Path:
    """A copy with another `quantization_config`."""
    shutil.copytree(directory, target)
    config = json.loads((target / "config.json").read_text())
    config["quantization_config"] |= changed
    (target / "config.json").write_text(json.dumps(config))
    return target


@pytest.mark.parametrize(
    ("changed", "told"), [({"version": 2}, "version 2 of the format sltrain"), ({"alpha": "x"}, "alpha is 'x'"),
                          ({"alpha": -1}, "alpha is -1")],
)  # fmt: skip
def test_settings_that_are_none_are_refused(written: Path, tmp_path: Path, changed: dict[str, Any], told: str):
    with pytest.raises(UserError, match=told):
        artifact.load(configured(written, tmp_path / "other", **changed))


@pytest.mark.parametrize(
    ("name", "tensor", "told"),
    [
        (f"{UP}.values", None, "values is missing|support is"),
        (f"{UP}.factor_B", None, "factor_B is missing"),
        (f"{UP}.factor_B", torch.zeros(3, 3), r"factor_B is \(3, 3\) in the file"),
        (f"{UP}.support", torch.zeros(409, dtype=torch.int32), "support is not a sorted list"),
        ("model.nothing.factor_A", torch.zeros(3, 3), "nothing is no linear layer"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(written: Path, name: str, tensor: Any, told: str):
    tensors = load_file(written / "model.safetensors")
    tensors.pop(name, None)
    if tensor is not None:
        tensors[name] = tensor
    save_file(tensors, written / "model.safetensors", metadata={"format": "pt"})

    with pytest.raises(UserError, match=told):
        artifact.load(written)


# What cannot be converted.


def test_a_layer_that_would_not_become_smaller_is_refused_with_the_break_even(tiny: Path):
    model = artifact.load(tiny).model
    smallest = model.get_submodule("model.layers.0.self_attn.k_proj")
    num_out, num_in = smallest.out_features, smallest.in_features
    most = factored.largest_rank([smallest], 0.05)

    assert (num_out + num_in) * most + int(0.05 * num_out * num_in) < num_out * num_in
    assert (num_out + num_in) * (most + 1) + int(0.05 * num_out * num_in) >= num_out * num_in
    factored.check_sizes({"k": smallest}, most, 0.05)
    with pytest.raises(UserError, match=rf"--rank {most + 1} saves nothing in .*k_proj, 32 x 64\n.*up to {most} "):
        factored.convert(model, **FORM | {"rank": most + 1})
    with pytest.raises(UserError, match=r"--density 0.0001 leaves no value"):
        factored.convert(model, **FORM | {"density": 0.0001})


def test_pruned_and_packed_models_are_refused(tiny: Path):
    pruned, packed = artifact.load(tiny).model, artifact.load(tiny).model
    linear: Any = pruned.get_submodule(UP)
    pruned.set_submodule(UP, MaskedLinear.from_linear(linear, torch.rand(128, 64) > 0.5))
    factored.convert(packed, **FORM)

    with pytest.raises(UserError, match=f"{UP} is pruned"):
        factored.convert(pruned, **FORM)
    with pytest.raises(UserError, match="packed weights, which cannot be converted"):
        factored.convert(packed, **FORM)
    assert isinstance(packed.get_submodule(UP), SLTrainLinear)
