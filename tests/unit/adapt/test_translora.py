"""`adapt translora` through the command line: what is written, judged, answered and learnt, and without what."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from command import Finished, overhaul, refused
from overhaul import artifact, machine
from overhaul.adapt import translora
from overhaul.adapt.translora import TransLoRA
from overhaul.bundle import Bundle
from overhaul.generation import continuations
from overhaul.prompts import Writer
from overhaul.transfer import answer_tokens

QUICK = ("--samples", 6, "--steps", 4, "--batch-size", 2, "--lr", 1e-3, "--dtype", "fp32", "--evaluate", "none")
Move = Callable[..., Finished]


@pytest.fixture
def move(tiny: Path, bundle: Path, tmp_path: Path) -> Move:
    """`move(*flags, model=, out="out", bundle=)`; every prompt is good enough unless another threshold is given."""

    def run(
        *flags: object, model: Path = tiny, out: str = "out", bundle: Path = bundle, threshold: float = 0
    ) -> Finished:
        where = ("-o", tmp_path / out, "--bundle", bundle, "--threshold", threshold)
        return overhaul("adapt", "translora", model, *where, *QUICK, *flags)

    return run


def synthetic(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "synthetic.jsonl").read_text().splitlines()]


def told(out: Path) -> dict[str, str]:
    """The rows of the transfer's table."""
    (table,) = artifact.read_record(out)["tables"]
    return dict(table["rows"])


@pytest.fixture(scope="module")
def other(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose tokenizer knows bytes only."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {word: number for number, word in enumerate(["<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    bytes_only = Tokenizer(models.BPE(vocab=words, merges=[]))
    bytes_only.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytes_only.decoder = decoders.ByteLevel()
    directory = tmp_path_factory.mktemp("other") / "other"
    shutil.copytree(tiny, directory)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bytes_only, bos_token="<s>", eos_token="</s>", pad_token="</s>"
    )
    for file in directory.glob("*token*"):
        file.unlink()
    tokenizer.save_pretrained(directory)
    return directory


def test_the_data_is_not_needed(move: Move, tmp_path: Path, bundle: Path, private: Path):
    aside = private.rename(private.parent / "aside")
    try:
        done = move("--test", aside / "heldout.jsonl")
    finally:
        aside.rename(private)

    assert done.code == 0, done.err
    rows, seeds = synthetic(tmp_path / "out"), {seed.prompt for seed in Bundle.read(bundle).seeds}
    assert len(rows) == len({row["prompt"] for row in rows}) == int(told(tmp_path / "out")["kept"])
    assert not seeds & {row["prompt"] for row in rows}
    assert all(row["prompt"].startswith("sort ") and row["prompt"].endswith(" :") for row in rows)
    assert all(0 <= row["score"] <= 1 and row["completion"].strip() for row in rows)
    (step,) = artifact.read_record(tmp_path / "out")["lineage"]
    assert step["data"] is None


def test_the_answers_are_the_teachers(move: Move, tmp_path: Path, bundle: Path):
    assert move().code == 0
    rows, made = synthetic(tmp_path / "out"), Bundle.read(bundle)
    teacher = artifact.load(made.teacher_path)

    tokens = answer_tokens(teacher.processor, made)
    said = continuations(teacher.model, teacher.processor, [r["prompt"] for r in rows], tokens=tokens, one_line=True)

    assert [text.rstrip() for text in said] == [row["completion"] for row in rows]


def test_the_source_does_not_write_again_what_the_judge_learnt_to_refuse(move: Move, tmp_path: Path, bundle: Path):
    done = move("--generator", "source", "--samples", 20, "--prompts", "unfiltered")
    assert done.code == 0, done.err
    made = Bundle.read(bundle)
    base = artifact.load(made.base.path)
    writer = Writer(
        base.model, base.processor, made.seeds, made.frame, longest=made.statistics["longest_prompt"],
        purpose="bundle", seed=0, temperature=1.0, top_p=0.95, dtype=machine.compute_dtype("auto", torch.device("cpu")),
    )  # fmt: skip

    rows = synthetic(tmp_path / "out")
    assert len(rows) > 10
    assert {row["prompt"] for row in rows}.isdisjoint(writer.several(60, budget=64))


def test_the_table_says_what_became_of_it(move: Move, tmp_path: Path, private: Path):
    done = move("--test", private / "heldout.jsonl")
    assert done.code == 0, done.err
    found = told(tmp_path / "out")

    for what in (
        "accepted by the judge",
        "AUROC of the judge",
        "new among the usable",
        "likeness to the nearest example",
    ):
        assert found[what]
    for what in ("source with adapter", "target before", "target after"):
        assert 0 <= float(found[f"right answers, {what}"].rstrip("%")) <= 100
    assert found["asked"] == "20"
    assert "MMD^2 from held-out prompts, kept" in found
    assert "warning: the judge accepts 100.0%" in done.err
    assert "right answers, target after" in (tmp_path / "out" / "report.html").read_text()


@pytest.mark.parametrize("generator", ["target", "source"])
def test_a_target_with_another_tokenizer(move: Move, tmp_path: Path, other: Path, generator: str):
    done = move("--generator", generator, model=other)

    assert done.code == 0, done.err
    before, after = (load_file(path / "model.safetensors") for path in (other, tmp_path / "out"))
    changed = [name for name in before if not torch.equal(before[name], after[name])]
    assert changed
    assert all("_proj" in name for name in changed)


@pytest.mark.parametrize("kind", ["lora", "randlora", "vera"])
def test_the_new_adapter_may_be_of_another_kind(move: Move, tmp_path: Path, kind: str):
    done = move("--adapter", kind, "--rank", 4, "--no-merge")

    assert done.code == 0, done.err
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (config["peft_type"], config["r"]) == (kind.upper(), 4)


def test_the_controls(move: Move, tmp_path: Path, bundle: Path, private: Path):
    data, kept = ("--data", private / "private.jsonl"), {}
    for prompts, more in (("unfiltered", ()), ("random-text", ()), ("seeds", ()), ("real", data)):
        done = move("--prompts", prompts, *more, out=prompts, threshold=1)
        assert done.code == 0, done.err
        kept[prompts] = synthetic(tmp_path / prompts)

    real = {json.loads(line)["prompt"]: json.loads(line)["completion"] for line in data[1].read_text().splitlines()}
    assert len(kept["unfiltered"]) > 0
    assert all(row["score"] is not None for row in kept["unfiltered"])
    assert not any(row["prompt"].startswith("sort ") for row in kept["random-text"])
    assert {r["prompt"] for r in kept["seeds"]} <= {seed.prompt for seed in Bundle.read(bundle).seeds}
    assert {row["prompt"]: row["completion"] for row in kept["real"]}.items() <= real.items()
    assert artifact.read_record(tmp_path / "real")["lineage"][-1]["data"]["name"] == "private.jsonl"


def test_the_chain_goes_on_from_what_was_moved(move: Move, tmp_path: Path, other: Path, bundle: Path, tiny: Path):
    assert move(model=other, out="second").code == 0
    assert overhaul("bundle", tmp_path / "second", "-o", tmp_path / "next", "--from", bundle).code == 0

    done = move(bundle=tmp_path / "next", out="third", model=tiny)

    assert done.code == 0, done.err
    parents = artifact.read_record(tmp_path / "third")["lineage"][-1]["parents"]
    assert str(tmp_path / "second") in {parent["path"] for parent in parents}


def test_the_kept_prompts_are_not_carried_into_the_next_directory(move: Move, tmp_path: Path):
    assert move().code == 0
    done = overhaul("prune", "magnitude", tmp_path / "out", "-o", tmp_path / "pruned", "--evaluate", "none")

    assert done.code == 0, done.err
    assert not (tmp_path / "pruned" / "synthetic.jsonl").exists()


# Mistakes, and what is worth a word.


def test_a_judge_that_accepts_next_to_nothing(move: Move, tmp_path: Path):
    done = move(threshold=1)

    refused(done, "accepts 0.0%", "mean score is 0.", "rejected are 'sort ", "--generator source")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("answer", [" 1 2", ""], ids=["the same", "none"])
def test_a_teacher_that_says_one_thing(answer: str):
    with pytest.raises(translora.UserError, match="nothing to learn"):
        translora._refuse_empty_teacher([answer] * 19 + [" 3"] if answer else [""] * 3)


def test_answers_that_differ_are_no_mistake_and_few_prove_nothing():
    translora._refuse_empty_teacher([" 1"] * 9 + [" 2"])
    translora._refuse_empty_teacher([" 1"])


def test_a_target_that_cannot_read_the_examples(move: Move, tiny: Path, tmp_path: Path):
    short = shutil.copytree(tiny, tmp_path / "short")
    config = json.loads((short / "config.json").read_text()) | {"max_position_embeddings": 40}
    (short / "config.json").write_text(json.dumps(config))

    refused(move("--evaluate-seq-len", 32, model=short), "reads 40 tokens", "--generator source")


def test_private_data_where_none_is_needed(move: Move, tmp_path: Path, private: Path):
    done = move("--data", private / "private.jsonl")

    assert done.code == 0, done.err
    assert "warning: --data private.jsonl is the private data" in done.err
    assert artifact.read_record(tmp_path / "out")["lineage"][-1]["data"] is None


def test_an_uninformative_judge_is_told_of(move: Move, bundle: Path, tmp_path: Path):
    copy = shutil.copytree(bundle, tmp_path / "copy")
    stored = json.loads((copy / "bundle.json").read_text())
    stored["judge"]["auroc"] = 0.51
    (copy / "bundle.json").write_text(json.dumps(stored))

    assert "filter is uninformative" in move(bundle=copy).err


def test_a_pruned_target(move: Move, tiny: Path, tmp_path: Path):
    pruned = tmp_path / "pruned"
    assert overhaul("prune", "magnitude", tiny, "-o", pruned, "--evaluate", "none").code == 0

    refused(move(model=pruned), "pruned")
    assert move("--adapter", "randlora", "--rank", 8, model=pruned).code == 0


def test_layers_and_files_that_are_not_there(move: Move, tmp_path: Path):
    refused(move("--targets", "query"), "no linear layer is called 'query'")
    refused(move("--test", tmp_path / "nowhere.jsonl"), "does not exist")
    refused(move("--prompts", "real"), "no prompts with answers")


def test_a_path_is_kept_as_it_is_found_from_anywhere(bundle: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(bundle.parent)

    assert TransLoRA(bundle=bundle.name).bundle == str(bundle)


def test_a_dry_run_says_what_it_would_do(move: Move, tmp_path: Path):
    done = move("--dry-run")

    assert done.code == 0, done.err
    assert "6 prompts (filtered), of at most 60 that the target writes" in done.err
    assert not (tmp_path / "out").exists()
