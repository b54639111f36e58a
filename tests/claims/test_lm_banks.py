"""Banks beside SmolLM2, for German manual pages, code and novels: ours, the papers have none of language models.

A bank of `learn contracon` (kernels over the weights of attention) or of `learn clr` (factors of the outputs of all
linear layers) for each text, against a LoRA of rank 8 for each text alone, in as many steps of as many tokens. All are
measured on the same held-out windows; less than a full pass of any text, so the figures are of the beginning of a
training.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from bench import results
from bench.results import Row, Target

from command import overhaul
from overhaul import artifact, evaluate, task_record, text_banks
from overhaul.corpora import CorpusSpec, open_corpus
from overhaul.data import Data
from overhaul.forgetting import forgetting
from overhaul.identify import Telling

pytestmark = [pytest.mark.slow, pytest.mark.timeout(4 * 3600)]

SEEDS = (0, 1)
TEXTS = ("manpages-de", "stdlib", "austen")
STEPS = ("--steps", "40", "--batch-size", "2", "--seq-len", "128", "--save-every", "0")
WINDOWS = 16
METHODS = {
    "contracon": ("--lr", "3e-3", "--views", "4"),
    "clr": ("--lr", "2e-3", "--views", "4"),
}
"""Rates that were not chosen on these texts."""
CHANCE = 1 / len(TEXTS)

Told = dict[str, float]


@pytest.fixture(scope="module")
def lora(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Told]:
    """`lora(seed)` -> the perplexity on each text of a LoRA of its own, and what that trained."""
    root = tmp_path_factory.mktemp("lora")

    @cache
    def of(seed: int) -> Told:
        found: Told = {}
        for text in TEXTS:
            out = root / f"{text}-{seed}"
            how = ("--data", text, "--rank", 8, "--alpha", 16, "--lr", 1e-3, "--evaluate", "none", "--seed", seed)
            done = overhaul("adapt", "lora", "smollm2-135m", "-o", out, *how, *STEPS)
            assert done.code == 0, done.err
            made = artifact.load(out)
            corpus = open_corpus(CorpusSpec(path=text))
            windows_NT = Data(corpus, made.processor).windows("heldout", seq_len=128, limit=WINDOWS)
            found[text] = evaluate.perplexity(made.model, windows_NT).estimate.value
            found["parameters"] = made.lineage[-1].trainable_parameters or 0
        return found

    return of


@pytest.fixture(scope="module")
def learnt(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, int], tuple[Path, Told]]:
    """`learnt("clr", seed)` -> the directory, and the perplexity on each text, its task told."""
    root = tmp_path_factory.mktemp("banks")

    @cache
    def of(method: str, seed: int) -> tuple[Path, Told]:
        out = root / f"{method}-{seed}"
        how = (*STEPS, "--heldout", WINDOWS, "--seed", seed, *METHODS[method])
        done = overhaul("learn", method, "smollm2-135m", "-o", out, "--tasks", *TEXTS, *how)
        assert done.code == 0, done.err
        (losses,) = [one for one in _tables(out) if one["title"].startswith("Held-out loss in nats a token")]
        found: Told = {name: math.exp(float(told)) for name, told, _ in losses["rows"]}
        found["parameters"] = task_record.read(out).tasks[0].trained_parameters
        return out, found

    return of


def _tables(out: Path) -> list[dict[str, Any]]:
    return json.loads((out / "overhaul.json").read_text())["tables"]


@pytest.mark.parametrize("method", METHODS)
def test_a_bank_is_nearly_as_good_as_a_lora_of_a_fifth_of_its_numbers(
    method: str, learnt: Callable[[str, int], tuple[Path, Told]], lora: Callable[[int], Told]
):
    banks, loras = [learnt(method, seed)[1] for seed in SEEDS], [lora(seed) for seed in SEEDS]
    sizes = [one["parameters"] / two["parameters"] for one, two in zip(banks, loras, strict=True)]
    rows = [_row(method, "size", "Numbers of a bank, of a LoRA's of rank 8", sizes, Target("<=", 0.2))]
    for text in TEXTS:
        ratios = [one[text] / two[text] for one, two in zip(banks, loras, strict=True)]
        for name, called, measured in (("bank", "a bank", banks), ("lora", "a LoRA of rank 8", loras)):
            values = [one[text] for one in measured]
            rows.append(_row(method, f"{name}-{text}", f"Perplexity on {text}, {called}", values, unit=""))
        rows.append(_row(method, f"ratio-{text}", f"Perplexity on {text}, of a LoRA's", ratios, Target("<=", 1.05)))
    results.hold(*rows)


@pytest.mark.parametrize("method", METHODS)
def test_texts_tell_their_task_and_nothing_is_forgotten(method: str, learnt: Callable[[str, int], tuple[Path, Told]]):
    told: dict[str, list[float]] = {"one view": [], "10 views": []}
    lost, by_loss = [], []
    for seed in SEEDS:
        out, _ = learnt(method, seed)
        metrics = {row["metric"]: row["value"] for row in artifact.read_record(out)["facts"][-1]["metrics"]}
        for way, values in told.items():
            values.append(metrics[f"tasks told, {way}"])
        by_loss.append(_told_by_loss(out))
        lost.append(forgetting(task_record.read(out).matrices["task-IL"]))
    results.hold(*[
        _row(method, "told-one", "Texts taken for their own, by entropy, one view", told["one view"],
             Target(">=", 0.9)),
        _row(method, "told-views", "Texts taken for their own, by entropy, 10 views", told["10 views"],
             Target(">", CHANCE)),
        _row(method, "told-loss", "Texts taken for their own, by loss, one view", by_loss, Target(">", CHANCE)),
        _row(method, "forgotten", "Forgetting of texts, task told", lost, Target("==", 0.0)),
    ])  # fmt: skip


def _told_by_loss(out: Path) -> float:
    """The share of the same held-out texts whose first tokens are likeliest under their own bank."""
    made, right = artifact.load(out, dtype=torch.float32), []
    banked, how = text_banks.read(made.model, made.path), Telling(by="loss")
    for number, text in enumerate(TEXTS):
        windows_NT = Data(open_corpus(CorpusSpec(path=text)), made.processor).windows(
            "heldout", seq_len=128, limit=WINDOWS
        )
        doubts = []
        for place in range(len(TEXTS)):
            banked.use(place)
            doubts.append(text_banks.doubts(banked.model, list(windows_NT), how))
        right.append((torch.stack(doubts).argmin(dim=0) == number).double().mean())
    return float(torch.stack(right).mean())


def _row(
    method: str, name: str, what: str, values: Sequence[float], target: Target | None = None, unit: str = "share"
) -> Row:
    flags = " ".join((*STEPS, *METHODS[method]))
    settings = {"model": "smollm2-135m", "tasks": ", ".join(TEXTS), "flags": flags}
    told: dict[str, Any] = {"kind": "claim", "unit": unit, "seeds": SEEDS, "settings": settings}
    return Row(id=f"learn-{method}/lm-{name}", what=what, values=tuple(values), target=target, **told)
