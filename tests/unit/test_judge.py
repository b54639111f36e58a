"""The judge: what it measures, and that records of earlier versions can be read."""

from __future__ import annotations

import math
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

from overhaul import artifact
from overhaul.artifact import Artifact
from overhaul.corpora import open_several
from overhaul.judge import Judge, read_facts
from overhaul.options import Options
from overhaul.report.facts import Facts


@pytest.fixture(scope="module")
def made(tiny: Path) -> Artifact:
    return artifact.load(tiny)


@pytest.fixture(scope="module")
def judge(made: Artifact) -> Judge:
    return Judge.of(Options(evaluate_windows=2, evaluate_seq_len=32), None, made.processor, torch.float32)


@pytest.fixture(scope="module")
def facts(judge: Judge, made: Artifact) -> Facts:
    return judge.of_directory(made)


def test_both_speeds_are_measured(facts: Facts):
    assert facts.tokens_per_second
    assert facts.decode_tokens_per_second


def test_speeds_are_measured_anew_and_nothing_else(judge: Judge, made: Artifact, facts: Facts):
    stored = replace(facts, tokens_per_second=1.0, decode_tokens_per_second=None)

    timed = judge.timed(stored, made.model)

    assert timed.tokens_per_second != 1.0
    assert timed.decode_tokens_per_second is not None
    assert replace(timed, tokens_per_second=1.0, decode_tokens_per_second=None) == stored


def test_facts_are_read_as_they_were_written(facts: Facts):
    assert read_facts(asdict(facts)) == facts


def test_facts_of_an_earlier_version_lack_what_was_not_measured_then(facts: Facts):
    stored = asdict(facts)
    del stored["decode_tokens_per_second"], stored["tokenizer"]

    assert read_facts(stored) == replace(facts, decode_tokens_per_second=None, tokenizer="")


def test_models_of_other_tokenizers_have_another_hash(judge: Judge, made: Artifact):
    other = replace(judge, windows=judge.windows + 1 if judge.windows is not None else None)

    assert other.tokenizer != judge.tokenizer
    assert Judge.of(Options(evaluate="none"), None, made.processor, torch.float32).tokenizer == ""


@pytest.fixture(scope="module")
def watchful(made: Artifact) -> Judge:
    options = Options(evaluate_windows=3, evaluate_seq_len=32, evaluate="sample")
    watched = open_several(("sample", "stdlib")).values()
    return Judge.of(options, None, made.processor, torch.float32, watched)


def test_what_is_watched_is_a_metric_with_an_interval(watchful: Judge, made: Artifact):
    facts = watchful.facts(made.model, label="tiny", path="")
    rows = {row.metric: row for row in facts.metrics}

    assert list(rows) == ["loss on sample", "loss on stdlib"]
    assert facts.perplexity
    assert rows["loss on sample"].value == pytest.approx(math.log(facts.perplexity.value))
    assert all(row.low < row.value < row.high and row.count == 3 * 31 for row in rows.values())


def test_while_training_the_same_losses_are_seen(watchful: Judge, made: Artifact):
    seen = watchful.probe(made.model)
    facts = watchful.facts(made.model, label="tiny", path="")

    assert list(seen) == ["perplexity", "held-out/sample", "held-out/stdlib"]
    assert list(seen.values())[1:] == pytest.approx([row.value for row in facts.metrics])
    assert list(replace(watchful, windows=None).probe(made.model)) == ["held-out/sample", "held-out/stdlib"]


def test_facts_without_what_is_watched_are_of_another_key(watchful: Judge):
    blind = replace(watchful, watched={})

    assert watchful.key.startswith(f"{blind.key}/")
    assert replace(watchful, corpus=None).key != replace(blind, corpus=None).key == "none"
    renamed = {f"other {name}": windows for name, windows in watchful.watched.items()}
    shaped = {name: windows.reshape(-1, 16) for name, windows in watchful.watched.items()}
    others = (replace(watchful, corpus=None, **change) for change in (
        {"dtype": torch.bfloat16}, {"watched": renamed}, {"watched": shaped}))  # fmt: skip
    assert len({replace(watchful, corpus=None).key, *(other.key for other in others)}) == 4
