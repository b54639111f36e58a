"""WHP from the command line: which networks it writes, what can be done with them, and what is refused."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from command import interrupted, overhaul, refused
from overhaul import artifact
from overhaul.errors import UserError
from overhaul.interop import hf
from overhaul.judge import counts
from overhaul.walk import decoder_blocks
from tiny_models import MakeTiny

FLAGS = ("--steps", 6, "--batch-size", 2, "--seq-len", 32, "--lr", "1e-2", "--dtype", "fp32", "--evaluate", "none")
SHORT = ("--data", "sample", "--seq-len", 32)


def articles(file: Path, seed: int) -> Path:
    """Twelve of few words."""
    dice = random.Random(seed)
    rows = [{"text": " ".join(dice.choices(["river", "stone", "lamp", "garden", "winter"], k=40))} for _ in range(12)]
    file.write_text("\n".join(map(json.dumps, rows)))
    return file


@pytest.fixture(scope="module")
def forget(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Texts to forget."""
    return articles(tmp_path_factory.mktemp("articles") / "forget.jsonl", seed=0)


@pytest.fixture(scope="module")
def unlearnt(tiny: Path, forget: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `forget whp` makes of the tiny model."""
    out = tmp_path_factory.mktemp("whp") / "out"
    done = overhaul("forget", "whp", tiny, "-o", out, "--forget", forget, *FLAGS, "--alpha", 2)
    assert done.code == 0, done.err
    return out


def copied(directory: Path, to: Path) -> Path:
    return Path(shutil.copytree(directory, to))


def split(directory: Path) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """The tensors of the target and of the reinforced network, by their own names."""
    stored = load_file(directory / "model.safetensors")
    names = ("target.", "reinforced.")
    found = [{name.removeprefix(of): one for name, one in stored.items() if name.startswith(of)} for of in names]
    assert len(stored) == sum(map(len, found))
    return found[0], found[1]


def test_the_target_is_the_model_and_the_other_learnt_the_texts_further(
    unlearnt: Path, tiny: Path, forget: Path, tmp_path: Path
):
    """The second is what a task vector of -1 gives: both learn the texts further, and alike."""
    done = overhaul(
        "forget", "task-vector", tiny, "-o", tmp_path / "further", "--forget", forget, *FLAGS, "--alpha", -1
    )
    assert done.code == 0, done.err
    target, reinforced = split(unlearnt)
    before, further = (load_file(path / "model.safetensors") for path in (tiny, tmp_path / "further"))

    for found, wanted in ((target, before), (reinforced, further)):
        assert found.keys() == wanted.keys()
        assert all(torch.equal(found[name], wanted[name]) for name in wanted)


@torch.no_grad()
def test_what_was_learnt_further_is_less_likely(unlearnt: Path, tiny: Path, forget: Path):
    made, before = artifact.load(unlearnt), artifact.load(tiny)
    model: Any = made.model
    text = json.loads(forget.read_text().splitlines()[0])["text"]
    batch = {"input_ids": torch.tensor([made.processor(text)["input_ids"]])}
    losses = [float(one(**batch, labels=batch["input_ids"]).loss) for one in (model.reinforced, before.model, model)]

    assert losses == sorted(losses)
    assert losses[2] > losses[1] + 0.1
    assert not hf.has_linear_head(model)
    assert torch.equal(hf.logits(model, batch), model(**batch).logits)
    assert [of(model.config) for of in (hf.depth, hf.width, hf.num_words)] == [2, 64, 512]


def test_a_run_that_was_stopped_goes_on_to_the_same_bits(unlearnt: Path, tiny: Path, forget: Path, tmp_path: Path):
    how = ("forget", "whp", tiny, "-o", tmp_path / "out", "--forget", forget, *FLAGS, "--alpha", 2, "--save-every", 2)
    stopped = interrupted(lambda seen: len(seen) == 4, *how)
    assert stopped.code == 130, stopped.err
    assert [path.name for path in (tmp_path / "out").iterdir()] == [artifact.STATE]

    refused(overhaul(*how, "--resume", "--lr", "1e-3"), "lr")
    assert overhaul(*how, "--resume").code == 0
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (unlearnt / "model.safetensors").read_bytes()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_it_is_written_in_the_type_its_model_had(make_tiny: MakeTiny, forget: Path, tmp_path: Path, dtype: str):
    parent = make_tiny(dtype=dtype)
    done = overhaul("forget", "whp", parent, "-o", tmp_path / "out", "--forget", forget, *FLAGS)
    assert done.code == 0, done.err
    target, reinforced = split(tmp_path / "out")
    before = load_file(parent / "model.safetensors")

    assert all(torch.equal(target[name], before[name]) for name in before)
    assert {tensor.dtype for tensor in reinforced.values()} == {getattr(torch, dtype)}
    assert artifact.load(tmp_path / "out").dtype == getattr(torch, dtype)


def test_a_pruned_model_stays_pruned_in_both(tiny: Path, forget: Path, tmp_path: Path):
    assert overhaul("prune", "magnitude", tiny, "-o", tmp_path / "pruned", "--evaluate", "none").code == 0
    done = overhaul("forget", "whp", tmp_path / "pruned", "-o", tmp_path / "out", "--forget", forget, *FLAGS)
    assert done.code == 0, done.err
    counted = counts(artifact.load(tmp_path / "out").model)

    assert counted["nonzero_share_blocks"] == pytest.approx(0.5, abs=0.01)
    assert {layer.name.split(".")[0] for layer in counted["layers"]} == {"target", "reinforced"}


def test_an_adapter_is_merged_into_both(tiny: Path, adapter: Path, forget: Path, tmp_path: Path):
    done = overhaul("forget", "whp", adapter, "-o", tmp_path / "out", "--forget", forget, *FLAGS)
    assert done.code == 0, done.err
    merged = artifact.load(adapter).model.state_dict()
    target, _ = split(tmp_path / "out")

    assert all(torch.equal(tensor, merged[name]) for name, tensor in target.items())
    assert not torch.equal(*(one["model.layers.0.mlp.up_proj.weight"] for one in split(tmp_path / "out")))


@pytest.fixture
def asked(tmp_path: Path) -> Path:
    (tmp_path / "asked.jsonl").write_text(json.dumps({"question": "What is 2 + 3?", "answer": "5"}))
    return tmp_path / "asked.jsonl"


def test_what_asks_for_logits_works(unlearnt: Path, tiny: Path, forget: Path, asked: Path, tmp_path: Path):
    texts = articles(tmp_path / "unseen.jsonl", seed=1)
    muse = {"retrain": tiny, "unlearned": unlearnt, "forget": forget, "retain": texts, "holdout": texts,
            "forget-questions": asked, "retain-questions": asked, "tokens": 4, "prompt-tokens": 4}  # fmt: skip
    for words in (
        ("show", unlearnt),
        ("generate", unlearnt, "--prompt", "The river", "--tokens", 4),
        ("generate", unlearnt, "--prompt", "The river", "--tokens", 4, "--seed", 1),
        ("measure", "perplexity", unlearnt, *SHORT, "--windows", 2),
        ("measure", "answers", unlearnt, "--task", asked),
        ("measure", "muse", tiny, *(word for name, value in muse.items() for word in (f"--{name}", value))),
        ("compare", tiny, unlearnt, *SHORT, "--windows", 2),
        (
            "distill",
            "kd",
            tiny,
            "-o",
            tmp_path / "kd",
            "--teacher",
            unlearnt,
            *SHORT,
            "--steps",
            1,
            "--evaluate",
            "none",
        ),
    ):
        done = overhaul(*words)
        assert done.code == 0, (words, done.err)
    assert artifact.verify(unlearnt)


def test_the_report_is_of_the_whole(tiny: Path, forget: Path, tmp_path: Path):
    how = ("--evaluate", "sample", "--evaluate-windows", 2, "--evaluate-seq-len", 32)
    done = overhaul("forget", "whp", tiny, "-o", tmp_path / "out", "--forget", forget, *FLAGS[:-2], *how)
    assert done.code == 0, done.err
    facts = json.loads((tmp_path / "out" / "overhaul.json").read_text())["facts"]

    assert facts[1]["parameters"] == 2 * facts[0]["parameters"]
    assert facts[1]["perplexity"]["value"] != facts[0]["perplexity"]["value"]
    card = (tmp_path / "out" / "README.md").read_text()
    assert "AutoModelForCausalLM.from_pretrained('out', dtype=\"auto\", trust_remote_code=True)" in card


@pytest.mark.parametrize(
    "words",
    [
        ("forget", "whp", "--forget", "sample"),
        ("forget", "ga", "--forget", "sample", "--retain-term", "none"),
        ("forget", "s3t", "--data", "sample"),
        ("prune", "magnitude"),
        ("prune", "wanda", *SHORT),
        ("quantize", "int8"),
        ("adapt", "full", "--data", "sample"),
        ("adapt", "lora", "--data", "sample"),
        ("extend", "cpt", "--data", "sample"),
        ("learn", "bregman", "--tasks", "sample"),
        ("shrink", "minitron", "--layers", 1, "--data", "sample"),
    ],
    ids=lambda words: "-".join(words[:2]),
)
def test_what_changes_one_network_is_refused(unlearnt: Path, tiny: Path, tmp_path: Path, words: tuple[Any, ...]):
    done = overhaul(words[0], words[1], unlearnt, "-o", tmp_path / "out", *words[2:])

    refused(done, f"{unlearnt} is two networks, whose logits are subtracted", f"the model it was made from, {tiny}")
    assert not (tmp_path / "out").exists()


def test_what_looks_into_one_network_is_refused(unlearnt: Path, tiny: Path, forget: Path, tmp_path: Path):
    said = f"{unlearnt} is two networks, whose logits are subtracted"
    refused(overhaul("measure", "outliers", unlearnt, "--data", "sample"), said)
    refused(overhaul("measure", "data-utility", unlearnt, *SHORT, "--last-mix", f"{forget}=0.5"), said)
    refused(overhaul("measure", "spectra", tiny, unlearnt), said)
    refused(overhaul("measure", "drift", tiny, unlearnt), said)
    refused(overhaul("adapt", "repair", tiny, "-o", tmp_path / "out", "--base", unlearnt), said)
    teaching = ("distill", "kd", tiny, "-o", tmp_path / "out", "--teacher", unlearnt, *SHORT)
    refused(overhaul(*teaching, "--states", "layers"), "--states layers", said)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("look", [decoder_blocks, hf.body, lambda model: hf.outputs(model, {}, states=True)])
def test_what_looks_into_it_from_python_is_refused(unlearnt: Path, look: Callable[[Any], Any]):
    with pytest.raises(UserError, match="WhpForCausalLM is two networks"):
        look(artifact.load(unlearnt).model)


@pytest.mark.parametrize("alpha", [-1, "nan", "inf"])
def test_bad_settings_are_one_clear_error(tiny: Path, forget: Path, tmp_path: Path, alpha: object):
    refused(overhaul("forget", "whp", tiny, "-o", tmp_path / "out", "--forget", forget, "--alpha", alpha), "alpha")


def test_a_bad_alpha_in_the_directory_is_one_clear_error(unlearnt: Path, tmp_path: Path):
    copy = copied(unlearnt, tmp_path / "copy")
    config = json.loads((copy / "config.json").read_text())
    for alpha, said in ((-1.0, "from 0 up, not -1.0"), ("much", "from 0 up, not 'much'")):
        (copy / "config.json").write_text(json.dumps(config | {"alpha": alpha}))
        refused(overhaul("generate", copy, "--prompt", "The river"), said)


def test_another_alpha_is_another_model(unlearnt: Path, tiny: Path, tmp_path: Path):
    """What was measured and kept under the hash of one is not taken for that of the other."""
    copy = copied(unlearnt, tmp_path / "copy")
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"alpha": 2}))
    assert artifact.verify(copy)
    (copy / "config.json").write_text(json.dumps(config | {"alpha": 0}))
    said = [overhaul("generate", one, "--prompt", "The river", "--tokens", 8).out for one in (copy, tiny)]

    assert not artifact.verify(copy)
    assert artifact.load(copy).weights_sha256 != artifact.load(unlearnt).weights_sha256
    assert said[0] == said[1]


def test_a_dry_run_says_the_size_of_both(tiny: Path, forget: Path, tmp_path: Path):
    done = overhaul("forget", "whp", tiny, "-o", tmp_path / "out", "--forget", forget, *FLAGS, "--dry-run")
    size = (tiny / "model.safetensors").stat().st_size / 1e6

    assert done.code == 0, done.err
    assert f"weights ({2 * size:.0f} MB)" in done.told
