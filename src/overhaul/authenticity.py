"""A judge that tells real prompts of a task from written ones: its question, its training, what it is worth.

It is a language model that answers yes or no; it never sees an answer to a prompt.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from overhaul.evaluate import option_log_likelihoods
from overhaul.questions import Question
from overhaul.stream import Batch, Encoded, Map, Repeat, Rows, Shuffle, Stream, padded

QUESTION = "{prompt}\n\nIs this a real example of the task, yes or no? Answer:"
REAL, WRITTEN = " yes", " no"


def judging(tokenizer: Any, real: Sequence[str], written: Sequence[str], *, batch_size: int, seed: int) -> Stream:
    """Questions without end, as many of real as of written prompts, trained on the answer alone.

    L = - mean over real of log p(yes | x) - mean over written of log p(no | x)
    """
    asked = [(prompt, REAL) for prompt in real] + [(prompt, WRITTEN) for prompt in written]
    rows = [_encoded(tokenizer, prompt, answer) for prompt, answer in asked]
    width = max(len(row.ids) for row in rows)
    source = Shuffle(Rows(rows, name="judging", fingerprint=f"{len(real)}+{len(written)}"), seed=seed)
    return Batch(Map(Repeat(source), lambda row: padded(row, width), name=f"pad({width})"), batch_size=batch_size)


def _encoded(tokenizer: Any, prompt: str, answer: str) -> Encoded:
    """The question, and its answer as the only part that is trained on; tokens as `scores` reads them."""
    asked = QUESTION.format(prompt=prompt)
    begun, whole = (tokenizer(text, verbose=False)["input_ids"] for text in (asked, asked + answer))
    ids = np.array(whole, np.int64)
    return Encoded(ids, np.arange(len(ids)) >= min(len(begun), len(ids) - 1))


def scores(
    model: nn.Module, tokenizer: Any, prompts: Sequence[str], *, dtype: torch.dtype = torch.float32, title: str = ""
) -> np.ndarray:
    """How likely each prompt is real by the judge, from 0 to 1: yes against no."""
    questions = [Question(QUESTION.format(prompt=prompt), (REAL, WRITTEN), 0) for prompt in prompts]
    found = option_log_likelihoods(model, tokenizer, questions, dtype=dtype, title=title)
    return np.array([1 / (1 + np.exp(np.clip(no - yes, -50, 50))) for yes, no in found])


def auroc(real: np.ndarray, written: np.ndarray) -> float:
    """The probability that a real prompt has a higher score than a written one; ties count half."""
    above = (real[:, None] > written[None]).mean()
    return float(above + 0.5 * (real[:, None] == written[None]).mean())


def best_threshold(real: np.ndarray, written: np.ndarray) -> float:
    """The score above which most is judged rightly, both kinds counting alike; of equals the nearest to a half."""
    both = np.unique(np.concatenate([real, written, [0.0, 1.0]]))
    middles = np.append((both[1:] + both[:-1]) / 2, 0.5)
    right = [(real > at).mean() + (written <= at).mean() for at in middles]
    best = [at for at, share in zip(middles, right, strict=True) if share >= max(right) - 1e-12]
    return float(min(best, key=lambda at: abs(at - 0.5)))
