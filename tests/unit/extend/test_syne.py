"""`extend syne`: rounds, shares that follow perplexities, easy text first, nothing twice across runs, bad input."""

from __future__ import annotations

import json
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from command import overhaul, refused
from overhaul import continuation, train
from overhaul.corpora import open_corpus
from overhaul.data import Data
from overhaul.extend.syne import Syne
from overhaul.scorers import document_losses

RUN = ("--batch-size", "2", "--seq-len", "32", "--dtype", "fp32", "--lr", "1e-3", "--evaluate", "none")


def write(path: Path, word: str, count: int = 300) -> Path:
    lines = (json.dumps({"text": f"{word} number {n} of {n % 7}, {word}. " * (3 + n % 6)}) for n in range(count))
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("texts")
    words = {"new": "Neues", "law": "courts decide", "art": "painted blue", "sport": "a goal"}
    return {name: write(folder / f"{name}.jsonl", word) for name, word in words.items()}


@pytest.fixture
def data(tiny: Path, texts: dict[str, Path]) -> Data:
    return Data(open_corpus(texts["new"]), AutoTokenizer.from_pretrained(tiny))


def topics(texts: dict[str, Path]) -> tuple[str, ...]:
    return tuple(str(texts[name]) for name in ("law", "art"))


@pytest.mark.parametrize("schedule", ["wsd", "rewarm-cosine", "infinite"])
def test_rounds_without_topics_are_one_long_run(tiny: Path, texts, tmp_path: Path, schedule: str):
    """To the bit, also the decay at the end of the last one."""
    how = ("--data", texts["new"], "--mix", f"{texts['law']}=0.25", *RUN, "--schedule", schedule)
    assert overhaul("extend", "syne", tiny, "-o", tmp_path / "one", *how, "--steps", "12").code == 0
    rounds = ("--steps", "4", "--rounds", "3")
    assert overhaul("extend", "syne", tiny, "-o", tmp_path / "three", *how, *rounds).code == 0

    one, three = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "three"))
    assert all(torch.equal(one[name], three[name]) for name in one)


def test_a_topic_that_suffers_is_read_more_in_the_next_round(tiny: Path, texts, data: Data, monkeypatch):
    model = AutoModelForCausalLM.from_pretrained(tiny)
    law, art = topics(texts)
    seen = iter([{law: 10.0, art: 10.0}, {law: 16.0, art: 8.0}])
    monkeypatch.setattr(Syne, "_perplexities", lambda *_: next(seen))
    mix = (f"{law}=0.3", f"{art}=0.3", f"{texts['sport']}=0.2")
    chosen = Syne(steps=10, batch_size=4, seq_len=32, rounds=2, mix=mix, topics=(law, art), feedback=1.0)
    read = []
    for plan in chosen.stages(model, data):
        for _ in islice(plan.stream, 10):
            pass
        read.append({one.name: one.tokens for one in plan.stream.ledger()})

    first, both = read
    assert first["law.jsonl"] == first["art.jsonl"]
    second = {name: both[name] - first[name] for name in both}
    assert second["law.jsonl"] > 1.5 * second["art.jsonl"]
    assert sum(second.values()) == 10 * 4 * 32
    for name in ("new.jsonl", "sport.jsonl"):  # what is no topic has the share it had
        assert abs(second[name] - first[name]) <= 64


def test_a_run_that_was_stopped_in_a_later_round_goes_on_as_if_it_was_not(
    tiny: Path, texts, tmp_path: Path, monkeypatch
):
    """The moments go on from round to round, also where the first is read from its checkpoint."""
    law, art = topics(texts)
    how = ("--data", texts["new"], "--mix", f"{law}=0.3", f"{art}=0.7", "--topics", law, art, "--rounds", "2",
           *RUN, "--steps", "4", "--save-every", "100", "--keep-state")  # fmt: skip
    syne, whole, stopped = ("extend", "syne"), tmp_path / "whole", tmp_path / "stopped"
    assert overhaul(*syne, tiny, "-o", whole, *how).code == 0
    done, step = [], train._Run.step

    def stop(run: Any, number: int) -> Any:
        done.append(number)
        if len(done) == 6:
            raise KeyboardInterrupt
        return step(run, number)

    monkeypatch.setattr(train._Run, "step", stop)
    assert overhaul(*syne, tiny, "-o", stopped, *how).code == 130
    monkeypatch.undo()
    resumed = overhaul(*syne, tiny, "-o", stopped, *how, "--resume")
    assert resumed.code == 0, resumed.err

    for file in ("model.safetensors", "continuation.pt"):
        assert (whole / file).is_file()
    one, two = (load_file(made / "model.safetensors") for made in (whole, stopped))
    assert all(torch.equal(one[name], two[name]) for name in one)
    one, two = (continuation.read(made).state["state"] for made in (whole, stopped))
    assert all(torch.equal(one[place]["exp_avg"], two[place]["exp_avg"]) for place in one)


def test_what_is_easy_is_not_read_again_by_the_run_after(tiny: Path, texts, tmp_path: Path):
    """The order of the run before is kept to the end of the pass, though the model has changed."""
    how = ("--data", texts["new"], *RUN, "--order", "easy-first", "--scored-tokens", "64", "--schedule", "constant")
    whole, one, two = (tmp_path / name for name in ("whole", "one", "two"))
    assert overhaul("extend", "syne", tiny, "-o", whole, *how, "--steps", "12").code == 0
    assert overhaul("extend", "syne", tiny, "-o", one, *how, "--steps", "6", "--keep-state").code == 0
    assert overhaul("extend", "syne", one, "-o", two, *how, "--steps", "6", "--go-on").code == 0

    first, second = (load_file(made / "model.safetensors") for made in (whole, two))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_easy_documents_come_first_by_the_loss_of_the_model_as_it_was(tiny: Path, data: Data):
    model = AutoModelForCausalLM.from_pretrained(tiny)
    chosen = Syne(seq_len=32, batch_size=1, order="easy-first", scored_tokens=64)
    plan = chosen.plan(model, data)
    losses_D = document_losses(model, data, data.corpus.train, max_tokens=64)

    read = np.concatenate([batch["input_ids"].flatten().numpy() for batch in islice(plan.stream, 200)])
    documents = [data.encode(data.corpus.train[place]).ids for place in np.argsort(losses_D, kind="stable")]
    wanted = np.concatenate(documents)[: len(read)]
    assert len(wanted) == len(read)
    assert (read == wanted).all()
    assert losses_D.std() > 0


def test_no_document_is_read_again_in_the_next_run_before_all_were(tiny: Path, texts, data: Data, tmp_path: Path):
    """The ledger of an earlier run goes on: across runs that go on, one pass is one pass."""
    how = ("--data", texts["new"], "--mix", f"{texts['law']}=0.5", *RUN, "--keep-state", "--schedule", "constant")
    runs, model = [], tiny
    for number in range(3):
        runs.append(tmp_path / f"run-{number}")
        on = ("--go-on",) if number else ()
        assert overhaul("extend", "syne", model, "-o", runs[-1], *how, *on, "--steps", "8").code == 0
        model = runs[-1]

    chosen = Syne(steps=24, batch_size=2, seq_len=32, mix=(f"{texts['law']}=0.5",), schedule="constant")
    stream = chosen.plan(AutoModelForCausalLM.from_pretrained(tiny), data).stream
    straight = [batch["input_ids"] for batch in islice(stream, 24)]
    whole = tmp_path / "whole"
    assert overhaul("extend", "syne", tiny, "-o", whole, *how, "--steps", "24").code == 0
    one, three = (load_file(made / "model.safetensors") for made in (whole, runs[-1]))
    assert all(torch.equal(one[name], three[name]) for name in one)
    windows = torch.cat(straight).tolist()
    assert len({tuple(window) for window in windows}) == len(windows)


def test_questions_that_are_mixed_in_are_plain_text(tiny: Path, data: Data, tmp_path: Path):
    """Questions are learnt with their answers, as the paper has it, not the answers alone."""
    asked = tmp_path / "asked.jsonl"
    rows = ({"question": f"What is {n} plus {n}?", "answer": str(2 * n)} for n in range(300))
    asked.write_text("\n".join(map(json.dumps, rows)))
    chosen = Syne(seq_len=32, batch_size=1, mix=(f"{asked}=1",))

    batch = next(chosen.plan(AutoModelForCausalLM.from_pretrained(tiny), data).stream)
    assert torch.equal(batch["labels"], batch["input_ids"])


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"topics": ("law", "art"), "mix": ("law=0.5",), "rounds": 2}, "art is no text of mix, which has law"),
        ({"topics": ("law", "art"), "mix": ("law=0.5", "art=0.2")}, "rounds 2 or more"),
        ({"topics": ("law",), "mix": ("law=0.5",), "rounds": 2}, "two or more of them"),
        ({"epochs": 1.0, "rounds": 2}, "use steps, which are those of a round"),
        ({"order": "hard-first"}, "easy-first"),
        ({"feedback": -1.0}, "greater than or equal to 0"),
    ],
)
def test_settings_that_do_not_fit(settings: dict[str, Any], says: str):
    with pytest.raises(ValidationError, match=says):
        Syne(**settings)


def test_more_than_the_model_reads_is_not_scored(tiny: Path, texts, tmp_path: Path):
    how = ("--data", texts["new"], *RUN, "--order", "easy-first", "--scored-tokens", "4096", "--dry-run")
    refused(overhaul("extend", "syne", tiny, "-o", tmp_path / "out", *how), "--scored-tokens 4096", "3 to 512")
