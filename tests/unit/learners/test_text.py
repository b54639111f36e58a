"""Texts learnt one after the other: losses, answers, terms against their definitions, what is refused."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.nn.functional import cross_entropy, kl_div

from command import overhaul, refused
from overhaul import artifact, task_record
from overhaul.learners.text import ReplayedText, TextKept, diagonal_of_text
from overhaul.objective import Forward, weighted_mean
from overhaul.text_task_data import TextTaskData
from overhaul.text_tasks import open_texts

FLAGS = ("--steps", "20", "--batch-size", "2", "--seq-len", "32", "--dtype", "fp32", "--heldout", "4", "--optimizer",
         "adamw", "--lr", "0.003")  # fmt: skip


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Sums with their answers, and a text that says one thing again and again."""
    folder = tmp_path_factory.mktemp("texts")
    rows = [{"question": f"{a} + {b} =", "answer": str(a + b)} for a in range(20) for b in range(20)]
    (folder / "sums.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    lines = [{"text": f"In room {n} the clock strikes {n % 7} and the cat sleeps on. " * 4} for n in range(200)]
    (folder / "rooms.jsonl").write_text("\n".join(json.dumps(line) for line in lines))
    return folder / "sums.jsonl", folder / "rooms.jsonl"


def learnt(tiny: Path, texts: tuple[Path, Path], out: Path, *flags: object) -> dict[str, torch.Tensor]:
    done = overhaul("learn", "bregman", tiny, "-o", out, "--tasks", *texts, *FLAGS, *flags)
    assert done.code == 0, done.err
    return load_file(out / "model.safetensors")


def losses(out: Path) -> list[list[str]]:
    tables = json.loads((out / "overhaul.json").read_text())["tables"]
    (told,) = [table for table in tables if table["title"] == "Held-out loss on every text, nats a token"]
    return told["rows"]


def test_each_text_is_measured_before_and_after_each(tiny: Path, texts: tuple[Path, Path], tmp_path: Path):
    learnt(tiny, texts, tmp_path / "out", "--output-term", "none")
    record = task_record.read(tmp_path / "out")

    assert [one.unit for one in record.tasks] == ["tokens", "tokens"]
    assert record.matrices["class-IL"].has(0, 2), "a language model can be asked before it has learnt"
    metrics = json.loads((tmp_path / "out" / "overhaul.json").read_text())["facts"][-1]["metrics"]
    assert all(row["low"] <= row["value"] <= row["high"] and row["high"] - row["low"] < 0.5 for row in metrics)
    before, first, second = losses(tmp_path / "out")
    assert [before[0], first[0], second[0]] == ["before", "after sums.jsonl", "after rooms.jsonl"]
    assert float(second[2]) < float(first[2]) - 0.5, "what is learnt is known better"


def test_what_is_said_is_what_the_model_says(tiny: Path, texts: tuple[Path, Path]):
    made = artifact.load(tiny)
    made.model.requires_grad_(False)
    data = TextTaskData(open_texts([str(path) for path in texts]), made.processor, 32, measured=3)
    answers, text = (data.said(made.model, number) for number in (0, 1))

    window = torch.tensor(data.heldout[1][0].ids)[None]
    logits_TV = made.model(input_ids=window).logits[0, :-1]
    assert float(text.nll_N[0]) == pytest.approx(float(cross_entropy(logits_TV, window[0, 1:])), abs=1e-4)
    assert float(text.right_N[0]) == pytest.approx(float((logits_TV.argmax(1) == window[0, 1:]).double().mean()))
    one = data.heldout[0][0]
    asked = torch.tensor(one.ids)[None]
    kept = torch.tensor(one.trained)[1:]
    logits_KV = made.model(input_ids=asked).logits[0, :-1][kept]
    assert float(answers.nll_N[0]) == pytest.approx(float(cross_entropy(logits_KV, asked[0, 1:][kept])), abs=1e-4)
    assert 0 < int(kept.sum()) < len(kept), "an answer is scored, and its question is not"


def test_replay_and_the_old_model_are_their_definitions(tiny: Path):
    model: Any = artifact.load(tiny).model
    old: Any = copy.deepcopy(model)
    for parameter in old.parameters():
        parameter.data += 0.01 * torch.randn_like(parameter)
    ids_BT, drawn_MT = torch.randint(5, 50, (2, 9)), torch.randint(5, 50, (3, 9))
    batch = {"input_ids": ids_BT, "labels": ids_BT, "memory/input_ids": drawn_MT, "memory/labels": drawn_MT}

    def value(term: Any) -> float:
        return float(weighted_mean(term(Forward(model, batch), batch), term.counts(batch)).detach())

    ours, theirs = (one(input_ids=drawn_MT).logits[:, :-1].flatten(0, 1).detach() for one in (model, old))
    assert value(ReplayedText()) == pytest.approx(float(cross_entropy(ours, drawn_MT[:, 1:].flatten())), abs=1e-5)
    kl = kl_div(ours.log_softmax(-1), theirs.log_softmax(-1), log_target=True, reduction="batchmean")
    assert value(TextKept(old.requires_grad_(False))) == pytest.approx(float(kl), abs=1e-5)
    alone = {"input_ids": ids_BT, "labels": ids_BT}
    assert ReplayedText().count(alone) == 0


def test_information_is_that_of_single_windows(tiny: Path):
    model: Any = artifact.load(tiny).model.requires_grad_(True)
    windows = [torch.randint(5, 50, (1, 8)) for _ in range(2)]
    found = diagonal_of_text(model, [{"input_ids": ids, "labels": ids} for ids in windows])

    name = "model.layers.1.mlp.up_proj.weight"
    expected = torch.zeros_like(found[name])
    for ids in windows:
        model.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        expected += model.get_parameter(name).grad.square() / 2
    assert torch.allclose(found[name], expected, rtol=1e-4, atol=1e-10)


@pytest.mark.parametrize(
    "flags",
    [
        ("--output-term", "er", "--alpha", "0", "--memory", "8"),
        ("--output-term", "lwf", "--alpha", "0"),
        ("--output-term", "kl-replay", "--alpha", "0", "--memory", "8"),
        ("--output-term", "none", "--weight-term", "l2", "--beta", "0"),
        (
            "--output-term",
            "none",
            "--weight-term",
            "ewc",
            "--beta",
            "0",
            "--fisher",
            "empirical",
            "--fisher-examples",
            "2",
        ),
    ],
)
def test_with_weight_zero_every_method_is_plain_training(
    tiny: Path, texts: tuple[Path, Path], tmp_path: Path, flags: tuple[str, ...]
):
    few = ("--steps", "3")
    plain = learnt(tiny, texts, tmp_path / "plain", "--output-term", "none", *few)
    held = learnt(tiny, texts, tmp_path / "held", *flags, *few)

    assert all(torch.equal(plain[name], held[name]) for name in plain)


def test_a_memory_holds_the_first_text(tiny: Path, texts: tuple[Path, Path], tmp_path: Path):
    turned = (texts[1], texts[0])
    learnt(tiny, turned, tmp_path / "plain", "--output-term", "none", "--steps", "60")
    learnt(tiny, turned, tmp_path / "er", "--output-term", "er", "--alpha", "1", "--memory", "32", "--steps", "60")

    plain, held = (float(losses(tmp_path / name)[-1][1]) for name in ("plain", "er"))
    assert held < plain - 0.1
    assert task_record.read(tmp_path / "er").tasks[-1].kept_bytes["memory"] == 32 * 32 * 8 * 2


def test_a_pruned_model_keeps_its_zeros_and_what_it_learnt_is_pruned(
    tiny: Path, texts: tuple[Path, Path], tmp_path: Path
):
    pruned = overhaul("prune", "magnitude", tiny, "-o", tmp_path / "pruned", "--sparsity", "0.5", "--evaluate", "none")
    assert pruned.code == 0, pruned.err
    zeros = {name: tensor == 0 for name, tensor in load_file(tmp_path / "pruned" / "model.safetensors").items()}
    found = learnt(tmp_path / "pruned", texts, tmp_path / "out", "--output-term", "er", "--memory", "8", "--steps", "3")

    name = "model.layers.1.mlp.up_proj.weight"
    assert int(zeros[name].sum()) > 0.4 * zeros[name].numel()
    assert all((found[other][zeros[other]] == 0).all() for other in zeros if "_proj" in other)
    how = ("--sparsity", "0.6", "--data", "sample", "--samples", "4", "--seq-len", "32", "--evaluate", "none")
    again = overhaul("prune", "wanda", tmp_path / "out", "-o", tmp_path / "again", *how)
    assert again.code == 0, again.err
    chain = json.loads((tmp_path / "again" / "overhaul.json").read_text())["lineage"]
    assert [step["verb"] for step in chain] == ["prune", "learn", "prune"]


def test_what_there_is_only_of_classifiers_is_refused(tiny: Path, texts: tuple[Path, Path], tmp_path: Path):
    def tried(*flags: object) -> Any:
        return overhaul("learn", "bregman", tiny, "-o", tmp_path / "out", *flags)

    tasks = ("--tasks", *texts)
    refused(tried(*tasks), "--output-term der++ is of classifiers")
    refused(tried(*tasks, "--output-term", "none", "--weight-term", "ewc"), "--fisher exact runs over labels")
    refused(tried(*tasks, "--output-term", "none", "--weight-term", "vcl"), "--weight-term vcl is of classifiers")
    refused(tried(*tasks, "--output-term", "none", "--classifier", "growing"), "--classifier growing is of classifiers")
    refused(tried(*tasks, "--split", "2"), "split is of image sets, and this is a language model")
    refused(tried("--tasks", texts[0], texts[0]), "is named twice")
    refused(tried("--output-term", "none"), "no corpus is named")
    refused(tried("--tasks", "stdlb", "--output-term", "none"), "stdlb")
    assert not (tmp_path / "out").exists()
