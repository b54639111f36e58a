"""lm-eval, given the same tokens and the same pairs of context and continuation, finds the same log-likelihoods."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from overhaul.corpora import open_corpus
from overhaul.data import Data
from overhaul.evaluate import choice_accuracy, next_token_nll, option_log_likelihoods, perplexity
from overhaul.questions import TASKS, Question, questions

pytestmark = pytest.mark.slow
huggingface = pytest.importorskip("lm_eval.models.huggingface")
from lm_eval.api.instance import Instance  # noqa: E402  it must follow importorskip

TOLERANCE_NATS = 1e-4


@pytest.fixture(scope="module", params=["tiny", "smol"])
def directory(request: pytest.FixtureRequest) -> Path:
    return request.getfixturevalue(request.param)


@pytest.fixture(scope="module")
def is_tiny(directory: Path, tiny: Path) -> bool:
    return directory == tiny


@pytest.fixture(scope="module")
def model(directory: Path) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)


@pytest.fixture(scope="module")
def tokenizer(directory: Path) -> Any:
    return AutoTokenizer.from_pretrained(directory)


@pytest.fixture(scope="module")
def peer(model: torch.nn.Module, tokenizer: Any) -> Any:
    return huggingface.HFLM(pretrained=model, tokenizer=tokenizer, batch_size=4)


def test_perplexity_over_the_same_windows(model, tokenizer, peer, is_tiny):
    windows_NT = Data(open_corpus("sample"), tokenizer).windows("heldout", seq_len=128, limit=16 if is_tiny else 6)

    # A window's first token is the context, the rest is the continuation.
    pairs = [(("", ""), ids[:1], ids[1:]) for ids in windows_NT.tolist()]
    peers_N = np.array([score for score, _ in peer._loglikelihood_tokens(pairs, disable_tqdm=True)])

    ours_N = -next_token_nll(model, windows_NT).double().sum(1).numpy()
    np.testing.assert_allclose(ours_N / 127, peers_N / 127, atol=TOLERANCE_NATS)
    value = perplexity(model, windows_NT).estimate.value
    assert np.log(value) == pytest.approx(-peers_N.mean() / 127, abs=TOLERANCE_NATS)


@pytest.mark.parametrize("task", TASKS)
def test_choice_over_the_same_questions(task, model, tokenizer, peer, is_tiny):
    asked = questions(task, limit=50 if is_tiny else 20)

    peers = _peers_scores(peer, asked)
    ours = option_log_likelihoods(model, tokenizer, asked)
    for own, theirs in zip(ours, peers, strict=True):
        np.testing.assert_allclose(own, theirs, atol=TOLERANCE_NATS, rtol=1e-5)

    per_character = TASKS[task].per_character
    found = choice_accuracy(model, tokenizer, asked, per_character=per_character)
    assert found.value == np.mean([_is_right(one, s, per_character) for one, s in zip(asked, peers, strict=True)])


def _peers_scores(peer: Any, asked: list[Question]) -> list[np.ndarray]:
    requests = [
        Instance(request_type="loglikelihood", doc={}, arguments=(question.prompt, option), idx=index)
        for question in asked
        for index, option in enumerate(question.options)
    ]
    scores = np.array([score for score, _ in peer.loglikelihood(requests, disable_tqdm=True)])
    return np.split(scores, np.cumsum([len(question.options) for question in asked])[:-1])


def _is_right(question: Question, score_O: np.ndarray, per_character: bool) -> bool:
    """`acc_norm` of lm-eval, or `acc`."""
    texts = [option.removeprefix(" ") for option in question.options]
    length_O = np.array([float(len(text)) if per_character else 1.0 for text in texts])
    return int(np.argmax(score_O / length_O)) == question.answer
