"""N-gram models: probabilities sum to one, a corpus done by hand is right, and prose is told from code."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from functools import cache

import numpy as np
import pytest

from overhaul.authenticity import auroc
from overhaul.corpora import CorpusSpec, open_corpus
from overhaul.documents import Message, Row, text_row
from overhaul.errors import UserError
from overhaul.ngram import BEGIN, END, FALLBACK, NGram, discounts, fit, rank, words

TEXT = "the cat sat on the mat\nthe dog sat on the log\n\nthe cat saw the dog\na dog saw a cat"


def fitted(text: str = TEXT, *, order: int) -> NGram:
    return fit([text], order=order, enough_words=0)


def chances(model: NGram, context: Sequence[str]) -> np.ndarray:
    """The probability of each word of the vocabulary after the beginning of a sentence and these words."""
    before = [BEGIN, *(model.vocabulary.get(word, 0) for word in context)]
    ids_VT = np.array([[*before, word] for word in range(len(model.vocabulary))])
    return 10 ** model.log_probs(ids_VT.flatten()).reshape(ids_VT.shape)[:, -1]


@cache
def pieces(corpus: str, *, length: int, count: int) -> list[str]:
    """Runs of lines of a named corpus, with about so many words each."""
    rows = open_corpus(CorpusSpec(path=corpus, limit=60)).train
    lines = (line for row in rows for line in row["text"].split("\n") if line.strip())
    found: list[str] = []
    held: list[str] = []
    for line in lines:
        held.append(line)
        if sum(len(words(line)) for line in held) >= length:
            found.append("\n".join(held))
            held = []
        if len(found) == count:
            return found
    raise AssertionError(f"{corpus} has {len(found)} pieces")


@pytest.mark.parametrize("order", [1, 2, 3, 5])
@pytest.mark.parametrize(
    "context", ["", "the", "the cat", "on the", "sat on the", "mat cat zebra a", "zebra", "mat the"]
)
def test_probabilities_of_all_words_sum_to_one(order: int, context: str):
    model = fitted(order=order)

    found = chances(model, context.split())

    assert np.delete(found, BEGIN).sum() == pytest.approx(1, abs=1e-6)
    assert found[BEGIN] < 1e-90
    assert (np.delete(found, BEGIN) > 0).all()


@pytest.mark.parametrize("fewest", [0, 10**9])
def test_probabilities_of_a_larger_text_sum_to_one_too(fewest: int):
    model = fit(pieces("sample", length=500, count=20), enough_words=fewest)

    for context in (["the"], ["it", "was", "a"], ["to", "be", "or", "not"], ["qwertz", "of", "the"]):
        assert np.delete(chances(model, context), BEGIN).sum() == pytest.approx(1, abs=1e-6)


def test_two_sentences_done_by_hand():
    """Bigrams of a corpus of two lines; the discounts are 0.5, 1 and 1.5, for no count is 3.

    Different words before a, b, c, </s>: 1, 1, 1, 2. Of 5, 0.5 + 0.5 + 0.5 + 1 is left, half of all, for 5 words.
    """
    model = fitted("a b\na c", order=2)
    single = {"a": 0.2, "b": 0.2, "c": 0.2, "</s>": 0.3, "<unk>": 0.1}

    for word, chance in single.items():
        assert 10 ** model.levels[0].log_probs_G[model.vocabulary[word]] == pytest.approx(chance)
    begins, after_a, after_b = 0.5 + 0.5 * 0.2, 0.25 + 0.5 * 0.2, 0.5 + 0.5 * 0.3
    assert model.log_prob("a b") == pytest.approx(math.log10(begins * after_a * after_b))
    assert model.log_prob("a a") == pytest.approx(math.log10(begins * (0.5 * 0.2) * (0.5 * 0.3)))
    assert model.log_prob("zebra") == pytest.approx(math.log10((0.5 * 0.1) * 0.3))
    assert model.perplexity("A b") == pytest.approx((begins * after_a * after_b) ** (-1 / 3))
    assert model.log_prob("a b\n\na a") == pytest.approx(model.log_prob("a b") + model.log_prob("a a"))


def test_unigrams_are_counted_as_they_occur():
    """b, </s> and a occur 1, 2 and 3 times, none 4 times: the discounts are 1/3, 1 and 3, and 4 words share 13 / 18."""
    model = fitted("a a b\na", order=1)

    shared = (1 / 3 + 1 + 3) / 6 / 4
    assert 10 ** model.log_prob("a") == pytest.approx(shared * (1 / 6 + shared))
    assert 10 ** model.log_prob("b") == pytest.approx((2 / 3 / 6 + shared) * (1 / 6 + shared))


def test_discounts_are_those_of_counts_of_counts():
    counts_G = np.repeat([1, 2, 3, 4, 9], [40, 10, 5, 3, 7])
    share = 40 / 60

    assert discounts(counts_G) == pytest.approx((1 - 2 * share / 4, 2 - 3 * share / 2, 3 - 4 * share * 3 / 5))
    assert discounts(np.array([1, 1, 2, 4])) is None


def test_words_are_runs_of_letters_and_single_signs():
    assert words("Don't  panic, Ärger_2!") == ["don", "'", "t", "panic", ",", "ärger_2", "!"]
    assert words(" \t\0 ") == []


def test_a_document_does_not_depend_on_those_beside_it():
    model = fitted(order=4)
    texts = [TEXT, "", "the cat", "zebra\n\nthe", "a"] * 3

    together = model.scores(texts)

    assert together.perplexities().tolist() == [model.perplexity(text) for text in texts]
    np.testing.assert_allclose(together.log_probs_D, [model.log_prob(text) for text in texts], atol=1e-12)
    assert together.counts_D[:5].tolist() == [26, 0, 3, 4, 2]


def test_documents_without_words_are_infinite_counted_and_last():
    model = fitted(order=3)
    rows = [text_row(text) for text in ("zebra zebra", " \n", "the cat sat on the mat", "", "the cat sat on the mat")]

    ranking = rank(rows, model)

    assert ranking.order_D.tolist() == [2, 4, 0, 1, 3]
    assert ranking.perplexities_D[[1, 3]].tolist() == [math.inf, math.inf]
    assert ranking.num_empty == 2
    assert model.log_prob("") == 0
    assert math.isfinite(model.perplexity("zebra"))
    assert rank([], model).order_D.tolist() == []


def test_a_conversation_is_ranked_by_all_that_is_said():
    talk = Row((("messages", (Message("user", "the cat"), Message("assistant", "a dog saw"))),))
    model = fitted(order=2)

    assert rank([talk], model).perplexities_D[0] == model.perplexity("the cat\na dog saw")


@pytest.mark.parametrize(("wanted", "other"), [("sample", "stdlib"), ("stdlib", "sample")])
def test_documents_like_the_reference_are_told_from_others(wanted: str, other: str, capfd: pytest.CaptureFixture[str]):
    reference, like = np.split(np.array(pieces(wanted, length=100, count=220)), [140])
    blend = [*like, *pieces(other, length=100, count=80)]

    model = fit(reference.tolist())
    perplexities_D = rank([text_row(text) for text in blend], model).perplexities_D

    assert "fewer than 100,000" in capfd.readouterr().err
    assert auroc(-perplexities_D[:80], -perplexities_D[80:]) >= 0.9


def test_a_short_reference_backs_the_order_off(capfd: pytest.CaptureFixture[str]):
    model = fit(["a b c d a", "a c b"], order=5)  # of words one is seen once, two twice, two three times; of pairs none

    assert model.order == 1
    said = " ".join(capfd.readouterr().err.split())
    assert "fewer than 100,000" in said
    assert "its order is 1 instead of 5" in said


def test_discounts_that_counts_do_not_give_are_said(capfd: pytest.CaptureFixture[str]):
    fitted("a b\na c", order=2)

    said = capfd.readouterr().err
    assert all(f"{k}-grams" in said for k in (1, 2))
    assert str(FALLBACK) in said


def test_no_line_is_as_long_as_the_order(capfd: pytest.CaptureFixture[str]):
    model = fitted("a b\nc", order=5)

    assert model.order == 4
    assert "no line of the reference text has 3 words" in capfd.readouterr().err


def test_special_words_in_a_text_are_unknown_words():
    model = fit(["a b </s> <s> a <unk>"], order=2, words=str.split, enough_words=0)
    plain = fit(["a b <unk> <unk> a <unk>"], order=2, words=str.split, enough_words=0)

    for text in ("a b", "a </s>", "a zebra", "<s> a"):
        assert model.log_prob(text) == plain.log_prob(text)
    assert model.log_prob("a </s>") == model.log_prob("a zebra")
    assert np.delete(chances(model, ["a", "zebra"]), BEGIN).sum() == pytest.approx(1, abs=1e-6)
    assert sorted(model.vocabulary.values()) == list(range(5))


@pytest.mark.parametrize(
    ("texts", "order", "said"), [([], 3, "no word"), ([" \n"], 3, "no word"), (["a"], 0, "order 0")]
)
def test_what_cannot_be_fitted_is_refused(texts: list[str], order: int, said: str):
    with pytest.raises(UserError, match=said):
        fit(texts, order=order)


def test_the_ends_of_sentences_are_no_contexts():
    """A model of one line after another is that of the lines: nothing is learnt across."""
    lines = TEXT.split("\n")
    models = [fitted("\n".join(order), order=3) for order in itertools.islice(itertools.permutations(lines), 3)]

    assert len({round(model.log_prob("the dog saw a mat"), 12) for model in models}) == 1
    assert END not in models[0].levels[1].keys_G // len(models[0].vocabulary)
