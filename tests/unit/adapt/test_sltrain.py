"""`adapt sltrain` on the tiny model: what is trained, merged or kept, trained on, and refused."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from command import overhaul, python, refused
from overhaul import artifact, factored
from overhaul.adapt.full import Full
from overhaul.adapt.sltrain import SLTrain
from overhaul.corpora import CorpusSpec, open_corpus
from overhaul.data import Data
from overhaul.train import train

RANK, DENSITY = 6, 0.05
SIZES = ["--rank", str(RANK), "--density", str(DENSITY)]
TRAIN = ["--data", "sample", "--steps", "3", "--batch-size", "2", "--seq-len", "32"]
QUICK = ["--evaluate", "none", "--dtype", "fp32"]
IDS_BT = torch.arange(40).view(2, 20)


def sltrain(model: object, out: Path, *more: object) -> Path:
    done = overhaul("adapt", "sltrain", model, "-o", out, *TRAIN, *QUICK, *more)
    assert done.code == 0, done.err
    return out


def logits(directory: Path) -> torch.Tensor:
    with torch.no_grad():
        return artifact.load(directory).model(IDS_BT).logits


@pytest.fixture(scope="module")
def kept(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model, trained, its factors kept."""
    return sltrain(tiny, tmp_path_factory.mktemp("sltrain") / "kept", *SIZES, "--no-merge")


@pytest.fixture
def loaded(tiny: Path) -> tuple[Any, Data]:
    made = artifact.load(tiny)
    return made.model, Data(open_corpus(CorpusSpec(path="sample")), made.processor)


@pytest.mark.parametrize(
    ("also", "outside"),
    [
        ((), set()),
        (("norms",), {"input_layernorm", "post_attention_layernorm", "norm"}),
        (("embeddings",), {"embed_tokens"}),
    ],
)
def test_factors_values_and_what_is_asked_are_trained(loaded: tuple[Any, Data], also: Any, outside: set[str]):
    model, data = loaded
    before = {name: p.detach().clone() for name, p in model.named_parameters()}

    settings = SLTrain(rank=RANK, density=DENSITY, also=also, steps=2, batch_size=1, seq_len=32, save_every=0)
    plan = settings.plan(model, data)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    layers = factored.factored_layers(model)
    train(plan, settings, quiet=True)

    inside = {f"{name}.{part}" for name in layers for part in ("factor_A", "factor_B", "values")}
    assert inside <= trained
    assert {name.split(".")[-2] for name in trained - inside} == outside
    numbers = sum((x.in_features + x.out_features) * RANK + int(DENSITY * x.in_features * x.out_features)
                  for x in layers.values())  # fmt: skip
    assert plan.num_trained == numbers + sum(before[name].numel() for name in trained - inside)
    for name, parameter in model.named_parameters():
        if name in before:
            assert torch.equal(parameter, before[name]) == (name not in trained), name


def test_training_gives_the_weight_a_higher_rank_than_its_product(kept: Path):
    layers = factored.factored_layers(artifact.load(kept).model)

    assert len(layers) == 14
    for layer in layers.values():
        assert layer.rank == RANK
        # A position on its own adds one to the rank; of the 5% there is one in nearly every row or column.
        assert torch.linalg.matrix_rank(layer.dense()) > RANK + min(layer.in_features, layer.out_features) // 2


def test_merged_it_is_the_same_stock_model(tiny: Path, kept: Path, tmp_path: Path):
    merged = sltrain(tiny, tmp_path / "merged", *SIZES)

    stock: Any = AutoModelForCausalLM.from_pretrained(merged)
    with torch.no_grad():
        theirs = stock(IDS_BT).logits
    torch.testing.assert_close(theirs, logits(kept), rtol=0, atol=1e-4)
    torch.testing.assert_close(logits(merged), theirs, rtol=0, atol=1e-6)


def test_kept_factors_are_trained_on_as_they_are(kept: Path, tmp_path: Path):
    again = sltrain(kept, tmp_path / "again", "--no-merge", "--lr", "1e-4")
    before, after = (load_file(directory / "model.safetensors") for directory in (kept, again))

    assert before.keys() == after.keys()
    for name, tensor in before.items():
        if name.endswith(".support"):
            assert torch.equal(after[name], tensor)
        elif name.endswith(("factor_A", "factor_B", "values")):
            assert 0 < (after[name] - tensor).abs().max() <= 3.1e-4, name  # three steps of Adam at most
    merged = sltrain(kept, tmp_path / "merged", "--lr", "1e-4")
    torch.testing.assert_close(logits(merged), logits(again), rtol=0, atol=1e-4)


def test_a_directory_of_factors_is_read_by_everything_that_reads_models(kept: Path, tiny: Path):
    shown = json.loads(overhaul("show", kept, "--json").out)
    measured = overhaul("measure", "perplexity", kept, "--data", "sample", "--json")
    compared = overhaul("compare", tiny, kept, "--windows", "1", "--seq-len", "32", "--json")
    generated = overhaul("generate", kept, "--prompt", "It was", "--tokens", "3")

    for done in (measured, compared, generated):
        assert done.code == 0, done.err
    stored = load_file(kept / "model.safetensors")
    assert shown["parameters"] == sum(t.numel() for t in stored.values() if t.is_floating_point())
    assert shown["verified"]
    row = json.loads(compared.out)["rows"][1]
    assert row["perplexity"]["value"] > 1
    card = (kept / "README.md").read_text()
    assert "base_model_relation: finetune" in card
    assert "from overhaul import artifact" in card


def test_adapters_are_trained_on_top_and_merged(kept: Path, tmp_path: Path):
    done = overhaul("adapt", "lora", kept, "-o", tmp_path / "lora", *TRAIN, *QUICK)

    assert done.code == 0, done.err
    AutoModelForCausalLM.from_pretrained(tmp_path / "lora")


KILLED = """
import os, signal, sys
from overhaul import checkpoint, cli
write = checkpoint.write
def and_die(root, step, **rest):
    if step == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    write(root, step, **rest)
checkpoint.write = and_die
cli.main(sys.argv[1:])
"""


def test_kept_factors_resume_to_the_same_bytes(tiny: Path, kept: Path, tmp_path: Path):
    out = tmp_path / "killed"
    words = ["adapt", "sltrain", tiny, "-o", out, *TRAIN, *QUICK, *SIZES, "--no-merge", "--save-every", "1"]
    done = python(KILLED, *words)
    assert done.code == -signal.SIGKILL, done.err
    assert os.listdir(out) == [".state"]
    refused(overhaul(*words, "--support", "largest", "--resume"), "support: 'random' then, 'largest' now")

    resumed = overhaul(*words, "--resume")

    assert resumed.code == 0, resumed.err
    assert (out / "model.safetensors").read_bytes() == (kept / "model.safetensors").read_bytes()


# Mistakes.


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--rank", "0"], ["rank", "greater than 0"]),
        (["--rank", "64"], ["--rank 64 saves nothing in model.layers.0.self_attn.", "up to"]),
        (["--density", "0"], ["density", "greater than 0"]),
        (["--density", "1"], ["density", "less than 1"]),
        (["--rank", "6", "--density", "0.0001"], ["--density 0.0001 leaves no value"]),
    ],
)
def test_what_saves_nothing_or_is_no_share_is_refused(tiny: Path, tmp_path: Path, flags: list[str], told: list[str]):
    refused(overhaul("adapt", "sltrain", tiny, "-o", tmp_path / "out", *TRAIN, *QUICK, *flags), *told)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("before", [("prune", "magnitude"), ("quantize", "int8")])
def test_pruned_and_quantized_models_are_refused(tiny: Path, tmp_path: Path, before: tuple[str, str]):
    assert overhaul(*before, tiny, "-o", tmp_path / "before", *QUICK).code == 0

    done = overhaul("adapt", "sltrain", tmp_path / "before", "-o", tmp_path / "out", *TRAIN, *QUICK, *SIZES)

    refused(done, "is pruned" if before[0] == "prune" else "packed weights")


@pytest.mark.parametrize("flags", [["--rank", "5"], ["--alpha", "3"], ["--density", "0.2"]])
def test_other_factors_than_a_model_has_are_refused(kept: Path, tmp_path: Path, flags: list[str]):
    done = overhaul("adapt", "sltrain", kept, "-o", tmp_path / "out", *TRAIN, *QUICK, *flags)

    refused(done, f"{flags[0]} {flags[1]}: the model has factors already", f"without {flags[0]}")


@pytest.mark.parametrize(
    "words", [["prune", "magnitude"], ["quantize", "int8"], ["adapt", "full", *TRAIN], ["quantize", "bct"]]
)
def test_methods_that_need_whole_weights_refuse_factors(kept: Path, tmp_path: Path, words: list[str]):
    done = overhaul(*words[:2], kept, "-o", tmp_path / "out", *words[2:], *QUICK)

    refused(done, "holds factors in place of weights (sltrain)", "without --no-merge")


def test_another_support_than_a_model_has_is_refused(kept: Path, tmp_path: Path):
    done = overhaul("adapt", "sltrain", kept, "-o", tmp_path / "out", *TRAIN, *QUICK, "--support", "largest")

    refused(done, "has a support already", "without --support")


def test_the_record_names_the_factors_that_were_trained(kept: Path, tmp_path: Path):
    assert overhaul("adapt", "sltrain", kept, "-o", tmp_path / "out", *TRAIN, *QUICK).code == 0

    first, second = artifact.load(tmp_path / "out").lineage[-2:]
    assert [second.fields[name] for name in ("rank", "alpha")] == [first.fields[name] for name in ("rank", "alpha")]
    assert second.fields["density"] == pytest.approx(first.fields["density"], rel=0.01)


def test_a_model_without_a_sparse_part_is_trained_in_full(tiny: Path):
    """Its empty values are trained by nobody."""
    torch.manual_seed(0)
    model = factored.from_config(artifact.read_config(tiny), rank=4, density=0.0, alpha=4.0)
    method = Full(steps=1, batch_size=1, seq_len=16, save_every=0)
    data = Data(open_corpus(CorpusSpec(path="sample")), artifact.read_tokenizer(tiny))

    train(method.plan(model, data), method, quiet=True)

    assert all(len(layer.values) == 0 for layer in factored.factored_layers(model).values())
