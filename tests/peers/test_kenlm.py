"""KenLM scores a model's ARPA file as we do; and its `lmplz`, where it is on the path, estimates the same model."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from overhaul.arpa import from_arpa, to_arpa
from overhaul.corpora import open_corpus
from overhaul.documents import as_plain_text, text_row
from overhaul.ngram import NGram, fit, rank, words

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("default")]
kenlm: Any = pytest.importorskip("kenlm")


def sentences(text: str) -> list[str]:
    """The lines as KenLM reads them: words between spaces."""
    return [" ".join(found) for line in text.split("\n") if (found := words(line))]


@pytest.fixture(scope="module")
def reference() -> list[str]:
    corpus = open_corpus("sample")
    return [as_plain_text(row)["text"] for row in corpus.train]


@pytest.fixture(scope="module")
def documents() -> list[str]:
    """Pieces of both corpora, none of them in the reference."""
    prose = [line for row in open_corpus("sample").heldout for line in row["text"].split("\n") if words(line)]
    code = [row["text"][:2000] for row in open_corpus("stdlib").heldout]
    return [*prose[:100], *code[:100], "zebra", "\n\n"]


@pytest.fixture(scope="module", params=[1, 2, 3, 5])
def model(request: pytest.FixtureRequest, reference: Sequence[str]) -> NGram:
    return fit(reference, order=request.param, enough_words=0)


@pytest.mark.parametrize("written", ["here", "lmplz"])
def test_the_same_file_gives_the_same_scores_and_the_same_order(
    written: str, model: NGram, reference: Sequence[str], documents: Sequence[str], tmp_path: Path
):
    if model.order == 1:
        pytest.skip("KenLM reads no models of single words")
    path = tmp_path / "model.arpa"
    if written == "here":
        to_arpa(model, path)
    else:
        lmplz(reference, model.order, path)
    peer, own = kenlm.Model(str(path)), from_arpa(path)

    for text in documents:
        lines = sentences(text)
        score = sum(peer.score(line) for line in lines)
        assert own.log_prob(text) == pytest.approx(score, abs=1e-4, rel=1e-6)
        assert model.log_prob(text) == pytest.approx(score, abs=1e-3, rel=1e-6)
        if len(lines) == 1:
            assert own.perplexity(text) == pytest.approx(peer.perplexity(lines[0]), rel=1e-5)
    ranking = rank([text_row(text) for text in documents], own)
    scored = [place for place, text in enumerate(documents) if sentences(text)]
    theirs = [theirs_of(peer, documents[place]) for place in scored]
    assert ranking.num_empty == 1
    assert spearman(ranking.perplexities_D[scored], np.array(theirs)) > 0.9999


def theirs_of(peer: Any, text: str) -> float:
    """Perplexity over the lines of a document, from KenLM's scores."""
    lines = sentences(text)
    return 10 ** (-sum(peer.score(line) for line in lines) / sum(len(line.split()) + 1 for line in lines))


def spearman(first_D: np.ndarray, second_D: np.ndarray) -> float:
    """Correlation of ranks."""
    ranks = [np.argsort(np.argsort(values_D, kind="stable"), kind="stable") for values_D in (first_D, second_D)]
    return float(np.corrcoef(*ranks)[0, 1])


def lmplz(reference: Sequence[str], order: int, path: Path) -> None:
    """KenLM's own estimate, by the program that is not in its Python package."""
    program = shutil.which("lmplz")
    if program is None:
        pytest.skip("KenLM's lmplz is not on the path")
    told = "".join(f"{line}\n" for text in reference for line in sentences(text))
    how = ["-o", str(order), "-S", "200M", "-T", str(path.parent / "lmplz-"), "--discount_fallback"]
    subprocess.run([program, *how, "--arpa", str(path)], input=told.encode(), check=True, capture_output=True)


def test_lmplz_estimates_the_same_model(model: NGram, reference: Sequence[str], tmp_path: Path):
    lmplz(reference, model.order, tmp_path / "lmplz.arpa")
    peer = from_arpa(tmp_path / "lmplz.arpa")
    by_word = np.array([peer.vocabulary[word] for word in sorted(model.vocabulary, key=model.vocabulary.__getitem__)])

    assert len(peer.vocabulary) == len(model.vocabulary)
    nodes_G, size = by_word, len(by_word)
    for own, other in zip(model.levels, peer.levels, strict=True):
        if own is not model.levels[0]:
            contexts_G, last_G = np.divmod(own.keys_G, size)
            nodes_G = other.find(nodes_G[contexts_G] * size + by_word[last_G])
        assert len(own.keys_G) == len(other.keys_G)
        assert (nodes_G >= 0).all()
        predicted_G = own.log_probs_G > -99  # all but <s>, which is 0 there
        np.testing.assert_allclose(own.log_probs_G[predicted_G], other.log_probs_G[nodes_G][predicted_G], atol=1e-5)
        np.testing.assert_allclose(own.backoffs_G, other.backoffs_G[nodes_G], atol=1e-5)
