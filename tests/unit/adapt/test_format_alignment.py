"""`adapt format`: what is trained on, the choice in the record, templates that come along, zeros, mistakes."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file
from transformers import AutoTokenizer

from command import overhaul, refused
from overhaul import artifact
from overhaul.adapt.format_alignment import FormatAlignment
from overhaul.corpora import open_corpus
from overhaul.data import Data
from overhaul.stream import IGNORED

OTHER = (
    "{% for m in messages %}[{{ m['role'] }}]\n{{ m['content'] }}\n[end]\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]\n{% endif %}"
)
FEW: dict[str, Any] = {"select": 5, "candidates": 20, "seq_len": 64}
SHORT = ("--select", "6", "--candidates", "20", "--steps", "3", "--batch-size", "2", "--seq-len", "64", "--lr", "1e-3",
         "--dtype", "fp32", "--evaluate", "none")  # fmt: skip


@pytest.fixture(scope="module")
def instructions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("instructions") / "instructions.jsonl"
    rows = ({"question": f"What is {n} and {n}?", "answer": f"It is {2 * n}."} for n in range(60))
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


@pytest.fixture
def bare(tiny: Path, tmp_path: Path) -> Path:
    """The model without a chat template."""
    shutil.copytree(tiny, tmp_path / "bare", ignore=shutil.ignore_patterns("*.jinja"))
    assert AutoTokenizer.from_pretrained(tmp_path / "bare").chat_template is None
    return tmp_path / "bare"


@pytest.fixture
def template(tmp_path: Path) -> Path:
    (tmp_path / "other.jinja").write_text(OTHER)
    return tmp_path / "other.jinja"


def test_answers_and_the_ends_of_their_turns_are_trained_on_each_example_alone(tiny: Path, instructions: Path):
    made = artifact.load(tiny, dtype=torch.float32)
    data = Data(open_corpus(instructions), made.processor)
    method = FormatAlignment(**FEW, batch_size=1)

    plan = method.plan(made.model, data)
    batches = list(islice(plan.stream, 5))

    trained = set()
    for batch in batches:
        labels = batch["labels"][0]
        text = data.tokenizer.decode(batch["input_ids"][0])
        answer = data.tokenizer.decode(labels[labels != IGNORED])
        assert text.count("user") == 1
        assert answer.startswith("It is ")
        assert answer.endswith(".<|im_end|>\n<|im_end|>")
        assert f"<|im_start|>assistant\n{answer}" in text
        trained.add(answer)
    assert len(trained) == 5
    assert all(parameter.requires_grad for parameter in made.model.parameters())


def test_the_same_is_chosen_again(tiny: Path, instructions: Path):
    made = artifact.load(tiny, dtype=torch.float32)
    data = Data(open_corpus(instructions), made.processor, seed=3)

    def chosen(seed: int, **fields: Any) -> str:
        method = FormatAlignment(**FEW, **fields)
        return method.choice(made.model, replace(data, seed=seed)).fingerprint

    assert chosen(3) == chosen(3)
    assert len({chosen(3), chosen(4), chosen(3, by="loss"), chosen(3, by="random")}) == 4


def test_the_record_says_how_many_were_chosen(tiny: Path, instructions: Path, tmp_path: Path):
    done = overhaul("adapt", "format", tiny, "-o", tmp_path / "out", "--data", instructions, *SHORT)

    assert done.code == 0, done.err
    tables = json.loads((tmp_path / "out" / "overhaul.json").read_text())["tables"]
    (table,) = (one for one in tables if "chosen" in one["title"])
    assert table["title"] == "6 of 20 examples were chosen by fas"
    rows = {what: cells for what, *cells in table["rows"]}
    assert rows["examples"] == ["6", "20"]
    assert float(rows["loss as plain text, nats a token"][0]) < float(rows["loss as plain text, nats a token"][1])
    assert "6 of 20 examples were chosen by fas" in (tmp_path / "out" / "report.html").read_text()


def test_fewer_examples_than_are_asked_for_are_said(tiny: Path, instructions: Path, tmp_path: Path):
    made = artifact.load(tiny, dtype=torch.float32)
    rows = open_corpus(instructions)
    few = tmp_path / "few.jsonl"
    few.write_text("\n".join(instructions.read_text().splitlines()[:20]))

    done = overhaul("adapt", "format", tiny, "-o", tmp_path / "out", "--data", few, *SHORT, "--select", "20")

    assert done.code == 0, done.err
    count = len(open_corpus(few).train)
    assert count < 20 < len(rows.train)
    assert f"has {count} examples, fewer than --select 20: all are taken" in done.told
    enough = FormatAlignment(select=20, candidates=20, seq_len=64)
    assert len(enough.choice(made.model, Data(rows, made.processor)).train) == 20


def test_a_template_comes_along(bare: Path, template: Path, instructions: Path, tmp_path: Path):
    """Also where the model has another one: a file wins over what its tokenizer's configuration says."""
    settings = json.loads((bare / "tokenizer_config.json").read_text())
    (bare / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": "{{ messages }}"}))
    out = tmp_path / "out"

    done = overhaul("adapt", "format", bare, "-o", out, "--data", instructions, *SHORT, "--template", template)

    assert done.code == 0, done.err
    written = AutoTokenizer.from_pretrained(out)
    turns = [{"role": "user", "content": "Hello"}]
    assert written.chat_template == OTHER
    text = written.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    assert text == "[user]\nHello\n[end]\n[assistant]\n"
    assert overhaul("generate", out, "--prompt", "Hello", "--chat", "--tokens", "2").code == 0
    fields = json.loads((out / "overhaul.json").read_text())["lineage"][-1]["fields"]
    assert fields["template"] == str(template.resolve())


def test_before_and_after_are_measured_in_the_same_template(tiny: Path, template: Path, tmp_path: Path):
    """Of conversations another template makes other tokens: what a record holds of them is measured anew."""
    rows = (
        [{"role": "user", "content": f"What is {n}?"}, {"role": "assistant", "content": f"{n}."}] for n in range(90)
    )
    (tmp_path / "chat.jsonl").write_text("\n".join(json.dumps({"messages": row}) for row in rows))
    judged = ("--evaluate-seq-len", "32", "--evaluate-windows", "2")
    told = ("--data", tmp_path / "chat.jsonl", *SHORT[:-2], *judged)

    first = overhaul("adapt", "format", tiny, "-o", tmp_path / "first", *told)
    second = overhaul("adapt", "format", tmp_path / "first", "-o", tmp_path / "second", *told, "--template", template)

    assert (first.code, second.code) == (0, 0), first.err + second.err
    before, after = (artifact.read_record(tmp_path / name)["facts"] for name in ("first", "second"))
    assert len(after) == 3
    assert len({one["tokenizer"] for one in before}) == len({one["tokenizer"] for one in after}) == 1
    assert before[0]["tokenizer"] != after[0]["tokenizer"]


def test_pruned_weights_stay_zero(tiny: Path, instructions: Path, tmp_path: Path):
    quick = ("--evaluate", "none", "--dtype", "fp32")
    assert overhaul("prune", "magnitude", tiny, "-o", tmp_path / "pruned", *quick).code == 0
    out = tmp_path / "out"

    done = overhaul("adapt", "format", tmp_path / "pruned", "-o", out, "--data", instructions, *SHORT)

    assert done.code == 0, done.err
    before, after = (load_file(path / "model.safetensors") for path in (tmp_path / "pruned", out))
    name = "model.layers.1.mlp.up_proj.weight"
    assert not torch.equal(before[name], after[name])
    assert torch.equal(before[name] == 0, after[name] == 0)


def test_a_model_without_a_template_is_refused(bare: Path, instructions: Path, tmp_path: Path):
    done = overhaul("adapt", "format", bare, "-o", tmp_path / "out", "--data", instructions, *SHORT)

    refused(done, "no chat template", "--template FILE.jinja")


@pytest.mark.parametrize(
    ("rows", "says"),
    [
        ([{"text": f"Only text {n}."} for n in range(40)], "is a question with an answer"),
        ([{"prompt": f"Say {n}", "rejected": "no"} for n in range(40)], "columns found: prompt, rejected"),
        ([{"question": f"Say {n}", "answer": f"It is {n}. " * 40} for n in range(40)], "longer than --seq-len 64"),
    ],
)
def test_rows_from_which_no_format_can_be_learnt(tiny: Path, tmp_path: Path, rows: list[Any], says: str):
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))

    done = overhaul("adapt", "format", tiny, "-o", tmp_path / "out", "--data", tmp_path / "rows.jsonl", *SHORT)

    refused(done, says)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"epochs": 2}, "use steps"),
        ({"select": 0}, "greater than 0"),
        ({"select": 30, "candidates": 20}, "use candidates 30"),
        ({"select": 501}, "use candidates 501"),
        ({"pool": 1.5}, "less than or equal to 1"),
        ({"by": "length"}, "'fas', 'loss' or 'random'"),
    ],
)
def test_settings_that_do_not_fit(settings: dict[str, Any], says: str):
    with pytest.raises(ValidationError, match=says):
        FormatAlignment(**settings)
