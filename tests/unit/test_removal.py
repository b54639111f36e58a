"""Unlearning by training, from the command line: what it reads, what it keeps, and what it refuses."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from command import interrupted, overhaul, refused
from overhaul import artifact
from overhaul.corpora import NO_CORPUS, CorpusSpec, open_whole
from overhaul.data import Data
from overhaul.unlearning import texts
from overhaul.unlearning.terms import REFERENCE

METHODS = ("ga", "npo", "simnpo", "rmu")
FLAGS = ("--steps", "6", "--batch-size", "2", "--seq-len", "32", "--lr", "1e-3", "--dtype", "fp32", "--evaluate",
         "none", "--save-every", "0")  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `forget.jsonl` and `retain.jsonl`: twelve articles each, of different words."""
    folder, dice = tmp_path_factory.mktemp("articles"), random.Random(0)
    for name, words in (("forget", "river stone lamp garden winter"), ("retain", "letter bridge captain silver")):
        rows = [{"text": " ".join(dice.choices(words.split(), k=40))} for _ in range(12)]
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


@pytest.fixture
def unlearn(tiny: Path, folder: Path, tmp_path: Path) -> Callable[..., Any]:
    """`unlearn("ga", "--retain-term", "none")` -> the command, done; it wrote to `tmp_path / "out"`."""

    def run(method: str, *flags: object, out: str = "out", retain: bool = True) -> Any:
        kept = ("--retain", folder / "retain.jsonl") if retain else ()
        how = ("-o", tmp_path / out, "--forget", folder / "forget.jsonl", *kept, *FLAGS, *flags)
        return overhaul("forget", method, tiny, *how)

    return run


def data_of(tiny: Path) -> Data:
    return Data(NO_CORPUS, artifact.load(tiny).processor)


def windows(data: Data, path: Path, seq_len: int) -> texts.Windows:
    """All of a file."""
    return texts.cut(replace(data, corpus=open_whole(CorpusSpec(path=str(path)))), seq_len)


def loss(model: Any, data: Data, path: Path) -> float:
    """Nats a token of a text."""
    found = windows(data, path, 32)
    with torch.no_grad():
        return float(model(input_ids=found["input_ids"], labels=found["labels"]).loss)


def test_all_of_a_text_is_in_the_windows_and_the_last_is_filled_from_the_first(tiny: Path, folder: Path):
    data = data_of(tiny)
    found = windows(data, folder / "forget.jsonl", 32)
    rows = [json.loads(line)["text"] for line in (folder / "forget.jsonl").read_text().splitlines()]
    ids = [token for row in rows for token in (*data.tokenizer(row)["input_ids"], data.tokenizer.eos_token_id)]
    flat = found["input_ids"].flatten().tolist()

    assert flat[: len(ids)] == ids
    assert flat[len(ids) :] == ids[: len(flat) - len(ids)]
    assert len(flat) - len(ids) < 32


def test_questions_are_not_unlearnt_and_a_text_shorter_than_a_window_is_repeated(tiny: Path, tmp_path: Path):
    (tmp_path / "one.jsonl").write_text(json.dumps({"question": "Who has the lamp?", "answer": "Aldo"}))
    found = windows(data_of(tiny), tmp_path / "one.jsonl", 64)

    assert found["labels"].shape == (1, 64)
    assert 0 < int((found["labels"] != -100).sum()) < 40


def test_the_reference_is_that_of_the_model_before(tiny: Path, folder: Path):
    model, data = artifact.load(tiny).model, data_of(tiny)
    found = windows(data, folder / "forget.jsonl", 32)
    told = texts.with_reference(model, found, batch_size=5, dtype=torch.float32)

    sums = [
        -float(model(input_ids=row[None], labels=row[None]).loss.detach()) * 31 for row in found["input_ids"]
    ]  # every token is a label
    assert told[REFERENCE].tolist() == pytest.approx(sums, rel=1e-4)


@pytest.mark.parametrize("method", METHODS)
def test_texts_are_unlearnt_and_others_less(
    unlearn: Callable[..., Any], tiny: Path, folder: Path, tmp_path: Path, method: str
):
    done = unlearn(method, "--lr", "3e-3", "--steps", "12")
    assert done.code == 0, done.err
    before, after = artifact.load(tiny).model, artifact.load(tmp_path / "out").model
    data = data_of(tiny)
    rises = [loss(after, data, folder / f"{of}.jsonl") - loss(before, data, folder / f"{of}.jsonl")
             for of in ("forget", "retain")]  # fmt: skip

    if method == "rmu":  # of random weights the states say little of the loss
        assert any(
            not torch.equal(one, other) for one, other in zip(before.parameters(), after.parameters(), strict=True)
        )
    else:
        assert rises[0] > 0.1, rises
        assert rises[0] > rises[1] + 0.1, rises


def test_rmu_trains_the_last_matrices_of_its_blocks_alone(unlearn: Callable[..., Any], tiny: Path, tmp_path: Path):
    done = unlearn("rmu", "--layer", "2", "--blocks", "1")
    assert done.code == 0, done.err
    one, other = load_file(tiny / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")

    assert [name for name in one if not torch.equal(one[name], other[name])] == ["model.layers.1.mlp.down_proj.weight"]


def test_a_task_vector_of_nothing_is_the_model_and_of_minus_one_the_one_that_learnt_further(
    unlearn: Callable[..., Any], tiny: Path, folder: Path, tmp_path: Path
):
    for alpha in ("0", "-1", "1"):
        assert unlearn("task-vector", "--alpha", alpha, out=alpha, retain=False).code == 0
    before = load_file(tiny / "model.safetensors")
    nothing, further, off = (load_file(tmp_path / alpha / "model.safetensors") for alpha in ("0", "-1", "1"))
    data = data_of(tiny)
    losses = [loss(artifact.load(where).model, data, folder / "forget.jsonl")
              for where in (tmp_path / "-1", tiny, tmp_path / "1")]  # fmt: skip

    assert all(torch.equal(nothing[name], before[name]) for name in before)
    assert losses == sorted(losses)
    for name, tensor in before.items():
        assert torch.allclose(off[name], 2 * tensor - further[name], atol=1e-6)


def test_epochs_are_passes_over_the_texts_to_forget(
    unlearn: Callable[..., Any], tiny: Path, folder: Path, tmp_path: Path
):
    assert unlearn("ga", "--epochs", "2").code == 0
    count = len(windows(data_of(tiny), folder / "forget.jsonl", 32)["labels"])

    (history,) = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()][-1:]
    assert history["step"] == -(-2 * count // 2)


def test_what_was_read_is_in_the_lineage(unlearn: Callable[..., Any], tmp_path: Path):
    assert unlearn("npo").code == 0
    step = json.loads((tmp_path / "out" / "overhaul.json").read_text())["lineage"][-1]

    assert {Path(step["fields"][name]).name for name in ("forget", "retain")} == {"forget.jsonl", "retain.jsonl"}


def facts_of(out: Path) -> list[dict[str, float]]:
    """The metrics of every model of a chain, by name."""
    record = json.loads((out / "overhaul.json").read_text())
    return [{row["metric"]: row["value"] for row in one["metrics"]} for one in record["facts"]]


SHORT = ("--evaluate-seq-len", "32", "--evaluate-windows", "1000")
FORGET, RETAIN = "loss on forget.jsonl (to forget)", "loss on retain.jsonl (to retain)"


def exact_loss(model: Any, data: Data, path: Path) -> float:
    """Nats a token of all of a text, cut into windows of 32, the last one as short as it is."""
    rows = [json.loads(line)["text"] for line in path.read_text().splitlines()]
    ids = [token for row in rows for token in (*data.tokenizer(row)["input_ids"], data.tokenizer.eos_token_id)]
    total, count = 0.0, 0
    for at in range(0, len(ids), 32):
        row = torch.tensor([ids[at : at + 32]])
        if row.shape[1] > 1:
            with torch.no_grad():
                total += float(model(input_ids=row, labels=row).loss) * (row.shape[1] - 1)
            count += row.shape[1] - 1
    return total / count


def test_the_losses_before_and_after_are_those_of_all_of_the_texts(
    unlearn: Callable[..., Any], tiny: Path, folder: Path, tmp_path: Path
):
    done = unlearn("ga", *SHORT, "--eval-every", "3")
    assert done.code == 0, done.err
    data, files = data_of(tiny), {FORGET: folder / "forget.jsonl", RETAIN: folder / "retain.jsonl"}
    told = facts_of(tmp_path / "out")
    points = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]

    for found, where in zip(told, (tiny, tmp_path / "out"), strict=True):
        model = artifact.load(where).model
        assert found == pytest.approx({name: exact_loss(model, data, path) for name, path in files.items()}, rel=1e-4)
    assert FORGET in done.out
    assert [(step, "whole/forget.jsonl (to forget)" in point) for step, point in enumerate(points, 1)] == [
        (step, step in (3, 6)) for step in range(1, 7)
    ]
    assert points[-1]["whole/retain.jsonl (to retain)"] == pytest.approx(told[-1][RETAIN], rel=1e-5)
    assert "loss on whole texts" in (tmp_path / "out" / "report.html").read_text()


def test_losses_of_a_chain_are_measured_once_and_on_the_same_windows(
    unlearn: Callable[..., Any], tiny: Path, folder: Path, tmp_path: Path
):
    assert unlearn("ga", *SHORT).code == 0
    again = ("-o", tmp_path / "again", "--forget", folder / "forget.jsonl", "--retain", folder / "retain.jsonl")
    assert overhaul("forget", "npo", tmp_path / "out", *again, *FLAGS, *SHORT).code == 0
    other = ("-o", tmp_path / "other", "--forget", folder / "retain.jsonl", "--retain-term", "none")
    assert overhaul("forget", "ga", tmp_path / "out", *other, *FLAGS, *SHORT).code == 0

    assert facts_of(tmp_path / "again")[:2] == facts_of(tmp_path / "out")
    assert [list(one) for one in facts_of(tmp_path / "other")] == 2 * [["loss on retain.jsonl (to forget)"]]


def test_a_text_shorter_than_a_window_counts_once_and_of_questions_the_answers_do(
    unlearn: Callable[..., Any], tiny: Path, tmp_path: Path
):
    (tmp_path / "one.jsonl").write_text(json.dumps({"question": "Who has the lamp?", "answer": "Aldo"}))
    flags = ("--retain-term", "none", "--forget", tmp_path / "one.jsonl", "--evaluate-seq-len", "64")
    assert unlearn("ga", *flags, retain=False).code == 0
    row = json.loads((tmp_path / "out" / "overhaul.json").read_text())["facts"][0]["metrics"][0]
    data = data_of(tiny)
    ids = data.tokenizer("Aldo", add_special_tokens=False)["input_ids"]

    assert row["metric"] == "loss on one.jsonl (to forget)"
    assert len(ids) <= row["count"] <= len(ids) + 3  # with the space before and the end behind


RUINOUS = ("--retain-term", "none", "--clip", "0", "--batch-size", "16")


@pytest.mark.parametrize("how", [("--lr", "3e8"), ("--lr", "30", "--weight-decay", "1")])
def test_a_run_that_diverges_ends_with_the_last_good_weights(
    unlearn: Callable[..., Any], tmp_path: Path, how: tuple[str, ...]
):
    done = unlearn("ga", *RUINOUS, *how, "--steps", "60", retain=False)
    assert done.code == 0, done.err
    last = json.loads((tmp_path / "out" / "metrics.jsonl").read_text().splitlines()[-1])
    said = (
        f"Training diverged at step {last['diverged']}, where a number was not finite; the weights are those of step "
    )
    assert f"{said}{last['weights_of']}." in done.err
    assert f"{said}{last['weights_of']}." in (tmp_path / "out" / "report.html").read_text()
    assert unlearn("ga", *RUINOUS, *how, "--steps", last["weights_of"], out="short", retain=False).code == 0

    assert last["step"] == last["diverged"] - 1 < 60
    ended, short = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "short"))
    assert all(torch.equal(ended[name], short[name]) and short[name].isfinite().all() for name in short)


def test_a_run_that_diverges_after_ctrl_c_ends_with_the_same_weights(
    unlearn: Callable[..., Any], tiny: Path, folder: Path, tmp_path: Path
):
    how = (*RUINOUS, "--lr", "3e8", "--steps", "60", "--save-every", "1")
    assert unlearn("ga", *how, out="whole", retain=False).code == 0
    flags = ("forget", "ga", tiny, "-o", tmp_path / "out", "--forget", folder / "forget.jsonl", *FLAGS, *how)
    assert interrupted(lambda seen: len(seen) == 5, *flags).code == 130
    assert overhaul(*flags, "--resume").code == 0

    whole, resumed = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "out"))
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_a_run_that_diverges_in_the_first_pass_is_an_error(unlearn: Callable[..., Any], tmp_path: Path):
    refused(unlearn("ga", *RUINOUS, "--lr", "5e9", retain=False), "not finite at step 2", "a lower --lr")
    assert not (tmp_path / "out" / "model.safetensors").exists()


@pytest.mark.parametrize(
    ("method", "flags", "said"),
    [
        ("ga", (), "retain_term gdr needs texts to retain"),
        ("npo", ("--retain-term", "klr"), "retain_term klr needs texts to retain"),
        ("npo", ("--beta", "0", "--retain-term", "none"), "beta"),
        ("simnpo", ("--retain-term", "none", "--gamma", "-1"), "gamma"),
        ("rmu", ("--retain-term", "none", "--layer", "3"), "the model has 2 blocks"),
        ("ga", ("--retain-term", "none", "--forget", "nothing.txt"), "nothing.txt"),
        ("ga", ("--retain", "nothing.txt"), "nothing.txt"),
        ("ga", ("--retain-term", "none", "--forget", "-"), "the texts to forget are read more than once"),
    ],
)
def test_bad_input_is_one_clear_error(
    unlearn: Callable[..., Any], tmp_path: Path, method: str, flags: tuple[str, ...], said: str
):
    refused(unlearn(method, *flags, retain=False), said)
    assert not (tmp_path / "out").exists()


def test_one_text_is_not_both(unlearn: Callable[..., Any], folder: Path):
    refused(unlearn("ga", "--retain", folder / "forget.jsonl", retain=False), "a text is one or the other")
    refused(unlearn("ga", "--retain-term", "none"), "retain is read by a retain_term, and there is none")
