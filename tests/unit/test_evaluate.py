"""Log-likelihoods against transformers' own, and what is made of them."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from overhaul import evaluate
from overhaul.questions import Question


@pytest.fixture(scope="module")
def model(tiny: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(tiny).eval()


@pytest.fixture(scope="module")
def tokenizer(tiny: Path) -> Any:
    return AutoTokenizer.from_pretrained(tiny)


@pytest.fixture(name="windows_NT")
def windows() -> torch.Tensor:
    return torch.randint(512, (7, 32), generator=torch.Generator().manual_seed(0))


def test_perplexity_is_that_of_transformers(model: Any, windows_NT: torch.Tensor):
    with torch.no_grad():
        losses = [model(input_ids=ids[None], labels=ids[None]).loss.double() for ids in windows_NT]
    direct = math.exp(sum(losses) / len(losses))

    measured = evaluate.perplexity(model, windows_NT).estimate

    assert measured.value == pytest.approx(direct, rel=1e-6)
    assert measured.count == 7 * 31
    assert measured.low < measured.value < measured.high


@pytest.mark.parametrize("architecture", ["gpt2", "opt"])
def test_perplexity_of_other_architectures(make_tiny: Any, architecture: str, windows_NT: torch.Tensor):
    model = AutoModelForCausalLM.from_pretrained(make_tiny(architecture=architecture)).eval()
    with torch.no_grad():
        direct = math.exp(model(input_ids=windows_NT, labels=windows_NT).loss)

    assert evaluate.perplexity(model, windows_NT).estimate.value == pytest.approx(direct, rel=1e-5)


def test_batch_size_does_not_matter(model: Any, windows_NT: torch.Tensor):
    values = [evaluate.perplexity(model, windows_NT, batch_size=size).estimate.value for size in (1, 2, 7)]

    assert values == pytest.approx([values[0]] * 3, rel=1e-6)


def test_tokens_can_be_scored_at_chosen_places_and_padding_does_not_matter(model: Any, windows_NT: torch.Tensor):
    ids_BT = windows_NT[:2]
    every_BL = evaluate.next_token_nll(model, ids_BT)
    padded_BT = torch.nn.functional.pad(ids_BT, (0, 9), value=3)
    rows_K, places_K = torch.tensor([1, 0, 1]), torch.tensor([4, 30, 0])

    nll_K = evaluate.nll_at(model, padded_BT, rows_K, places_K, ids_BT[rows_K, places_K + 1])

    assert every_BL.shape == (2, 31)
    torch.testing.assert_close(nll_K, every_BL[rows_K, places_K], rtol=1e-5, atol=1e-5)


def test_the_interval_is_deterministic_and_covers():
    values = np.random.default_rng(0).normal(3.0, 1.0, 400)

    low, high = evaluate.bootstrap_interval(values, seed=1)

    assert (low, high) == evaluate.bootstrap_interval(values, seed=1)
    assert (low, high) != evaluate.bootstrap_interval(values, seed=2)
    half_width = 1.96 * values.std() / 20
    assert (values.mean() - low, high - values.mean()) == pytest.approx((half_width, half_width), rel=0.15)


def test_equal_values_have_no_interval():
    assert evaluate.bootstrap_interval(np.full(9, 2.5)) == (2.5, 2.5)


def score(model: Any, tokenizer: Any, prompt: str, option: str) -> float:
    """Log-likelihood of the option by hand, per character."""
    before = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    whole = tokenizer(prompt + option, add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        logs = model(input_ids=torch.tensor([whole])).logits[0].log_softmax(-1)
    total = sum(float(logs[at - 1, whole[at]]) for at in range(len(before), len(whole)))
    return total / len(option.strip())


def test_the_option_with_the_best_score_per_character_is_chosen(model: Any, tokenizer: Any):
    prompt, options = "The whale swam", (" away.", " in the deep and cold sea.", " up", " under the ship")
    best = int(np.argmax([score(model, tokenizer, prompt, option) for option in options]))
    questions = [Question(prompt, options, answer) for answer in range(4)]

    found = evaluate.choice_accuracy(model, tokenizer, questions)

    assert (found.value, found.count) == (0.25, 4)
    assert evaluate.choice_accuracy(model, tokenizer, [questions[best]]).value == 1.0


@pytest.mark.parametrize("batch_size", [1, 3, 16])
def test_accuracy_does_not_depend_on_the_batch_size(model: Any, tokenizer: Any, batch_size: int):
    words = ["sea", "whale", "ship", "captain", "storm", "harbour", "a", "the", "of", "and"]
    questions = [
        Question(
            f"Number {n}: the", tuple(f" {words[(n + k) % 10]} {words[(3 * n + k) % 10]}" for k in range(3)), n % 3
        )
        for n in range(12)
    ]

    found = evaluate.choice_accuracy(model, tokenizer, questions, batch_size=batch_size)

    assert found == evaluate.choice_accuracy(model, tokenizer, questions, batch_size=5)


def test_generation_is_greedy_and_seeded_when_sampled(model: Any, tokenizer: Any):
    def say(seed: int | None = None) -> str:
        return evaluate.generate(model, tokenizer, "The sea", tokens=8, seed=seed)

    assert say() == say()
    assert say(1) == say(1) != say(2)


def test_generation_is_that_of_single_steps(model: Any, tokenizer: Any):
    ids = tokenizer("The sea")["input_ids"]
    prompt = len(ids)
    for _ in range(5):
        ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))

    said = evaluate.generate(model, tokenizer, "The sea", tokens=5)

    assert said == tokenizer.decode(ids[prompt:], skip_special_tokens=True)


def test_every_token_but_the_first_is_timed(model: Any, tokenizer: Any):
    said = evaluate.timed_generation(model, tokenizer, "The sea", tokens=5)

    assert said.text == evaluate.generate(model, tokenizer, "The sea", tokens=5)
    assert len(said.seconds_per_token) == 4
    assert min(said.seconds_per_token) > 0


def test_reading_the_prompt_is_no_part_of_the_decoding_speed(
    model: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
):
    """The clock stands still but for a prompt that takes a minute and tokens that take a second each."""
    now = itertools.chain([0.0, 60.0], itertools.count(61.0))
    monkeypatch.setattr("overhaul.evaluate.perf_counter", lambda: next(now))

    said = evaluate.timed_generation(model, tokenizer, "The sea", tokens=5)

    assert said.seconds_per_token == (1.0, 1.0, 1.0, 1.0)


def test_a_slow_batch_does_not_set_the_speed(model: Any, windows_NT: torch.Tensor, monkeypatch: pytest.MonkeyPatch):
    batches = [(0.0, 100.0), (100.0, 101.0), (101.0, 102.0)]
    now = itertools.chain.from_iterable(batches)
    monkeypatch.setattr("overhaul.evaluate.perf_counter", lambda: next(now))

    scored = evaluate.perplexity(model, windows_NT[:6], batch_size=2)

    assert scored.tokens_per_second == 2 * 32
