"""Learning without stored examples: which settings are a known method, what may move, what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from command import overhaul, refused

FLAGS = ("--split", "2", "--batch-size", "8", "--epochs", "2", "--dtype", "fp32", "--lr", "0.05")


def learnt(name: str, model: Path, bars: Path, out: Path, *flags: object) -> dict[str, torch.Tensor]:
    done = overhaul("learn", name, model, "-o", out, "--tasks", bars, *FLAGS, *flags)
    assert done.code == 0, done.err
    return load_file(out / "model.safetensors")


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(one[name], other[name]) for name in one.keys() | other.keys())


def test_with_a_softmax_and_nothing_held_it_is_plain_training(cnn: Path, bars: Path, tmp_path: Path):
    free = learnt("rehearsal-free", cnn, bars, tmp_path / "a", "--head", "softmax", "--predictions", "0")

    assert same(free, learnt("bregman", cnn, bars, tmp_path / "b", "--output-term", "none"))


@pytest.mark.parametrize("term", ["l2", "ewc"])
def test_with_a_softmax_its_pull_is_twice_that_with_a_half(cnn: Path, bars: Path, tmp_path: Path, term: str):
    late = ("--no-anchor-first",) if term == "l2" else ()  # there is no Fisher information of a task before the first
    free = learnt("rehearsal-free", cnn, bars, tmp_path / "a", "--head", "softmax", "--predictions", "0",
                  "--weight-term", term, "--weights", "0.25", *late)  # fmt: skip
    halved = learnt(
        "bregman", cnn, bars, tmp_path / "b", "--output-term", "none", "--weight-term", term, "--beta", "0.5"
    )

    assert same(free, halved)


def test_with_a_softmax_prediction_distillation_is_lwf(cnn: Path, bars: Path, tmp_path: Path):
    free = learnt("rehearsal-free", cnn, bars, tmp_path / "a", "--head", "softmax", "--predictions", "0.7")

    assert same(free, learnt("bregman", cnn, bars, tmp_path / "b", "--output-term", "lwf", "--alpha", "0.7"))


def test_only_what_is_asked_for_moves(vit: Path, bars: Path, tmp_path: Path):
    found = learnt("rehearsal-free", vit, bars, tmp_path / "out", "--train", "qkv")
    before = load_file(vit / "model.safetensors")

    moved = {name for name in before if name in found and found[name].shape == before[name].shape
             and not torch.equal(found[name], before[name])}  # fmt: skip
    assert moved
    assert all({*name.split(".")} & {"query", "key", "value", "q_proj", "k_proj", "v_proj"} for name in moved), moved


def test_batch_statistics_stay_where_their_normalisation_does(cnn: Path, bars: Path, tmp_path: Path):
    found = learnt("rehearsal-free", cnn, bars, tmp_path / "out", "--train", "*convolution.weight")
    before = load_file(cnn / "model.safetensors")

    still = [name for name in before if "normalization" in name]
    assert still
    assert all(torch.equal(found[name], before[name]) for name in still)


def test_the_first_task_is_held_to_the_weights_that_were_given(cnn: Path, bars: Path, tmp_path: Path):
    how = ("--weight-term", "l2", "--weights", "5", "--first-tasks", "1")
    before = load_file(cnn / "model.safetensors")

    def moved(out: str, *flags: str) -> float:
        found = learnt("rehearsal-free", cnn, bars, tmp_path / out, *how, *flags)
        names = [name for name in before if name.endswith("weight") and "classifier" not in name]
        return sum(float((found[name] - before[name]).square().sum()) for name in names)

    assert moved("held") < 0.5 * moved("free", "--no-anchor-first")


def test_the_report_says_how_far_features_have_moved(cnn: Path, bars: Path, tmp_path: Path):
    learnt("rehearsal-free", cnn, bars, tmp_path / "out")
    tables = json.loads((tmp_path / "out" / "overhaul.json").read_text())["tables"]
    (told,) = [table for table in tables if "linear CKA" in table["title"]]

    assert told["columns"] == ["after", "resnet.encoder.stages.0", "resnet.encoder.stages.1", "what the head reads"]
    ((task, *alike),) = told["rows"]
    assert task == "2, 3"
    assert all(0 < float(value) < 1 for value in alike)


def test_a_pass_that_is_not_measured_on_what_it_was_tuned_with(cnn: Path, bars: Path, tmp_path: Path):
    learnt("rehearsal-free", cnn, bars, tmp_path / "out", "--first-tasks", "1", "--validation", "0.5")
    record = json.loads((tmp_path / "out" / "tasks.json").read_text())

    assert len(record["tasks"]) == 1
    assert record["matrices"]["class-IL"]["num_examples"] == [24], "half of the 48 that are trained on"


def test_bad_input_is_one_clear_error(cnn: Path, vit: Path, bars: Path, tmp_path: Path):
    def tried(model: Path, *flags: Any) -> Any:
        return overhaul("learn", "rehearsal-free", model, "-o", tmp_path / "out", "--tasks", bars, *flags)

    split = ("--split", "2")
    refused(tried(cnn, "--variants", "plain", "invert"), "class 0 is in two tasks, invert the second")
    refused(tried(cnn, *split, "--features", "1", "--feature-layer", "resnet.encoder.stage"), "there is no layer",
            "resnet.encoder.stages")  # fmt: skip
    refused(tried(cnn, *split, "--feature-layer", "resnet"), "feature_layer is of features, whose weight is 0")
    refused(tried(cnn, "--split", "1", "--weight-term", "ewc"), "ewc holds to the task before, and there is one task")
    refused(tried(cnn, *split, "--train", "qkv"), "no parameter is like 'qkv'")
    refused(tried(cnn, *split, "--first-tasks", "3"), "first_tasks 3 of", "1 to 2")
    refused(tried(cnn, *split, "--predictions", "0", "--kd-temperature", "1"), "kd_temperature is of predictions")
    refused(tried(cnn, *split, "--kd-temperature", "1"), "kd_temperature is of predictions with head softmax")
    refused(tried(cnn, *split, "--weights", "2"), "weights is of a weight term")
    refused(tried(cnn, *split, "--fisher", "empirical", "--weight-term", "l2"), "fisher is of weight_term ewc")
    refused(tried(cnn, *split, "--no-anchor-first", "--weight-term", "ewc"), "anchor_first is of weight_term l2")
    assert not (tmp_path / "out").exists()
