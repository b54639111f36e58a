"""Losses of documents: those of transformers, whatever stands beside them."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from overhaul import artifact, scorers
from overhaul.corpora import NO_CORPUS
from overhaul.data import Data
from overhaul.documents import Row, text_row
from overhaul.errors import UserError
from overhaul.scorers import document_losses

TEXTS = ("It was a bright morning.", "Call me Ishmael. " * 30, "a", "", "The capital of France", "Whale! " * 12)
ROWS = tuple(map(text_row, TEXTS))


@pytest.fixture(scope="module")
def made(tiny: Path) -> Any:
    return artifact.load(tiny)


@pytest.fixture
def data(made: Any) -> Data:
    return Data(NO_CORPUS, made.processor)


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_losses_are_those_of_transformers(architecture: str, make_tiny: Any):
    made = artifact.load(make_tiny(architecture=architecture))
    data = Data(NO_CORPUS, made.processor)

    losses_D = document_losses(made.model, data, ROWS, max_tokens=40, batch_size=3)

    for row, loss in zip(ROWS, losses_D, strict=True):
        ids = torch.from_numpy(data.encode(row).ids[:40])
        with torch.no_grad():
            direct = float(made.model(input_ids=ids[None], labels=ids[None]).loss) if len(ids) > 2 else math.inf
        assert loss == pytest.approx(direct, rel=1e-5)
    assert losses_D.dtype == np.float64


def test_a_document_does_not_depend_on_those_beside_it(made: Any, data: Data, monkeypatch: pytest.MonkeyPatch):
    alone_D = np.concatenate([document_losses(made.model, data, [row], max_tokens=64) for row in ROWS])

    for batch_size, at_once in ((1, 1024), (2, 3), (6, 4)):
        monkeypatch.setattr(scorers, "_AT_ONCE", at_once)
        together_D = document_losses(made.model, data, ROWS, max_tokens=64, batch_size=batch_size)
        np.testing.assert_allclose(together_D, alone_D, rtol=1e-5)


def test_what_is_after_the_last_token_that_is_read_does_not_matter(made: Any, data: Data):
    long, longer = (text_row("Call me Ishmael. " * count) for count in (30, 60))

    losses_D = document_losses(made.model, data, [long, longer], max_tokens=16)

    assert losses_D[0] == pytest.approx(losses_D[1], rel=1e-6)


def test_documents_with_next_to_no_tokens_are_infinite(made: Any, data: Data):
    rows = [text_row(text) for text in ("", "a", "ab" * 40)]  # with the end token 1, 2 and more tokens

    losses_D = document_losses(made.model, data, rows, max_tokens=16)

    assert losses_D[:2].tolist() == [math.inf, math.inf]
    assert math.isfinite(losses_D[2])
    assert document_losses(made.model, data, [], max_tokens=16).tolist() == []


def test_of_a_question_only_the_answer_is_scored(made: Any, data: Data):
    asked, whole = Row((("prompt", "Call me"), ("completion", " Ishmael."))), text_row("Call me Ishmael.")
    encoded = data.encode(asked)
    ids = torch.from_numpy(encoded.ids)[None]
    labels = torch.where(torch.from_numpy(encoded.trained), ids, -100)
    with torch.no_grad():
        direct = float(made.model(input_ids=ids, labels=labels).loss)

    losses_D = document_losses(made.model, data, [asked, whole], max_tokens=64)

    assert losses_D[0] == pytest.approx(direct, rel=1e-5)
    assert losses_D[0] != pytest.approx(losses_D[1], rel=1e-3)


@pytest.mark.parametrize("max_tokens", [-1, 0, 2, 513])
def test_documents_too_short_to_score_or_too_long_to_read_are_refused(made: Any, data: Data, max_tokens: int):
    with pytest.raises(UserError, match=r"reads 512\nallowed: 3 to 512"):
        document_losses(made.model, data, ROWS, max_tokens=max_tokens)


def test_a_loss_that_is_no_number_is_refused_and_the_document_named(tiny: Path, data: Data):
    made = artifact.load(tiny)
    with torch.no_grad():
        made.model.get_output_embeddings().weight.fill_(math.nan)

    with pytest.raises(UserError, match="document 2 of none is nan"):
        document_losses(made.model, data, [text_row(""), ROWS[0]], max_tokens=16)
