"""`adapt translora` through the command line: what is written, judged, answered and learnt, and without what."""

from __future__ import annotations

import gc
import json
import shutil
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from command import Finished, overhaul, refused
from overhaul import artifact, machine
from overhaul.adapt import translora
from overhaul.adapt.translora import TransLoRA
from overhaul.bundle import Bundle
from overhaul.data import Data
from overhaul.errors import UserError
from overhaul.generation import continuations, mean_states
from overhaul.prompts import Writer
from overhaul.synthetic import Frame, Sieve
from overhaul.transfer import Teaching, answer_tokens, learnt

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


def test_the_judge_is_gone_when_the_distance_is_measured_and_the_source_is_read_once(
    tiny: Path, bundle: Path, monkeypatch: pytest.MonkeyPatch
):
    read: list[tuple[str, weakref.ref[nn.Module]]] = []
    alive: list[str] = []

    def load(self: Teaching, ref: str) -> artifact.Artifact:
        made = artifact.load(tiny)  # the weights are of no account
        read.append((Path(ref).name, weakref.ref(made.model)))
        return made

    def states(*given: Any, **how: Any) -> Any:
        gc.collect()
        alive.extend(name for name, model in read if model() is not None)
        return mean_states(*given, **how)

    monkeypatch.setattr(Teaching, "load", load)
    monkeypatch.setattr("overhaul.transfer.mean_states", states)
    teaching = Teaching(Bundle.read(bundle), artifact.read_tokenizer(tiny), torch.float32, 0, torch.zeros(1))
    teaching.written(None, 20, budget=64, threshold=None, temperature=1.0, top_p=0.95)

    assert [name for name, _ in read] == [tiny.name, "judge"]
    assert alive == [tiny.name]


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


def shortened(model: Path, tmp_path: Path) -> Path:
    """The model with another configuration: it reads 40 tokens."""
    short = shutil.copytree(model, tmp_path / "short")
    config = json.loads((short / "config.json").read_text()) | {"max_position_embeddings": 40}
    (short / "config.json").write_text(json.dumps(config))
    return short


def test_a_judge_that_accepts_next_to_nothing(move: Move, tmp_path: Path):
    done = move(threshold=1)

    refused(done, "accepts 0.0%", "mean score is 0.", "rejected are 'sort ", "--generator source")
    assert not (tmp_path / "out").exists()


def test_what_is_shown_as_rejected_was_rejected(stalled: Callable[..., None]):
    prompts = [f"prompt {number}" for number in range(200)]

    with pytest.raises(UserError, match="rejected are 'prompt 3'; 'prompt 2'; 'prompt 99'"):
        stalled(prompts, [0.9, 0.8, 0.3, 0.4, *[0.1] * 196], 0.5)


@pytest.mark.parametrize("threshold", [None, 0.0])
def test_prompts_that_repeat_are_told_of_with_and_without_a_filter(
    stalled: Callable[..., None], threshold: float | None, capsys: pytest.CaptureFixture[str]
):
    stalled(["prompt"], [0.5], threshold)

    assert "warning: of what was written 25% is new" in capsys.readouterr().err


@pytest.fixture
def stalled(bundle: Path) -> Callable[..., None]:
    """What is said of prompts, their scores and a threshold; of four that were written, one was new."""
    sieve = Sieve((), Frame("", ""), 40)
    for _ in range(4):
        sieve("one and the same")
    teaching = Teaching(Bundle.read(bundle), None, torch.float32, 0, torch.zeros(1))
    return lambda seen, scores, threshold: teaching._refuse_stall(seen, scores, threshold, sieve)


@pytest.mark.parametrize("answer", [" 1 2", ""], ids=["the same", "none"])
def test_a_teacher_that_says_one_thing(answer: str):
    with pytest.raises(translora.UserError, match="nothing to learn"):
        translora._refuse_empty_teacher([answer] * 19 + [" 3"] if answer else [""] * 3)


def test_answers_that_differ_are_no_mistake_and_few_prove_nothing():
    translora._refuse_empty_teacher([" 1"] * 9 + [" 2"])
    translora._refuse_empty_teacher([" 1"])


def test_a_target_that_cannot_read_the_examples(move: Move, tiny: Path, tmp_path: Path):
    refused(move(model=shortened(tiny, tmp_path)), "the target reads 40 tokens", "--generator source")


@pytest.mark.parametrize("how", [("--generator", "source"), ("--prompts", "seeds"), ("--prompts", "random-text")])
def test_a_target_that_cannot_read_the_windows(move: Move, tiny: Path, tmp_path: Path, how: tuple[str, str]):
    refused(move(*how, model=shortened(tiny, tmp_path)), "--seq-len 512 is more than the target reads", "up to 40")


def test_a_source_that_cannot_read_the_examples(move: Move, tiny: Path, bundle: Path, private: Path, tmp_path: Path):
    short, copy = shortened(tiny, tmp_path), shutil.copytree(bundle, tmp_path / "copy")
    stored = json.loads((copy / "bundle.json").read_text())
    stored["base"]["path"] = str(short)
    (copy / "bundle.json").write_text(json.dumps(stored))

    refused(move("--generator", "source", bundle=copy), "the source reads 40 tokens", "--generator target")
    done = overhaul("bundle", short, "-o", tmp_path / "new", "--data", private / "private.jsonl")
    refused(done, "the source reads 40 tokens", "fewer --seeds")


def test_private_data_where_none_is_needed(move: Move, tmp_path: Path, private: Path):
    done = move("--data", private / "private.jsonl")

    assert done.code == 0, done.err
    assert "warning: --data private.jsonl is the private data" in done.err
    assert "nothing is learnt from it or measured on it" in done.err
    assert artifact.read_record(tmp_path / "out")["lineage"][-1]["data"] is None


def test_private_data_that_is_cut_into_prompts(move: Move, tmp_path: Path, private: Path):
    done = move("--data", private / "private.jsonl", "--prompts", "random-text")

    assert done.code == 0, done.err
    assert "is the private data that a transfer does without: prompts are cut out of it" in done.err
    assert artifact.read_record(tmp_path / "out")["lineage"][-1]["data"]["name"] == "private.jsonl"


def test_private_data_is_not_measured_on_unless_it_is_named(tiny: Path, bundle: Path, private: Path, tmp_path: Path):
    data = private / "private.jsonl"
    quick = ("--prompts", "seeds", "--steps", 1, "--evaluate-seq-len", 32, "--evaluate-windows", 2, "--data", data)
    for out, more in (("unnamed", ()), ("named", ("--evaluate", data))):
        done = overhaul("adapt", "translora", tiny, "-o", tmp_path / out, "--bundle", bundle, *quick, *more)
        assert done.code == 0, done.err

    measured = {out: artifact.read_record(tmp_path / out)["facts"][-1]["corpus"] for out in ("unnamed", "named")}
    assert measured == {"unnamed": "sample", "named": "private.jsonl"}


def test_a_test_on_what_was_trained_on(move: Move, bundle: Path, private: Path, tmp_path: Path):
    seeds, one = Bundle.read(bundle).seeds, tmp_path / "one.jsonl"
    one.write_text(json.dumps({"prompt": seeds[0].prompt, "completion": " 1"}) + "\n")
    dry = ("--prompts", "seeds", "--dry-run")

    assert "is the private data itself" in move(*dry, "--test", private / "private.jsonl").err
    assert "has 1 of the bundle's 5 examples" in move(*dry, "--test", one).err
    assert "--test" not in move(*dry, "--test", private / "heldout.jsonl").err


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


@pytest.mark.parametrize(
    ("prompts", "says"),
    [
        ("unfiltered", "all kept, and scored by a judge"),
        ("random-text", "6 pieces of text (random-text), not judged"),
        ("seeds", "5 examples of the bundle (seeds), not judged"),
        ("real", "their own answers"),
    ],
)
def test_a_dry_run_of_a_control_says_what_this_does(tiny: Path, bundle: Path, prompts: str, says: str):
    told = "; ".join(TransLoRA(bundle=str(bundle), prompts=prompts, samples=6).outline(nn.Module()))  # pyright: ignore

    assert says in told
    assert ("writes" in told) == (prompts == "unfiltered")
    assert "kept above" not in told


def test_each_kind_is_trained_at_its_own_rate(bundle: Path):
    rates = {
        kind: TransLoRA(bundle=str(bundle), adapter=kind, rank=4)._trained().lr  # pyright: ignore
        for kind in translora.KINDS
    }

    assert rates == {kind: trained().lr for kind, trained in translora.KINDS.items()}
    assert TransLoRA(bundle=str(bundle), adapter="vera", lr=0.5)._trained().lr == 0.5  # pyright: ignore


def test_an_answer_may_begin_with_a_line_break(bundle: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch):
    made, tokenizer = Bundle.read(bundle), artifact.read_tokenizer(tiny)
    teaching = Teaching(made, tokenizer, torch.float32, 0, torch.zeros(1))
    monkeypatch.setattr(Teaching, "load", lambda *_: artifact.load(tiny))
    monkeypatch.setattr("overhaul.transfer.continuations", lambda *_, **__: ["\n42 \n"])

    answers, _ = teaching.answers(["sort 1 :"], (), own=None)
    data = Data(learnt([("sort 1 :", answers[0], None)], made), tokenizer)

    assert answers == ["\n42"]
    assert "\n42" in tokenizer.decode(data.encode(data.corpus.train[0]).ids)
