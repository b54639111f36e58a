"""What every method promises, for each line of the catalogue."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from command import Finished, contents, killed_at_the_third_step, overhaul, python, refused
from images import write_bars, write_vit
from overhaul import artifact, banks, catalog, recipe
from overhaul.catalog import Entry
from overhaul.kinds import Kind
from overhaul.learning import Learning
from overhaul.method import Measure, Pipeline, Training, Transform

Make = Callable[..., Path]
Run = Callable[..., Path]

# What a method needs beside the tiny form of its shape, and which parent it is for.
EXTRA: dict[str, list[str]] = {
    "sltrain": ["--rank", "6"],
    # Without a memory: what it draws depends on how many are drawn at a time.
    "bregman": ["--split", "2", "--output-term", "lwf", "--weight-term", "ewc"],
    "rehearsal-free": ["--split", "2", "--weight-term", "ewc", "--features", "0.1"],
    "slm": ["--seq-len", "32", "--groups", "4", "--key-texts", "8", "--key-steps", "2", "--heldout", "2"],
    "clr": ["--variants", "plain", "invert"],
    "contracon": ["--variants", "plain", "invert", "--views", "1", "--parent", "most_similar"],
    "minitron": ["--layers", "1", "--hidden", "48", "--ffn", "64", "--kv-groups", "1", "--heads", "2"],
}
NEEDS_A_PRUNED_PARENT = {"perp"}
CHANGES = (Transform, Training, Pipeline)
QUICK = ["--evaluate", "none", "--dtype", "fp32"]


def of(*shapes: type[Any]) -> list[Any]:
    """The catalogue's methods of these shapes, as parameters."""
    entries = [entry for entry in catalog.ENTRIES if issubclass(entry.load(), shapes)]
    return [pytest.param(entry, id=f"{entry.verb}-{entry.name}") for entry in entries]


def of_text(*shapes: type[Any]) -> list[Any]:
    """Those of them that read text with a language model: the others have tests of their own beside."""
    kinds = ((entry, entry.values[0].load()) for entry in of(*shapes))
    return [entry for entry, kind in kinds if not issubclass(kind, Learning) and Kind.CAUSAL_LM in kind.kinds]


def tiny_form(entry: Entry, **changed: object) -> list[str]:
    """The arguments of a run that takes a fraction of a second."""
    kind = entry.load()
    fields: dict[str, object] = {}
    if issubclass(kind, Learning):
        fields = {"tasks": TASKS if sees(kind) else "sample", "steps": 4, "batch_size": 2, "lr": 1e-2}
    elif issubclass(kind, Training):
        fields = {"data": "sample", "steps": 4, "batch_size": 2, "seq_len": 32, "lr": 1e-3}
    elif issubclass(kind, Pipeline) or (issubclass(kind, Transform) and kind.needs_data):
        fields = {"samples": 4, "seq_len": 32}
    fields |= changed
    flags = [word for name, value in fields.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    return [*flags, *EXTRA.get(entry.name, [])]


def sees(kind: type[Any]) -> bool:
    """Whether a method that learns tasks takes images."""
    return Kind.IMAGE_CLASSIFIER in kind.kinds


TASKS = ""
"""The image set that methods learn which learn tasks."""


@pytest.fixture(scope="session", autouse=True)
def _images(tmp_path_factory: pytest.TempPathFactory) -> None:
    global TASKS
    TASKS = str(write_bars(tmp_path_factory.mktemp("bars") / "bars.npz"))


@pytest.fixture(scope="session", autouse=True)
def _others(make_tiny: Make, bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    old = tmp_path_factory.mktemp("old") / "old.jsonl"
    lines = (json.dumps({"text": f"What was read before, part {number} of it. " * 9}) for number in range(200))
    old.write_text("\n".join(lines))
    EXTRA["cpt"] = EXTRA["mix-cpt"] = ["--replay", str(old), "--replay-share", "0.3"]
    EXTRA["s3t"] = ["--data", str(old), "--shards", "1", "--slices", "2", "--budget", "1", "--rank", "2"]
    for name in ("ga", "npo", "simnpo", "rmu"):
        EXTRA[name] = ["--forget", str(old), "--retain", "sample"]
    EXTRA["task-vector"] = EXTRA["whp"] = ["--forget", str(old)]
    EXTRA["stability-gap"] = ["--reference", str(old), "--mix", f"{old}=0.2"]
    EXTRA["syne"] = ["--mix", f"{old}=0.3", "stdlib=0.2", "--topics", str(old), "stdlib", "--rounds", "2"]
    EXTRA["data-utility"] = ["--last-mix", f"{old}=0.5", "--steps", "2", "--runs", "1", "--batch-size", "1"]
    EXTRA["data-utility"] += ["--seq-len", "32", "--windows", "2"]
    EXTRA["upsample"] = ["--mix", f"{old}=0.3", "--last-mix", f"{old}=0.6", "--last", "0.5"]
    instructions = old.with_name("instructions.jsonl")
    pairs = ({"question": f"{n} + {n}?", "answer": str(2 * n)} for n in range(200))
    instructions.write_text("\n".join(map(json.dumps, pairs)))
    EXTRA["format"] = ["--data", str(instructions), "--select", "8", "--candidates", "16", "--seq-len", "64"]
    other = str(make_tiny(tie=False, bias=True))
    EXTRA["kd"] = ["--teacher", other]
    asked = old.with_name("asked.jsonl")
    asked.write_text(json.dumps({"question": "What is 2 + 3?", "answer": "5"}))
    EXTRA["answers"] = EXTRA["accuracy"] = ["--task", str(asked)]
    texts = old.with_name("texts.jsonl")
    texts.write_text("\n".join(json.dumps({"text": f"What nobody saw, part {n}. " * 9}) for n in range(4)))
    named = {"forget": old, "retain": old, "holdout": texts, "forget-questions": asked, "retain-questions": asked}
    EXTRA["muse"] = [word for name, path in named.items() for word in (f"--{name}", str(path))]
    EXTRA["muse"] += ["--retrain", other, "--limit", "4", "--tokens", "4", "--prompt-tokens", "4"]
    EXTRA["half-reset"] = ["--base", str(make_tiny(dtype="bfloat16"))]
    # Layers of the same shapes; as a measure of a difference reads a second model, it stands behind the first.
    EXTRA["repair"], EXTRA["spectra"], EXTRA["drift"] = ["--base", other], [other], [other]
    # What random weights write is long, and looks real to no judge.
    quick = ["--threshold", "0", "--steps", "4", "--batch-size", "2", "--seq-len", "128"]
    EXTRA["translora"] = ["--bundle", str(bundle), *quick]


@pytest.fixture(scope="session")
def pruned(make_tiny: Make, tmp_path_factory: pytest.TempPathFactory) -> Make:
    """`pruned(dtype=...)` -> the tiny model with half of its weights removed."""

    @cache
    def make(dtype: str = "float32") -> Path:
        out = tmp_path_factory.mktemp("pruned") / dtype
        assert overhaul("prune", "magnitude", make_tiny(dtype=dtype), "-o", out, *QUICK).code == 0
        return out

    return make


@pytest.fixture(scope="session")
def parent_of(make_tiny: Make, pruned: Make, tmp_path_factory: pytest.TempPathFactory) -> Make:
    """`parent_of(entry, dtype=...)` -> a model that the method can be applied to."""

    @cache
    def classifier(dtype: str) -> Path:
        return write_vit(tmp_path_factory.mktemp("vit") / dtype, classes=4, dtype=dtype)

    def parent(entry: Entry, dtype: str = "float32") -> Path:
        if issubclass(entry.load(), Learning) and sees(entry.load()):
            return classifier(dtype)
        return (pruned if entry.name in NEEDS_A_PRUNED_PARENT else make_tiny)(dtype=dtype)

    return parent


@pytest.fixture
def apply(parent_of: Make, tmp_path: Path) -> Run:
    """`apply(entry, "out", steps=3)` -> the directory that the method wrote in its tiny form."""

    def run(entry: Entry, name: str, *more: str, dtype: str = "float32", **changed: object) -> Path:
        out = tmp_path / name
        words = [entry.verb, entry.name, parent_of(entry, dtype), "-o", out, *tiny_form(entry, **changed)]
        done = overhaul(*words, *(more or QUICK))
        assert done.code == 0, done.err
        return out

    return run


@pytest.fixture(scope="session")
def made(parent_of: Make, tmp_path_factory: pytest.TempPathFactory) -> Make:
    """`made(entry)` -> what its tiny form wrote, once for all tests that do no more than read it."""

    @cache
    def make(entry: Entry) -> Path:
        out = tmp_path_factory.mktemp("made") / "out"
        done = overhaul(entry.verb, entry.name, parent_of(entry), "-o", out, *tiny_form(entry), *QUICK)
        assert done.code == 0, done.err
        return out

    return make


# Names, help, recipes: nothing is computed.


@pytest.mark.parametrize("entry", of(object))
def test_the_catalogue_says_what_the_class_says(entry: Entry):
    assert entry.summary == entry.load().summary()


HELP = """
import contextlib, io, json, sys
from overhaul import cli
told = {}
for words in json.loads(sys.argv[1]):
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.suppress(SystemExit):
        cli.main([*words, "--help"])
    told[" ".join(words)] = out.getvalue(), sorted({"torch", "transformers"} & sys.modules.keys())
print(json.dumps(told))
"""


@pytest.fixture(scope="session")
def helps() -> dict[str, tuple[str, list[str]]]:
    """By verb and method, its help and what was imported by then, of a process that shows one after the other."""
    done = python(HELP, json.dumps([[entry.verb, entry.name] for entry in catalog.ENTRIES]))
    assert done.code == 0, done.err
    return json.loads(done.out)


@pytest.mark.parametrize("entry", of(object))
def test_help_mentions_every_field_and_does_not_import_torch(entry: Entry, helps: dict[str, tuple[str, list[str]]]):
    told, imported = helps[f"{entry.verb} {entry.name}"]

    assert imported == []
    for name in entry.load().model_fields:
        assert f"--{name.replace('_', '-')}" in told


@pytest.mark.parametrize("entry", of(object))
def test_every_field_says_what_it_is(entry: Entry):
    assert all(info.description for info in entry.load().model_fields.values())


@pytest.mark.parametrize("entry", of(*CHANGES))
def test_a_recipe_comes_back_as_it_was_written(entry: Entry, tmp_path: Path):
    given = {"verb": entry.verb, "method": entry.name, **_as_fields(tiny_form(entry))}
    first = recipe.parse({"model": "m", "out": "o", "steps": [given]}).steps[0]
    written = _to_yaml(first)

    (tmp_path / "recipe.yaml").write_text(written)
    second = recipe.read(tmp_path / "recipe.yaml").steps[0]

    assert second.method == first.method
    assert _to_yaml(second) == written


def _as_fields(flags: list[str]) -> dict[str, Any]:
    fields: dict[str, list[str]] = {}
    for word in flags:
        if word.startswith("--"):
            values = fields[word.removeprefix("--").replace("-", "_")] = []
        else:
            values.append(word)
    return {name: values if len(values) > 1 else values[0] for name, values in fields.items()}


def _to_yaml(step: recipe.Step) -> str:
    chosen = step.method.model_dump(mode="json", exclude_defaults=True)
    return recipe.to_yaml("m", [(step.entry.verb, step.entry.name, chosen)], out="o")


@pytest.mark.parametrize("entry", of(object))
def test_an_unknown_flag_gets_a_suggestion(entry: Entry, tiny: Path, tmp_path: Path):
    out = [] if issubclass(entry.load(), Measure) else ["-o", tmp_path / "out"]
    done = overhaul(entry.verb, entry.name, tiny, *out, *EXTRA.get(entry.name, []), "--seeed", "1")

    assert done.code == 2
    assert "Perhaps you meant: --seed" in done.told.replace("-" * 10, "").replace("- ", ""), done.err
    assert not (tmp_path / "out").exists()


# What a run writes.


@pytest.mark.parametrize("entry", of(*CHANGES))
def test_the_record_names_method_fields_parent_and_cost(entry: Entry, apply: Run, parent_of: Make):
    before = contents(parent_of(entry))
    out = apply(entry, "out")
    shown = json.loads(overhaul("show", out, "--json").out)

    assert {"parameters", "nonzero_share", "bytes", "dtype", "lineage"} <= shown.keys()
    step = shown["lineage"][-1]
    assert {"verb", "method", "fields", "parent", "seconds", "peak_rss_bytes"} <= step.keys()
    assert (step["verb"], step["method"]) == (entry.verb, entry.name)
    assert step["fields"].keys() >= entry.load().model_fields.keys() - _nested(entry)
    assert step["parent"] == str(parent_of(entry))
    assert shown["verified"]
    assert contents(parent_of(entry)) == before, "the input was changed"


def _nested(entry: Entry) -> set[str]:
    """Fields that are settings themselves, recorded as `name.field`."""
    return {name for name, info in entry.load().model_fields.items() if hasattr(info.default, "model_dump")}


@pytest.mark.parametrize("entry", of(*CHANGES))
def test_the_directory_holds_what_belongs_to_a_model(entry: Entry, made: Make):
    there = {file.name for file in made(entry).iterdir()}

    images = issubclass(entry.load(), Learning) and sees(entry.load())
    reads = "preprocessor_config.json" if images else "tokenizer.json"
    assert there >= {"model.safetensors", "config.json", reads, "overhaul.json"}
    assert there >= {"recipe.yaml", "README.md", "report.html"}
    assert ("metrics.jsonl" in there) == issubclass(entry.load(), Training)
    assert ".state" not in there


@pytest.mark.parametrize("entry", of(*CHANGES))
def test_the_recipe_in_the_directory_makes_it_again(entry: Entry, made: Make, tmp_path: Path):
    out = made(entry)
    again = tmp_path / "again"
    options = ["evaluate=none", "dtype=fp32"]

    done = overhaul("run", out / "recipe.yaml", f"out={again}", *options)

    assert done.code == 0, done.err
    last = sorted(again.iterdir())[-1]
    assert (last / "model.safetensors").read_bytes() == (out / "model.safetensors").read_bytes()


@pytest.mark.parametrize("entry", of(*CHANGES))
def test_same_seed_same_bytes(entry: Entry, apply: Run):
    first, second = (apply(entry, name, *QUICK, "--seed", "3") for name in ("first", "second"))

    assert (first / "model.safetensors").read_bytes() == (second / "model.safetensors").read_bytes()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("products", ["fp32", "bf16"])
@pytest.mark.parametrize("entry", of(*CHANGES))
def test_precision_of_products_does_not_change_precision_on_disk(entry: Entry, products: str, dtype: str, apply: Run):
    out = apply(entry, "out", "--evaluate", "none", "--dtype", products, dtype=dtype)

    stored = load_file(out / "model.safetensors")
    # Integers are what a packed model is there for; what it keeps as floats is as it was.
    numbers = stored if entry.load().writes_stock else {n: t for n, t in stored.items() if not _is_packed(n, stored)}
    found = {tensor.dtype for tensor in numbers.values() if tensor.is_floating_point()}
    assert found == {getattr(torch, dtype)}
    assert all(tensor.isfinite().all() for tensor in stored.values())


def _is_packed(name: str, stored: dict[str, torch.Tensor]) -> bool:
    """Whether a tensor belongs to a layer whose weight is integers; its constants have a type of their own."""
    return not stored.get(f"{name.rpartition('.')[0]}.weight", torch.zeros(0)).is_floating_point()


@pytest.mark.parametrize("entry", of_text(*CHANGES))
def test_tied_embeddings_are_stored_once(entry: Entry, made: Make):
    stored = load_file(made(entry) / "model.safetensors")

    # Where two networks make one model, of each.
    assert sum(name.endswith("model.embed_tokens.weight") for name in stored) == entry.load().networks
    assert not any(name.endswith("lm_head.weight") for name in stored)


LOAD = """
import sys
sys.modules["overhaul"] = None
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
logits = {}
for path in sys.argv[2:]:
    AutoTokenizer.from_pretrained(path)
    model = AutoModelForCausalLM.from_pretrained(path, trust_remote_code=True)
    with torch.no_grad():
        logits[path] = model(torch.arange(40).view(2, 20)).logits
torch.save(logits, sys.argv[1])
"""


def test_outputs_load_in_a_fresh_process_that_knows_transformers_only(made: Make, tmp_path: Path):
    outs = [made(entry.values[0]) for entry in of_text(*CHANGES) if entry.values[0].load().writes_stock]
    done = python(LOAD, tmp_path / "logits.pt", *outs, env={"HF_MODULES_CACHE": str(tmp_path / "hf")})
    assert done.code == 0, done.err
    theirs = torch.load(tmp_path / "logits.pt")

    for out in outs:
        with torch.no_grad():
            ours = artifact.load(out).model(torch.arange(40).view(2, 20)).logits
        torch.testing.assert_close(ours, theirs[str(out)], rtol=1e-6, atol=1e-6, msg=str(out))


# Training.


@pytest.mark.parametrize("entry", of(Training))
def test_accumulating_four_batches_equals_a_batch_four_times_as_large(entry: Entry, apply: Run, parent_of: Make):
    accumulated = trained(apply(entry, "a", accumulate=4, batch_size=1))
    at_once = trained(apply(entry, "b", accumulate=1, batch_size=4))
    still = apply(entry, "c", steps=1, lr=1e-12) if leaves_weights(entry) else parent_of(entry)
    before = trained(still)

    moved = max(float((at_once[name] - before[name]).abs().max()) for name in before)
    apart = max(float((at_once[name] - accumulated[name]).abs().max()) for name in before)
    assert apart < 0.01 * moved


def leaves_weights(entry: Entry) -> bool:
    """Whether what it trains lies beside weights that stay as they are."""
    return entry.load().keeps_banks or entry.name in ("s3t", "whp")


def trained(directory: Path) -> dict[str, torch.Tensor]:
    """The tensors of a directory, those of its banks and adapters too."""
    stages = sorted((directory / "s3t" / "stages").glob("*"))
    files = [directory / "model.safetensors", *banks.files(directory), *stages]
    return {f"{file.name}/{name}": tensor for file in files for name, tensor in load_file(file).items()}


@pytest.mark.parametrize("entry", of(*CHANGES))
def test_one_row_is_enough(entry: Entry, apply: Run):
    kind = entry.load()
    one: dict[str, object] = {"batch_size": 1, "steps": 1} if issubclass(kind, Training) else {}
    if issubclass(kind, Pipeline) or (issubclass(kind, Transform) and kind.needs_data):
        one = {"samples": 1}

    assert (apply(entry, "out", **one) / "model.safetensors").is_file()


@pytest.mark.parametrize("entry", of(Training))
def test_a_killed_run_resumes_to_the_same_bytes(entry: Entry, apply: Run, parent_of: Make, tmp_path: Path):
    whole = apply(entry, "whole", steps=5, save_every=1)
    killed = tmp_path / "killed"
    command = [entry.verb, entry.name, parent_of(entry), "-o", killed]
    command += [*tiny_form(entry, steps=5, save_every=1), *QUICK]

    assert killed_at_the_third_step(*command) == -signal.SIGKILL
    assert {path.name for path in killed.iterdir()} == {".state"}
    refused(overhaul(*command), "unfinished run", "--resume")
    resumed = overhaul(*command, "--resume")

    assert resumed.code == 0, resumed.err
    assert "3/5" not in resumed.err.split("training")[0]
    assert (killed / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    points, others = (
        [json.loads(line) for line in (made / "metrics.jsonl").read_text().splitlines()] for made in (killed, whole)
    )
    assert [point["step"] for point in points] == list(range(1, len(others) + 1))


# Mistakes.


def _try(entry: Entry, model: object, tmp_path: Path, *more: object) -> Finished:
    out = [] if issubclass(entry.load(), Measure) else ["-o", tmp_path / "out"]
    done = overhaul(entry.verb, entry.name, model, *out, *tiny_form(entry), *more)
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob(".*"))
    return done


@pytest.mark.parametrize("entry", of(object))
def test_a_model_that_is_not_there(entry: Entry, tmp_path: Path):
    refused(_try(entry, tmp_path / "nowhere", tmp_path), "nowhere")


@pytest.mark.parametrize("entry", of_text(object))
def test_weights_that_are_not_numbers(entry: Entry, tiny: Path, tmp_path: Path):
    broken = tmp_path / "broken"
    broken.mkdir()
    for file in tiny.iterdir():
        os.link(file, broken / file.name)
    weights = load_file(tiny / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][3, 5] = float("nan")
    (broken / "model.safetensors").unlink()
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})

    refused(_try(entry, broken, tmp_path), "model.layers.1.mlp.up_proj.weight", "1 values")


@pytest.mark.parametrize("entry", of(object))
def test_empty_data(entry: Entry, parent_of: Make, tmp_path: Path):
    (tmp_path / "empty.txt").write_text("\n\n")
    if not _reads_a_corpus(entry.load()):
        pytest.skip("reads no corpus")

    refused(_try(entry, parent_of(entry), tmp_path, "--data", tmp_path / "empty.txt"), "empty")


def _reads_a_corpus(kind: type[Any]) -> bool:
    if issubclass(kind, Transform):
        return kind.needs_data
    return kind.needs_corpus if issubclass(kind, Measure) else not issubclass(kind, Learning)
