"""The commands as they are typed: results on stdout, progress on stderr, one JSON object where it is asked for."""

from __future__ import annotations

import io
import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from command import overhaul, python, refused
from overhaul import artifact, catalog

RECIPES = Path(__file__).parents[2] / "recipes"
QUICK = ("--evaluate", "none", "--dtype", "fp32")


@pytest.fixture(scope="module")
def half(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model, pruned to half, with its quality measured on the sample."""
    out = tmp_path_factory.mktemp("cli") / "half"
    judged = ("--evaluate-windows", "2", "--evaluate-seq-len", "32")
    assert overhaul("prune", "magnitude", tiny, "-o", out, *judged).code == 0
    return out


def json_of(*words: object) -> dict[str, Any]:
    """What a command prints: exactly one JSON object."""
    done = overhaul(*words)
    assert done.code == 0, done.err
    return json.loads(done.out)


# Help.


def test_help_lists_every_method_and_imports_nothing_heavy():
    code = (
        "import sys\nfrom overhaul.cli import main\n"
        "try:\n main(['--help'])\n"
        "finally:\n assert not {'torch', 'transformers', 'pydantic', 'tyro', 'numpy'} & set(sys.modules)"
    )
    done = python(code)

    assert done.code == 0, done.err
    for entry in catalog.ENTRIES:
        assert entry.name in done.out
        assert entry.summary in done.out


@pytest.mark.parametrize("words", [[], ["-h"], ["--help"], ["help"], ["prune"], ["prune", "--help"]])
def test_help_is_a_result(words: list[str]):
    done = overhaul(*words)

    assert done.code == 0
    assert done.out.startswith("usage: overhaul")
    assert done.err == ""


def test_version():
    assert re.fullmatch(r"overhaul \d+\.\d+\.\d+\n", overhaul("--version").out)


# A change, and what is said about it.


def test_a_change_prints_its_table_on_stdout_and_its_progress_on_stderr(tiny: Path, tmp_path: Path):
    judged = ("--evaluate-windows", "2", "--evaluate-seq-len", "32")
    done = overhaul("prune", "magnitude", tiny, "-o", tmp_path / "out", *judged)

    assert done.code == 0
    for row in ("perplexity", "non-zero (blocks)", "size", "tokens/s", "peak memory", "time"):
        assert row in done.out
    assert "50.0%" in done.out
    assert f"written: {tmp_path / 'out'}" in done.out
    assert "prune magnitude 2/2" in done.err
    assert "\x1b[" not in done.out + done.err


def test_a_dry_run_says_what_would_be_done_and_does_nothing(tiny: Path, tmp_path: Path):
    words = ("--data", "sample", "--steps", "7", "--seq-len", "32", "--batch-size", "2")
    done = overhaul("adapt", "full", tiny, "-o", tmp_path / "out", *words, "--dry-run")

    assert done.code == 0
    for said in ("trains 106,816 parameters", "7 steps, 448 tokens", "writes", "pack(32)"):
        assert said in done.err
    assert list(tmp_path.iterdir()) == []


def test_the_loss_on_further_text_is_watched(tiny: Path, tmp_path: Path):
    how = ("--data", "sample", "--steps", "4", "--seq-len", "32", "--batch-size", "2", "--eval-every", "2")
    judged = ("--evaluate-windows", "2", "--evaluate-seq-len", "32", "--watch", "sample", "stdlib")
    done = overhaul("adapt", "full", tiny, "-o", tmp_path / "out", *how, *judged)

    assert done.code == 0, done.err
    assert "loss on stdlib" in done.out
    points = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert [set(point) >= {"held-out/sample", "held-out/stdlib"} for point in points] == [False, True, False, True]
    assert "held-out loss (nats per token)" in (tmp_path / "out" / "report.html").read_text()
    again = overhaul("run", tmp_path / "out" / "recipe.yaml", f"out={tmp_path / 'again'}")
    assert again.code == 0, again.err
    assert "loss on stdlib" in again.out


@pytest.mark.parametrize(("method", "words", "says"), [
    ("full", (), "weights (0 MB)"), ("lora", (), "weights (0 MB)"), ("lora", ("--no-merge",), "weights,"),
    ("sltrain", ("--rank", "2", "--no-merge"), "weights,"),
])  # fmt: skip
def test_a_dry_run_says_a_size_only_where_it_stays(
    method: str, words: tuple[str, ...], says: str, tiny: Path, tmp_path: Path
):
    how = ("--data", "sample", "--steps", "1", "--seq-len", "16", "--batch-size", "1")

    assert f"out: {says}" in overhaul("adapt", method, tiny, "-o", tmp_path / "out", *how, *words, "--dry-run").err


def test_show(half: Path, tiny: Path):
    shown = json_of("show", half, "--json")

    assert shown["parameters"] == 106_816
    assert shown["nonzero_share_blocks"] == 0.5
    assert shown["bytes"] == (half / "model.safetensors").stat().st_size
    assert (shown["dtype"], shown["verified"]) == ("fp32", True)
    [step] = shown["lineage"]
    assert (step["verb"], step["method"], step["parent"]) == ("prune", "magnitude", str(tiny))
    text = overhaul("show", half).out
    assert "weights are those of the record" in text
    assert "1. prune magnitude" in text


def test_show_a_directory_that_was_not_made_here(tiny: Path):
    assert json_of("show", tiny, "--json")["lineage"] == []
    assert "no record" in overhaul("show", tiny).out


def test_measure_perplexity_prints_one_object(tiny: Path, half: Path):
    words = ("--data", "sample", "--seq-len", "32", "--windows", "4")
    rows = json_of("measure", "perplexity", tiny, half, *words, "--json")["rows"]

    assert [row["model"] for row in rows] == [str(tiny), str(half)]
    for row in rows:
        assert row.keys() == {"model", "metric", "value", "low", "high", "count"}
        assert row["metric"] == "perplexity"
        assert row["low"] <= row["value"] <= row["high"]
        assert row["count"] == 4 * 31
    assert overhaul("measure", "perplexity", tiny, *words).out.startswith(f"{tiny}  perplexity ")


def test_measure_writes_a_page_and_overwrites_none(tiny: Path, half: Path, tmp_path: Path):
    words = ("measure", "perplexity", tiny, half, "--data", "sample", "--seq-len", "32", "--windows", "2")
    done = overhaul(*words, "--html", tmp_path / "page.html")

    assert done.code == 0, done.err
    page = (tmp_path / "page.html").read_text()
    assert page.startswith("<!doctype html")
    assert "Perplexity: from" in page
    assert str(half) in page
    refused(overhaul(*words, "--html", tmp_path / "page.html"), "exists")
    refused(overhaul(*words, "--html", tmp_path / "nowhere" / "page.html"), "no directory")
    assert (tmp_path / "page.html").read_text() == page


def test_measure_without_a_model():
    assert overhaul("measure", "perplexity").code == 2


def test_compare(tiny: Path, half: Path, tmp_path: Path):
    words = ("--windows", "2", "--seq-len", "32")
    found = json_of("compare", tiny, half, *words, "--html", tmp_path / "report.html", "--json")

    assert len(found["rows"]) == 2
    [change] = found["changes"]
    assert change["changed_tensors"] == 14  # seven linear layers in each of two blocks
    page = (tmp_path / "report.html").read_text()
    assert page.lstrip().lower().startswith("<!doctype html")
    assert "http://" not in page.replace("http://www.w3.org", "")
    assert "14 of" in overhaul("compare", tiny, half, *words).out


def test_compare_takes_folders_and_says_what_nothing_beats(tiny: Path, half: Path, tmp_path: Path):
    words = ("compare", half.parent, "--windows", "2", "--seq-len", "32")
    found = json_of(*words, "--html", tmp_path / "page.html", "--json")

    assert [row["path"] for row in found["rows"]] == [str(tiny), str(half)]
    assert all(row["decode_tokens_per_second"] > 0 for row in found["rows"])
    assert [type(row["pareto"]) for row in found["rows"]] == [bool, bool]
    assert any(row["pareto"] for row in found["rows"])
    assert found["warnings"] == []
    page = (tmp_path / "page.html").read_text()
    assert page.count('class="point ') == 3 * 2  # two models in three pictures
    assert "on the front" in overhaul(*words).out


def test_compare_refuses_a_folder_without_models(tmp_path: Path):
    (tmp_path / "empty").mkdir()

    refused(overhaul("compare", tmp_path / "empty"), "no model", "config.json")


def test_compare_tells_models_of_one_name_apart(tiny: Path, half: Path, tmp_path: Path):
    for folder, model in (("before", tiny), ("after", half)):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "model").symlink_to(model)

    words = ("--windows", "2", "--seq-len", "32")
    table = overhaul("compare", tmp_path / "before" / "model", tmp_path / "after" / "model", *words).out

    assert "before/model" in table
    assert "after/model" in table


def test_compare_overwrites_nothing_and_needs_two(tiny: Path, half: Path, tmp_path: Path):
    (tmp_path / "report.html").write_text("mine")

    refused(overhaul("compare", tiny, half, "--html", tmp_path / "report.html"), "exists")
    refused(overhaul("compare", tiny), "at least two")
    assert (tmp_path / "report.html").read_text() == "mine"


def test_generate_goes_on_from_the_prompt_and_repeats_itself(half: Path, monkeypatch: pytest.MonkeyPatch):
    said = json_of("generate", half, "--prompt", "The sea", "--tokens", "5", "--json")
    assert said["prompt"] == "The sea"
    assert overhaul("generate", half, "--prompt", "The sea", "--tokens", "5").out == f"The sea{said['text']}\n"

    sampled = [overhaul("generate", half, "--prompt", "The sea", "--seed", "3").out for _ in range(2)]
    assert sampled[0] == sampled[1]

    monkeypatch.setattr(sys, "stdin", io.StringIO("The sea"))
    assert json_of("generate", half, "--prompt", "-", "--tokens", "5", "--json") == said
    assert overhaul("generate", half, "--prompt", "Hello", "--chat").code == 0


# Lists.


def test_list():
    everything = json_of("list", "--json")["methods"]
    assert [(m["verb"], m["method"]) for m in everything] == [(e.verb, e.name) for e in catalog.ENTRIES]

    lines = overhaul("list", "prune").out.splitlines()
    assert [line.split()[1] for line in lines] == [entry.name for entry in catalog.methods("prune")]
    refused(overhaul("list", "prun"), "did you mean 'prune'?")


def test_data_list():
    told = json_of("data", "list", "--json")
    names, images = ([one["name"] for one in told[kind]] for kind in ("corpora", "images"))

    assert names[0] == "sample"
    assert images[0] == "digits"
    lines = [line.split() for line in overhaul("data", "list").out.splitlines()]
    assert [words[0] if words else "" for words in lines] == [*names, "", "images:", *images]
    refused(overhaul("data", "lst"), "data list")


def test_data_preview_marks_what_is_not_trained_on(tiny: Path, tmp_path: Path):
    rows = ({"prompt": f"What is {n}? ", "completion": f"It is {n}."} for n in range(400))
    (tmp_path / "qa.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ("data", "preview", tmp_path / "qa.jsonl", "--model", tiny, "--seq-len", "64", "--windows", "1")

    seen = json_of(*words, "--json")

    [window] = seen["windows"]
    assert 0 < window["trained"] < window["tokens"] == 64
    assert re.search(r"\[\[What is \d+\? \]\]It is \d+\.", window["text"])
    assert window["text"] in overhaul(*words).out


# Recipes.

TWO_STEPS = """
model: {model}
out: {out}
data: sample
evaluate: none
dtype: fp32
steps:
  - {{verb: prune, method: wanda, samples: 4, seq_len: 32}}
  - {{verb: adapt, method: perp, steps: 3, seq_len: 32, batch_size: 2}}
"""


@pytest.fixture
def two_steps(tiny: Path, tmp_path: Path) -> Path:
    file = tmp_path / "recipe.yaml"
    file.write_text(TWO_STEPS.format(model=tiny, out=tmp_path / "runs"))
    return file


def test_run_takes_each_step_from_the_one_before(two_steps: Path, tmp_path: Path):
    done = overhaul("run", two_steps)

    assert done.code == 0, done.err
    assert [path.name for path in sorted((tmp_path / "runs").iterdir())] == ["01-prune-wanda", "02-adapt-perp"]
    shown = json_of("show", tmp_path / "runs" / "02-adapt-perp", "--json")
    assert [step["method"] for step in shown["lineage"]] == ["wanda", "perp"]
    assert shown["nonzero_share_blocks"] == 0.5
    refused(overhaul("run", two_steps), "not empty")


def test_overrides_reach_options_and_steps_by_number_and_name(two_steps: Path, tmp_path: Path):
    done = overhaul(
        "run", two_steps, f"out={tmp_path / 'other'}", "steps.1.sparsity=0.25", "steps.perp.steps=2", "seed=5"
    )

    assert done.code == 0, done.err
    lineage = json_of("show", tmp_path / "other" / "02-adapt-perp", "--json")["lineage"]
    assert (lineage[0]["fields"]["sparsity"], lineage[1]["fields"]["steps"]) == (0.25, 2)
    assert {step["seed"] for step in lineage} == {5}


def test_resume_keeps_finished_steps(two_steps: Path, tmp_path: Path):
    assert overhaul("run", two_steps).code == 0
    second = tmp_path / "runs" / "02-adapt-perp"
    wanted = (second / "model.safetensors").read_bytes()
    for file in second.iterdir():
        file.unlink()
    second.rmdir()
    before = (tmp_path / "runs" / "01-prune-wanda" / "overhaul.json").read_bytes()

    done = overhaul("run", two_steps, "--resume")

    assert done.code == 0, done.err
    assert "01-prune-wanda is finished" in done.err
    assert (tmp_path / "runs" / "01-prune-wanda" / "overhaul.json").read_bytes() == before
    assert (second / "model.safetensors").read_bytes() == wanted


def test_resume_refuses_a_step_made_with_other_settings(two_steps: Path, tmp_path: Path):
    assert overhaul("run", two_steps).code == 0

    refused(overhaul("run", two_steps, "steps.1.sparsity=0.25", "--resume"), "other settings")


def test_resume_refuses_a_step_made_from_another_model(two_steps: Path, make_tiny: Any):
    assert overhaul("run", two_steps).code == 0

    other = make_tiny(bias=True)
    refused(overhaul("run", two_steps, f"model={other}", "--resume"), "other settings")


def test_a_measure_is_no_step(tiny: Path, tmp_path: Path):
    file = tmp_path / "recipe.yaml"
    file.write_text(f"model: {tiny}\nout: {tmp_path / 'runs'}\nsteps:\n- {{verb: measure, method: perplexity}}\n")

    refused(overhaul("run", file), "measure writes no model", "recipe.yaml:4")


def test_a_chain_judged_on_another_text_keeps_its_dense_reference(tiny: Path, tmp_path: Path):
    words = ("--evaluate-windows", "1", "--evaluate-seq-len", "32")
    assert overhaul("prune", "magnitude", tiny, "-o", tmp_path / "half", *words).code == 0
    mine = tmp_path / "mine.jsonl"
    mine.write_text(
        "".join(json.dumps({"text": f"Line {n} of {n * n} words, and no more. " * 9}) + "\n" for n in range(60))
    )

    flags = ("--data", mine, "--steps", "1", "--seq-len", "32", *words)
    done = overhaul("adapt", "perp", tmp_path / "half", "-o", tmp_path / "out", *flags)

    assert done.code == 0, done.err
    facts = json.loads((tmp_path / "out" / "overhaul.json").read_text())["facts"]
    assert [one["label"] for one in facts] == ["dense", "pruned (magnitude)", "won back (perp)"]
    assert {one["corpus"] for one in facts} == {"mine.jsonl"}


def test_facts_of_other_weights_are_not_believed(tiny: Path, tmp_path: Path):
    words = ("--evaluate-windows", "1", "--evaluate-seq-len", "32")
    flags = ("--data", "sample", "--steps", "1", "--seq-len", "32", "--lr", "0.05", *words)
    assert overhaul("adapt", "full", tiny, "-o", tmp_path / "out", *flags).code == 0
    shutil.copy(tiny / "model.safetensors", tmp_path / "out" / "model.safetensors")

    found = json_of("compare", tiny, tmp_path / "out", "--windows", "1", "--seq-len", "32", "--json")

    first, second = (row["perplexity"]["value"] for row in found["rows"])
    assert first == second


def test_the_record_counts_what_was_taken_from_the_corpus(half: Path, tmp_path: Path):
    """A training counts every pass; a reconstruction trains every part on the windows that it took once."""
    flags = ("--data", "sample", "--steps", "3", "--seq-len", "32", "--batch-size", "2", *QUICK)
    assert overhaul("adapt", "perp", half, "-o", tmp_path / "trained", *flags).code == 0
    rebuilt = (*flags, "--reconstruct", "--samples", "4")
    assert overhaul("adapt", "perp", half, "-o", tmp_path / "rebuilt", *rebuilt).code == 0

    taken = [artifact.read_record(tmp_path / out)["lineage"][-1]["data"]["tokens"] for out in ("trained", "rebuilt")]
    assert taken == [3 * 2 * 32, 4 * 32]


@pytest.mark.parametrize("train", ["norms", "mask_lora"])
@pytest.mark.parametrize("fast_bf16", [True, False])
def test_bf16_models_train_with_and_without_bf16_hardware(
    make_tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, train: str, fast_bf16: bool
):
    monkeypatch.setattr("torch.cpu._is_amx_tile_supported", lambda: fast_bf16)
    bf16 = make_tiny(dtype="bfloat16")
    assert overhaul("prune", "magnitude", bf16, "-o", tmp_path / "half", "--evaluate", "none").code == 0
    flags = ("--data", "sample", "--steps", "1", "--seq-len", "32", "--train", train, "--evaluate", "none")

    tried = overhaul("adapt", "perp", tmp_path / "half", "-o", tmp_path / "out", *flags, "--dry-run")
    done = overhaul("adapt", "perp", tmp_path / "half", "-o", tmp_path / "out", *flags)

    assert (tried.code, done.code) == (0, 0), tried.err + done.err
    assert load_file(tmp_path / "out" / "model.safetensors")["model.norm.weight"].dtype == torch.bfloat16


def test_resume_of_a_finished_recipe_is_no_error(two_steps: Path):
    assert overhaul("run", two_steps).code == 0

    assert overhaul("run", two_steps, "--resume").code == 0


def test_a_dry_run_of_a_recipe_writes_nothing(two_steps: Path, tmp_path: Path):
    done = overhaul("run", two_steps, "--dry-run")

    assert done.code == 0
    assert not (tmp_path / "runs").exists()
    assert "the steps after it depend on its output" in done.err


@pytest.mark.parametrize("override", ["steps", "steps.9.lr=1", "steps.loar.rank=4", "steps.perp.stps=2"])
def test_an_override_that_names_nothing(two_steps: Path, override: str):
    assert overhaul("run", two_steps, override).code == 2


def test_the_schema_accepts_the_shipped_recipes_and_refuses_a_typo():
    jsonschema = pytest.importorskip("jsonschema")

    schema = json_of("schema")
    jsonschema.Draft202012Validator.check_schema(schema)
    validator = jsonschema.Draft202012Validator(schema)
    for file in RECIPES.glob("*.yaml"):
        content = yaml.safe_load(file.read_text())
        assert list(validator.iter_errors(content)) == []
        content["steps"][0]["sparcity"] = 0.5
        assert list(validator.iter_errors(content))


def test_doctor():
    facts = json_of("doctor", "--json")

    assert facts.keys() >= {"python", "overhaul", "torch", "device", "hardware", "cache"}
    assert "torch" in overhaul("doctor").out


# Bugs are not mistakes.


def test_a_bug_shows_its_traceback_and_where_to_report_it(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def broken(*_: object) -> None:
        raise RuntimeError("the sky fell")

    monkeypatch.setattr(artifact, "write_model", broken)
    done = overhaul("prune", "magnitude", tiny, "-o", tmp_path / "out", *QUICK)

    assert done.code == 1
    assert "RuntimeError: the sky fell" in done.err
    assert "overhaul doctor" in done.err
    assert list(tmp_path.iterdir()) == []


def test_whole_holds_nothing_out(tiny: Path, tmp_path: Path):
    rows = [{"text": f"Part {number} of what is known. " * 4} for number in range(40)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    tokens = []
    for name, more in (("some", ()), ("all", ("--whole",))):
        how = (
            "--data",
            tmp_path / "rows.jsonl",
            "--epochs",
            1,
            "--seq-len",
            16,
            "--batch-size",
            1,
            "--evaluate",
            "none",
        )
        done = overhaul("adapt", "full", tiny, "-o", tmp_path / name, *how, *more)
        assert done.code == 0, done.err
        tokens.append(16 * len((tmp_path / name / "metrics.jsonl").read_text().splitlines()))
    tokenizer: Any = artifact.load(tiny).processor
    whole = sum(len(tokenizer(row["text"])["input_ids"]) + 1 for row in rows)

    assert tokens[0] < tokens[1]
    assert whole <= tokens[1] < whole + 16
