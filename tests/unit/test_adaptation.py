"""What adaptations won, lost and cost: differences over the same windows, costs of all steps since the reference."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from command import overhaul, refused
from overhaul import artifact, evaluate
from overhaul.adaptation import Trial, cost, metrics, weights_of
from overhaul.report.facts import FORGETTING, TASK_GAIN, TASK_LOSS, Facts
from overhaul.report.pareto import ADAPTATION_TRADES, TRADES, fronts_of, trades_of
from overhaul.stream import IGNORED
from overhaul.table import Row

TRAIN = (
    "--steps",
    "3",
    "--seq-len",
    "32",
    "--batch-size",
    "2",
    "--lr",
    "3e-3",
    "--evaluate",
    "none",
    "--dtype",
    "fp32",
)
WINDOWS = ("--windows", "4", "--seq-len", "32")


def load(path: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(path).eval()


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prompts of one kind, each with its completion."""
    path = tmp_path_factory.mktemp("task") / "task.jsonl"
    rows = [{"prompt": f"double {n} ->", "completion": f" {2 * n}"} for n in range(400)]
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


@pytest.fixture(scope="module")
def adapted(tiny: Path, task: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder: `full`, and `apart`, an adapter kept apart."""
    folder = tmp_path_factory.mktemp("adapted")
    for name, words in {"full": ("full",), "apart": ("lora", "--no-merge")}.items():
        done = overhaul("adapt", *words[:1], tiny, "-o", folder / name, "--data", task, *words[1:], *TRAIN)
        assert done.code == 0, done.err
    return folder


def test_the_mean_of_window_losses_is_the_logarithm_of_the_perplexity(tiny: Path):
    model, windows_NT = load(tiny), torch.arange(5 * 16).view(5, 16)

    losses = evaluate.window_losses(model, windows_NT, windows_NT)

    perplexity = evaluate.perplexity(model, windows_NT).estimate
    assert losses.sums_N.sum() / losses.counts_N.sum() == pytest.approx(math.log(perplexity.value), rel=1e-6)
    assert evaluate.bootstrap_ratio(losses.sums_N, losses.counts_N) == pytest.approx(
        (math.log(perplexity.low), math.log(perplexity.high)), rel=1e-6
    )


def test_what_is_not_trained_on_does_not_count(tiny: Path):
    model, windows_NT = load(tiny), torch.arange(2 * 8).view(2, 8)
    labels_NT = windows_NT.clone()
    labels_NT[0, 3:], labels_NT[1] = IGNORED, IGNORED

    losses = evaluate.window_losses(model, windows_NT, labels_NT)

    assert losses.counts_N.tolist() == [2, 0]
    assert losses.sums_N[0] == pytest.approx(float(evaluate.next_token_nll(model, windows_NT)[0, :2].sum()))
    assert losses.sums_N[1] == 0


def test_a_model_has_won_and_lost_nothing_against_itself(tiny: Path):
    ids_NT = torch.arange(3 * 16).view(3, 16)
    losses = Trial(ids_NT, ids_NT, ids_NT.flip(0), torch.float32).losses(load(tiny))

    rows = {row.metric: row for row in metrics("tiny", losses, losses)}

    assert [(row.value, row.low, row.high) for name, row in rows.items() if name != TASK_LOSS] == [(0, 0, 0)] * 2
    assert rows[TASK_LOSS].low <= rows[TASK_LOSS].value <= rows[TASK_LOSS].high


def test_gain_and_forgetting_are_differences_with_narrower_intervals(tiny: Path, adapted: Path, task: Path):
    done = overhaul("compare", tiny, adapted, "--task", task, *WINDOWS, "--json")
    assert done.code == 0, done.err

    base, apart, full = json.loads(done.out)["rows"]
    of = {one["label"]: {row["metric"]: row for row in one["metrics"]} for one in (base, apart, full)}
    for name in ("apart", "full"):
        gain, loss = of[name][TASK_GAIN], of[name][TASK_LOSS]
        assert gain["value"] == pytest.approx(of[base["label"]][TASK_LOSS]["value"] - loss["value"])
        assert gain["value"] > 0
        assert gain["high"] - gain["low"] < loss["high"] - loss["low"]
    forgotten = math.log(full["perplexity"]["value"]) - math.log(base["perplexity"]["value"])
    assert of["full"][FORGETTING]["value"] == pytest.approx(forgotten, abs=1e-5)


def test_costs_are_those_since_the_reference_and_an_adapter_keeps_its_own_bytes(tiny: Path, adapted: Path, task: Path):
    done = overhaul("compare", tiny, adapted, "--task", task, *WINDOWS, "--json")
    base, apart, full = json.loads(done.out)["rows"]

    assert base["stored_bytes"] == 0
    assert base["seconds"] is base["trainable_parameters"] is None
    assert apart["stored_bytes"] == (adapted / "apart" / "adapter_model.safetensors").stat().st_size
    assert full["stored_bytes"] == full["bytes"]
    assert full["trainable_parameters"] == full["parameters"] > apart["trainable_parameters"] > 0
    assert min(full["seconds"], apart["seconds"], full["peak_rss_bytes"], apart["peak_rss_bytes"]) > 0
    assert set(apart["fronts"]) >= {"trained", "stored"}


def test_steps_that_the_reference_has_too_cost_nothing(tiny: Path, task: Path, tmp_path: Path):
    first, second = tmp_path / "first", tmp_path / "second"
    for parent, out in ((tiny, first), (first, second)):
        assert overhaul("adapt", "full", parent, "-o", out, "--data", task, *TRAIN).code == 0
    made = artifact.load(second)

    both, last = cost(made, (), ()), cost(made, artifact.load(first).lineage, weights_of(first))

    assert [step.seconds for step in made.lineage] == pytest.approx([both.seconds - last.seconds, last.seconds])  # pyright: ignore


def test_an_adapter_of_another_base_has_to_be_kept_with_it(tiny: Path, adapted: Path, task: Path, tmp_path: Path):
    apart = tmp_path / "apart"
    done = overhaul("adapt", "lora", adapted / "full", "-o", apart, "--data", task, "--no-merge", *TRAIN)
    assert done.code == 0, done.err
    made, own = artifact.load(apart), (apart / "adapter_model.safetensors").stat().st_size

    assert cost(made, (), weights_of(adapted / "full")).stored_bytes == own
    assert cost(made, (), weights_of(tiny)).stored_bytes == own + artifact.size_on_disk(adapted / "full")


def test_the_table_and_the_page_say_what_was_traded(tiny: Path, adapted: Path, task: Path, tmp_path: Path):
    page = tmp_path / "page.html"
    done = overhaul("compare", tiny, adapted, "--task", task, *WINDOWS, "--html", page)
    assert done.code == 0, done.err

    assert all(word in done.out for word in (TASK_GAIN, FORGETTING, "beside the base", "trained", "peak memory"))
    assert "less forgetful than" in page.read_text()
    assert "Costs: of all steps since the reference." in page.read_text()


def test_models_of_other_tokens_are_refused(tiny: Path, task: Path, tmp_path: Path, make_tiny: Any):
    from transformers import AutoTokenizer

    other = tmp_path / "other"
    load(tiny).save_pretrained(other)
    tokenizer: Any = AutoTokenizer.from_pretrained(tiny)
    tokenizer.add_tokens(["e"])
    tokenizer.save_pretrained(other)

    refused(overhaul("compare", tiny, other, "--task", task, *WINDOWS), "--task compares losses token by token")


def test_a_task_that_is_not_there_is_refused(tiny: Path, adapted: Path):
    refused(overhaul("compare", tiny, adapted, "--task", "no-such-task", *WINDOWS), "no-such-task")


def facts(label: str, loss: float, trained: int) -> Facts:
    row = Row(model=label, metric=TASK_LOSS, value=loss, low=loss, high=loss, count=1)
    return Facts(
        label=label, path=label, parameters=9, metrics=(row,), trainable_parameters=trained, stored_bytes=trained
    )


def test_adaptations_are_compared_by_what_they_cost():
    small, large, beaten = facts("small", 2.0, 10), facts("large", 1.0, 100), facts("beaten", 2.5, 50)

    assert trades_of([small]) == ADAPTATION_TRADES
    assert trades_of([Facts(label="a", path="a", parameters=9)]) == TRADES
    assert fronts_of([small, large, beaten]) == [("trained", "stored"), ("trained", "stored"), ()]
