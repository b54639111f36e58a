"""Accuracy of classifiers of texts on labelled tables, and of images on their sets."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoTokenizer, LlamaForSequenceClassification, ViTForImageClassification

from command import overhaul, refused
from images import write_bars, write_vit
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


def test_of_images_what_is_held_out_is_measured(tmp_path: Path):
    """Against plain transformers; of a set of which nothing is held out, all of it."""
    vit, sets = write_vit(tmp_path / "vit", classes=4), np.load(write_bars(tmp_path / "all.npz"))
    images_NHWC, labels_N, heldout_N = sets["images"], sets["labels"], np.arange(120) % 3 == 0
    np.savez(tmp_path / "part.npz", images=images_NHWC, labels=labels_N, heldout=heldout_N)
    pixels_NCHW = (torch.tensor(images_NHWC).permute(0, 3, 1, 2) / 255 - 0.5) / 0.5
    with torch.no_grad():
        told_N = ViTForImageClassification.from_pretrained(vit)(pixel_values=pixels_NCHW).logits.argmax(dim=1).numpy()

    tasks = ("--task", tmp_path / "all.npz", tmp_path / "part.npz")
    done = overhaul("measure", "accuracy", vit, *tasks, "--dtype", "fp32", "--json")
    assert done.code == 0, done.err
    rows = json.loads(done.out)["rows"]
    right_N = told_N == labels_N
    assert [(row["metric"], row["value"], row["count"]) for row in rows] == [
        ("accuracy/all", pytest.approx(right_N.mean()), 120),
        ("accuracy/part", pytest.approx(right_N[heldout_N].mean()), 40),
    ]
    detail = json.loads(done.out)["details"][120]
    assert detail["image"] == f"{tmp_path / 'part.npz'}:0"
    assert (detail["wanted"], detail["answer"], detail["right"]) == ("0", str(told_N[0]), bool(right_N[0]))


def test_of_images_what_does_not_fit_is_refused(classifier: Path, vit: Path, bars: Path, tmp_path: Path):
    how = ("measure", "accuracy", vit, "--task")
    refused(overhaul(*how, bars), "has labels that are none of the classes of", "such as '2'", "allowed: 0, 1")
    refused(overhaul(*how, bars, "--label-field", "kind"), "--label-field and --text-field are of texts")
    refused(overhaul(*how, table(tmp_path / "a.jsonl", [("A", "b")])), "is a file of a kind that is not read as images")
    refused(overhaul(*how, tmp_path / "none"), "none does not exist")
    refused(overhaul("measure", "accuracy", classifier, "--task", "digits"), "digits is no table of texts")
