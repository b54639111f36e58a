"""`distill kd` as it is typed: what it says, what it refuses, what it leaves behind."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

from command import Finished, overhaul, refused
from overhaul import artifact, recipe
from overhaul.distill.kd import KnowledgeDistillation, vocabulary_difference
from overhaul.errors import UserError

TINY = ("--data", "sample", "--steps", "3", "--batch-size", "2", "--seq-len", "32", "--lr", "1e-3",
        "--evaluate", "none", "--dtype", "fp32")  # fmt: skip


@pytest.fixture(scope="module")
def deep(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher of six narrow blocks, with the vocabulary of `tiny`."""
    path = tmp_path_factory.mktemp("deep") / "deep"
    sizes: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "vocab_size": 512}
    heads: dict[str, Any] = {"num_attention_heads": 2, "num_key_value_heads": 2}
    torch.manual_seed(1)
    config = LlamaConfig(num_hidden_layers=6, max_position_embeddings=512, tie_word_embeddings=True, **sizes, **heads)
    AutoModelForCausalLM.from_config(config).save_pretrained(path)
    AutoTokenizer.from_pretrained(tiny).save_pretrained(path)
    return path


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OVERHAUL_CACHE", str(tmp_path / "cache"))


def distill(student: Path, teacher: object, out: Path, *more: object) -> Finished:
    return overhaul("distill", "kd", student, "--teacher", teacher, "-o", out, *TINY, *more)


def points(out: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def test_the_record_names_the_teacher(tiny: Path, deep: Path, tmp_path: Path):
    done = distill(tiny, deep, tmp_path / "out")
    assert done.code == 0, done.err

    step = artifact.read_record(tmp_path / "out")["lineage"][-1]
    assert [parent["path"] for parent in step["parents"]] == [str(tiny), str(deep)]
    assert step["fields"]["teacher"] == str(deep)
    assert points(tmp_path / "out")[-1]["loss/kl"] < points(tmp_path / "out")[0]["loss/kl"]


def test_a_much_deeper_teacher_is_followed_through_its_hidden_states(tiny: Path, deep: Path, tmp_path: Path):
    auto = distill(tiny, deep, tmp_path / "auto")
    told = distill(tiny, deep, tmp_path / "told", "--states", "embedding", "1")
    alone = distill(tiny, deep, tmp_path / "alone", "--states", "none")

    assert "2 of the teacher's 6 blocks, so hidden states are learnt too" in auto.err
    for done, name in ((auto, "auto"), (told, "told"), (alone, "alone")):
        assert done.code == 0, done.err
        assert ("loss/states" in points(tmp_path / name)[0]) == (name != "alone")
        assert load_file(tmp_path / name / "model.safetensors").keys() == load_file(tiny / "model.safetensors").keys()
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("auto", "told", "alone")]
    assert weights[0] == weights[1] != weights[2]


def test_the_learned_map_is_no_parameter_of_the_student(tiny: Path, deep: Path, tmp_path: Path):
    assert distill(tiny, deep, tmp_path / "out", "--states", "embedding", "1").code == 0

    (step,) = artifact.read_record(tmp_path / "out")["lineage"]
    assert step["trainable_parameters"] == sum(p.numel() for p in artifact.load(tiny).model.parameters())


def test_a_result_inside_the_teacher_is_refused(tiny: Path, deep: Path):
    refused(distill(tiny, deep, deep / "out"), "is inside the model that is read")


def test_a_recipe_does_not_keep_what_another_teacher_taught(tiny: Path, deep: Path, tmp_path: Path):
    teacher, file = tmp_path / "teacher", tmp_path / "recipe.yaml"
    shutil.copytree(deep, teacher)
    step = f"{{verb: distill, method: kd, teacher: {teacher}, steps: 1, batch_size: 1, seq_len: 32}}"
    file.write_text(f"model: {tiny}\nout: {tmp_path / 'runs'}\ndata: sample\nevaluate: none\nsteps:\n- {step}\n")
    assert overhaul("run", file).code == 0
    assert overhaul("run", file, "--resume").code == 0

    tensors = load_file(teacher / "model.safetensors")
    save_file(
        {name: tensor * 1.01 for name, tensor in tensors.items()}, teacher / "model.safetensors", {"format": "pt"}
    )
    refused(overhaul("run", file, "--resume"), "other settings")


def test_a_run_with_hidden_states_resumes_to_the_same_bytes(tiny: Path, deep: Path, tmp_path: Path):
    assert distill(tiny, deep, tmp_path / "whole", "--save-every", "1").code == 0
    before = artifact.stage

    def killed(out: Path) -> Any:
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(artifact, "stage", killed)
        assert distill(tiny, deep, tmp_path / "stopped", "--save-every", "1").code == 130
    assert artifact.stage is before
    assert {path.name for path in (tmp_path / "stopped" / ".state").iterdir()} == {"step-000001", "step-000002"}

    done = distill(tiny, deep, tmp_path / "stopped", "--save-every", "1", "--resume")

    assert done.code == 0, done.err
    whole, stopped = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "stopped"))
    assert whole == stopped
    assert [p["loss"] for p in points(tmp_path / "whole")] == [p["loss"] for p in points(tmp_path / "stopped")]


def test_a_cut_learns_from_what_it_was_cut_from(tiny: Path, tmp_path: Path):
    shape = ("--layers", "1", "--hidden", "48", "--ffn", "64", "--kv-groups", "1", "--heads", "2")
    cut = overhaul("shrink", "minitron", tiny, "-o", tmp_path / "cut", "--data", "sample", "--samples", "4",
                   "--seq-len", "32", "--evaluate", "none", *shape)  # fmt: skip
    assert cut.code == 0, cut.err

    done = distill(tmp_path / "cut", tiny, tmp_path / "out", "--steps", "8")

    assert done.code == 0, done.err
    first, *_, last = points(tmp_path / "out")
    assert "1 of the teacher's 2 blocks, so hidden states are learnt too" in done.err
    assert last["loss/kl"] < first["loss/kl"]
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").config.hidden_size == 48
    verbs = [step["verb"] for step in artifact.read_record(tmp_path / "out")["lineage"]]
    assert verbs == ["shrink", "distill"]


def test_recomputed_activations_give_the_same_losses(tiny: Path, deep: Path, tmp_path: Path):
    for name, more in (("plain", ()), ("recomputed", ("--checkpoint-activations",))):
        done = distill(tiny, deep, tmp_path / name, *more)
        assert done.code == 0, done.err

    plain, recomputed = (points(tmp_path / name) for name in ("plain", "recomputed"))
    for name in ("loss/kl", "loss/states", "grad_norm"):
        assert [point[name] for point in recomputed] == pytest.approx([point[name] for point in plain], rel=1e-5)


def test_one_pass_of_the_teacher_serves_two_students(tiny: Path, deep: Path, make_tiny: Any, tmp_path: Path):
    first = distill(tiny, deep, tmp_path / "first", "--top-k", "512")
    files = {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("*.safetensors")}
    second = distill(make_tiny(bias=True), deep, tmp_path / "second", "--top-k", "512")
    live = distill(tiny, deep, tmp_path / "live", "--states", "none")

    for done in (first, second, live):
        assert done.code == 0, done.err
    assert len(files) == 3, "one a micro-batch"
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("*.safetensors")} == files
    assert "likeliest words of 186 tokens" in first.err
    losses = [[point["loss"] for point in points(tmp_path / name)] for name in ("first", "live")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4), "all words are the whole vocabulary"


def test_a_dry_run_says_what_the_teacher_costs(tiny: Path, deep: Path, tmp_path: Path):
    done = distill(tiny, deep, tmp_path / "out", "--dry-run")

    assert done.code == 0, done.err
    assert f"teacher {deep}: 0 MB beside the student" in done.err
    assert not (tmp_path / "out").exists()


def test_a_model_that_is_its_own_teacher_is_told(tiny: Path, tmp_path: Path):
    done = distill(tiny, tiny, tmp_path / "out")

    assert done.code == 0, done.err
    assert "the loss is zero" in done.err
    assert [point["loss"] for point in points(tmp_path / "out")] == [0.0] * 3


def test_an_adapter_can_teach(tiny: Path, tmp_path: Path):
    made = overhaul("adapt", "lora", tiny, "-o", tmp_path / "lora", "--no-merge", *TINY)
    assert made.code == 0, made.err

    done = distill(tiny, tmp_path / "lora", tmp_path / "out")

    assert done.code == 0, done.err
    assert points(tmp_path / "out")[0]["loss"] > 0


def test_a_teacher_is_not_taken_for_the_dense_self_of_a_student(tiny: Path, deep: Path, tmp_path: Path):
    assert overhaul("prune", "magnitude", tiny, "-o", tmp_path / "half", "--evaluate", "none").code == 0
    assert distill(tmp_path / "half", deep, tmp_path / "out").code == 0

    read = artifact.dense_ancestor(artifact.load(tmp_path / "out"))

    assert read is not None
    norm = read("model.norm.")["weight"]
    assert torch.equal(norm, load_file(tiny / "model.safetensors")["model.norm.weight"])
    zeros = load_file(tmp_path / "out" / "model.safetensors")["model.layers.0.mlp.up_proj.weight"] == 0
    assert int(zeros.sum()) == zeros.numel() // 2


# Mistakes.


def test_vocabularies_that_differ(tiny: Path, deep: Path, tmp_path: Path):
    other = tmp_path / "other"
    other.mkdir()
    for file in deep.iterdir():
        (other / file.name).write_bytes(file.read_bytes())
    text = json.loads((other / "tokenizer.json").read_text())
    vocab = text["model"]["vocab"]
    word, after = sorted(vocab, key=vocab.__getitem__)[10:12]
    vocab[word], vocab[after] = vocab[after], vocab[word]
    (other / "tokenizer.json").write_text(json.dumps(text))

    done = distill(tiny, other, tmp_path / "out")

    refused(done, "cannot teach", f"word 10 is {word!r} for the student and {after!r} for the teacher")
    assert not (tmp_path / "out").exists()


def test_vocabularies_in_words():
    assert vocabulary_difference({"a": 0, "b": 1}, {"b": 1, "a": 0}) == ""
    assert "has 2 words, the teacher's 1" in vocabulary_difference({"a": 0, "b": 1}, {"a": 0})
    assert "word 0 is 'a' for the student and 'b'" in vocabulary_difference({"a": 0, "b": 1}, {"a": 1, "b": 0})


def test_no_teacher(tiny: Path, tmp_path: Path):
    done = overhaul("distill", "kd", tiny, "-o", tmp_path / "out", *TINY)

    assert done.code == 2
    assert "Missing from" in done.err or "equired" in done.err, done.err
    assert "--teacher" in done.err
    with pytest.raises(UserError, match="distill kd needs 'teacher'"):
        recipe.parse({"model": "m", "out": "o", "data": "sample", "steps": [{"verb": "distill", "method": "kd"}]})


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (("--top-k", 0), ("top_k", "greater than 0")),
        (("--top-k", 513), ("--top-k 513", "up to 512")),
        (("--states", "2"), ("--states 2", "1 to 1, embedding, layers")),
        (("--states", "0"), ("--states 0", "1 to 1")),
        (("--states", "heads"), ("auto, none, or any of",)),
        (("--states", "none", "embedding"), ("stand alone",)),
        (("--states", "layers", "--top-k", 4), ("no hidden states",)),
        (("--temperature", 0), ("temperature",)),
        (("--floor", 1.5), ("floor",)),
    ],
    ids=lambda value: " ".join(map(str, value)),
)
def test_settings_that_cannot_be(tiny: Path, deep: Path, tmp_path: Path, more: tuple[Any, ...], words: tuple[str, ...]):
    refused(distill(tiny, deep, tmp_path / "out", *more), *words)
    assert not (tmp_path / "out").exists()


def test_a_teacher_that_is_not_there(tiny: Path, tmp_path: Path):
    refused(distill(tiny, tmp_path / "nowhere", tmp_path / "out"), "nowhere")


def test_a_teacher_that_reads_less(tiny: Path, deep: Path, tmp_path: Path):
    short = tmp_path / "short"
    short.mkdir()
    for file in deep.iterdir():
        (short / file.name).write_bytes(file.read_bytes())
    config = json.loads((short / "config.json").read_text())
    (short / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 16}))

    refused(distill(tiny, short, tmp_path / "out"), "--seq-len 32 is more than", "up to 16")


def test_hidden_states_are_learnt_when_much_depth_is_gone():
    auto = KnowledgeDistillation(teacher="t")

    assert auto.pairs(30, 30) == auto.pairs(24, 30) == auto.pairs(12, 6) == ()
    assert auto.pairs(23, 30)[0] == (0, 0)
    assert KnowledgeDistillation(teacher="t", top_k=3).pairs(10, 30) == ()
    assert KnowledgeDistillation(teacher="t", states=("embedding", "2", "layers")).pairs(8, 16) == (
        (0, 0), (2, 4), (4, 8), (6, 12),
    )  # fmt: skip
    with pytest.raises(ValidationError, match="at least 1 character"):
        KnowledgeDistillation(teacher="")
