"""Accuracy of classifiers of texts, on labelled tables."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoTokenizer, LlamaForSequenceClassification

from command import overhaul, refused
from overhaul.evaluate import wilson_interval

CLASSES = ("tree", "bush", "herb")
TEXTS = [f"Number {n} is tall{' and older' * (n % 4)}, and called {chr(97 + n)}" for n in range(24)]


def table(path: Path, rows: list[tuple[str, str]], label: str = "label") -> Path:
    path.write_text("".join(json.dumps({"text": text, label: name}) + "\n" for text, name in rows))
    return path


@pytest.fixture(scope="module")
def classifier(make_tiny: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama with random weights that tells three classes."""
    out = tmp_path_factory.mktemp("classifiers") / "three"
    config = AutoConfig.from_pretrained(make_tiny())
    config.id2label, config.label2id = dict(enumerate(CLASSES)), {name: n for n, name in enumerate(CLASSES)}
    torch.manual_seed(0)
    model: Any = LlamaForSequenceClassification(config)
    model.score.weight.data.normal_()
    model.save_pretrained(out)
    AutoTokenizer.from_pretrained(make_tiny()).save_pretrained(out)
    return out


@pytest.fixture(scope="module")
def said(classifier: Path) -> dict[str, str]:
    """The class that plain transformers tells of each text, one by one."""
    model, tokenizer = (kind.from_pretrained(classifier) for kind in (LlamaForSequenceClassification, AutoTokenizer))
    with torch.no_grad():
        places = {text: model(**tokenizer(text, return_tensors="pt")).logits.argmax().item() for text in TEXTS}
    assert len(set(places.values())) > 1
    return {text: CLASSES[place] for text, place in places.items()}


def test_a_share_of_the_classes_is_right_and_the_interval_is_wilsons(
    classifier: Path, said: dict[str, str], tmp_path: Path
):
    """Texts of several lengths at once, against one by one."""
    other = dict(zip(CLASSES, (*CLASSES[1:], CLASSES[0]), strict=True))
    rows = [(text, name if n % 3 else other[name]) for n, (text, name) in enumerate(said.items())]
    task = table(tmp_path / "plants.jsonl", rows, "kind")

    done = overhaul("measure", "accuracy", classifier, "--task", task, "--label-field", "kind", "--json")
    assert done.code == 0, done.err
    told = json.loads(done.out)
    (row,) = told["rows"]
    assert (row["metric"], row["count"], row["value"]) == ("accuracy/plants", 24, pytest.approx(16 / 24))
    assert (row["low"], row["high"]) == pytest.approx(wilson_interval(16, 24))
    assert {detail["text"]: detail["answer"] for detail in told["details"]} == said
    assert [detail["right"] for detail in told["details"]] == [n % 3 > 0 for n in range(24)]


def test_a_limit_draws_by_the_seed(classifier: Path, said: dict[str, str], tmp_path: Path):
    task = table(tmp_path / "plants.jsonl", [*said.items()])
    drawn = []
    for seed in (0, 0, 1):
        done = overhaul("measure", "accuracy", classifier, "--task", task, "--limit", 5, "--seed", seed, "--json")
        drawn.append([detail["text"] for detail in json.loads(done.out)["details"]])
    assert drawn[0] == drawn[1] != drawn[2]
    assert len(drawn[0]) == 5


def test_what_does_not_fit_is_refused(classifier: Path, tiny: Path, tmp_path: Path):
    task = table(tmp_path / "plants.jsonl", [("A text.", "bush"), ("Another.", "trees")])
    how = ("measure", "accuracy", classifier, "--task")
    refused(overhaul(*how, task), "labels that are none of the classes of", "'trees'", "tree, bush, herb")
    refused(overhaul(*how, task, "--label-field", "kind"), "has no column 'kind'")
    refused(overhaul(*how, tmp_path / "nowhere.jsonl"), "nowhere.jsonl does not exist")
    refused(overhaul("measure", "accuracy", tiny, "--task", task), "is a model of another kind: causal language model")
