r"""N-gram language models, smoothed by modified Kneser-Ney: how much a document reads like a reference text.

The estimate is that of KenLM's `lmplz` (Heafield et al., 2013): discounts D1, D2 and D3+ for each order from counts of
counts (Chen and Goodman, 1998), adjusted counts below the highest order, unigrams interpolated with the uniform
distribution, and all of it in backoff form, as ARPA files have it. Logarithms are to base 10, as there.

A line of a text is a sentence, between `<s>` and `</s>`; lines without words are left out.

Letters of shapes: N words of a text with those two, G n-grams of one order, C n-grams one shorter, D documents.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from overhaul.documents import Row, as_plain_text
from overhaul.errors import UserError
from overhaul.progress import say

ENOUGH_WORDS = 100_000
"""In a reference text of fewer, the order is backed off where counts of counts ask for it."""
FALLBACK = (0.5, 1.0, 1.5)
"""Discounts where counts of counts give none: those of `lmplz --discount_fallback`."""
UNKNOWN, BEGIN, END = range(3)
SPECIAL = ("<unk>", "<s>", "</s>")
"""The words that stand for these numbers. Where a text has one of them as a word, it counts as unknown."""
NEVER = -99.0
"""Of `<s>`, which is never predicted, as SRILM writes it."""

_BATCH_WORDS = 200_000
_WORD = re.compile(r"\w+|[^\w\s\0]")

Words = Callable[[str], list[str]]
"""What makes words of a line."""


def words(line: str) -> list[str]:
    r"""The line in lower case as runs of letters and digits, and single other signs: `\w+|[^\w\s]`."""
    return _WORD.findall(line.lower())


@dataclass(frozen=True, slots=True)
class Level:
    """The n-grams of one order.

    Attributes:
        keys_G: ascending: the number, in the level below, of all words but the last, times the size of the
            vocabulary, plus the last word; int64. On the first level the words themselves, all of them.
        log_probs_G: log10 of the last word's probability after the others.
        backoffs_G: log10 of what is left for words that were not seen after the n-gram.
    """

    keys_G: np.ndarray
    log_probs_G: np.ndarray
    backoffs_G: np.ndarray

    def find(self, keys_N: np.ndarray) -> np.ndarray:
        """The numbers of n-grams, -1 where one is not there."""
        if not len(self.keys_G):
            return np.full(len(keys_N), -1)
        places_N = np.minimum(np.searchsorted(self.keys_G, keys_N), len(self.keys_G) - 1)
        return np.where(self.keys_G[places_N] == keys_N, places_N, -1)


class Scores(NamedTuple):
    """How likely documents are.

    Attributes:
        log_probs_D: log10 of each one's probability.
        counts_D: its words, the end of each line being one.
    """

    log_probs_D: np.ndarray
    counts_D: np.ndarray

    def perplexities(self) -> np.ndarray:
        """`(D,)` 10^(-log10 p / count); infinite where there are no words."""
        # A model read from a file can be so surprised that the power is above all numbers.
        with np.errstate(over="ignore"):
            perplexities_D = 10 ** (-self.log_probs_D / np.maximum(self.counts_D, 1))
        return np.where(self.counts_D > 0, perplexities_D, np.inf)


@dataclass(frozen=True)
class NGram:
    """An n-gram language model in backoff form.

    Attributes:
        vocabulary: words and their numbers; the first are those of `SPECIAL`.
        levels: the n-grams of order 1, 2 and so on.
        words: what makes words of a line.
    """

    vocabulary: Mapping[str, int]
    levels: tuple[Level, ...]
    words: Words = words

    @property
    def order(self) -> int:
        """Words of the longest n-grams."""
        return len(self.levels)

    def log_prob(self, text: str) -> float:
        """log10 of the text's probability: of all words and the end of each line, as KenLM's `score`; 0 of no words."""
        return float(self.scores([text]).log_probs_D[0])

    def perplexity(self, text: str) -> float:
        """Per word, the end of each line being one, as KenLM's `perplexity`; infinite for a text without words.

        10^(-log10 p(text) / (words + lines))
        """
        return float(self.scores([text]).perplexities()[0])

    def scores(self, texts: Iterable[str]) -> Scores:
        """How likely each of many texts is."""
        scored = [self._scored(batch) for batch in self._batches(texts)]
        log_probs, counts = zip(*scored, strict=True) if scored else ((), ())
        return Scores(np.concatenate([np.zeros(0), *log_probs]), np.concatenate([np.zeros(0, np.int64), *counts]))

    def _batches(self, texts: Iterable[str]) -> Iterator[list[list[int]]]:
        batch, held = [], 0
        for text in texts:
            batch.append(self._read(text))
            held += len(batch[-1])
            if held >= _BATCH_WORDS:
                yield batch
                batch, held = [], 0
        if batch:
            yield batch

    @cached_property
    def _known(self) -> dict[str, int]:
        return {word: number for word, number in self.vocabulary.items() if word not in SPECIAL}

    def _read(self, text: str) -> list[int]:
        ids: list[int] = []
        for sentence in _sentences(text, self.words):
            ids += [BEGIN, *[self._known.get(word, UNKNOWN) for word in sentence], END]
        return ids

    def _scored(self, documents: Sequence[list[int]]) -> tuple[np.ndarray, np.ndarray]:
        """`(D,)` sums of log10 probabilities, and over how many words and ends of lines."""
        ids_N = np.array([number for ids in documents for number in ids], np.int64)
        document_N = np.repeat(np.arange(len(documents)), [len(ids) for ids in documents])
        is_scored_N = ids_N != BEGIN
        scores_N = np.where(is_scored_N, self.log_probs(ids_N), 0.0)
        sums_D = np.bincount(document_N, scores_N, len(documents))
        return sums_D, np.bincount(document_N, is_scored_N, len(documents))

    def log_probs(self, ids_N: np.ndarray) -> np.ndarray:
        """`(N,)` log10 of each word's probability after those before it, back to the last `<s>`.

        log p(w | h) is that of the n-gram hw where it is known, else backoff(h) + log p(w | h without its first word).
        """
        size, begins_N = len(self.vocabulary), ids_N == BEGIN
        nodes_N, scores_N = ids_N, self.levels[0].log_probs_G[ids_N]
        for shorter, level in pairwise(self.levels):
            # The n-gram that ends one word earlier is what this word may follow.
            contexts_N = np.concatenate([[-1], nodes_N[:-1]])[: len(ids_N)]
            nodes_N = level.find(contexts_N * size + ids_N)
            # No n-gram goes over the beginning of a sentence, so that none of the longer ones after it does.
            nodes_N[begins_N] = -1
            follows_N, found_N = contexts_N >= 0, nodes_N >= 0
            scores_N[follows_N] += shorter.backoffs_G[contexts_N[follows_N]]
            scores_N[found_N] = level.log_probs_G[nodes_N[found_N]]
        return scores_N


def _sentences(text: str, words: Words) -> Iterator[list[str]]:
    return (found for line in text.split("\n") if (found := words(line)))


class Ranking(NamedTuple):
    """Documents by how much they read like the reference.

    Attributes:
        order_D: their places in the corpus, the lowest perplexity first; of equals, the first first.
        perplexities_D: of each, by its place in the corpus; infinite without words.
        num_empty: documents without words; they come last.
    """

    order_D: np.ndarray
    perplexities_D: np.ndarray
    num_empty: int


def rank(rows: Iterable[Row], model: NGram) -> Ranking:
    """Orders documents from the lowest perplexity to the highest; questions and answers count as plain text.

    A document of commoner words can come before one that is like the reference, the more so the shorter the reference.
    """
    scores = model.scores(as_plain_text(row)["text"] for row in rows)
    is_empty_D = scores.counts_D == 0
    # The sort is stable, so equals stay as they stand; a perplexity that overflowed comes before those without words.
    perplexities_D = scores.perplexities()
    return Ranking(np.lexsort((is_empty_D, perplexities_D)), perplexities_D, int(is_empty_D.sum()))


def fit(texts: Iterable[str], *, order: int = 5, words: Words = words, enough_words: int = ENOUGH_WORDS) -> NGram:
    """Estimates a model from a reference text.

    Args:
        texts: documents.
        order: words of the longest n-grams.
        words: what makes words of a line.
        enough_words: with fewer, the order is backed off to the highest one of whose n-grams some were seen once, some
            twice and some three times, so that it has discounts of its own; 0 never backs off.

    Returns:
        The model; its order is lower than asked for, with a line on stderr, where the text is too short.

    Raises:
        UserError: no word is in the text, or the order is below 1.
    """
    if order < 1:
        raise UserError(f"an n-gram model of order {order}", allowed="1 or more", hint="order 5")
    vocabulary, ids_N = _numbered(texts, words)
    counted = _counted(ids_N, len(vocabulary), order)
    if len(counted) < order:
        say(f"no line of the reference text has {order - 2} words: order {len(counted)} instead of {order}")
    num_words = int((ids_N > END).sum())
    if num_words < enough_words:
        backed = _supported(counted)
        say(f"the reference text has {num_words:,} words, fewer than {enough_words:,}: its perplexities are rough"
            + (f", and its order is {backed} instead of {len(counted)}" if backed < len(counted) else ""))  # fmt: skip
        counted = counted[:backed]
    return NGram(vocabulary, _estimated(counted, len(vocabulary)), words)


def _numbered(texts: Iterable[str], words: Words) -> tuple[dict[str, int], np.ndarray]:
    """The vocabulary, and the text in its numbers."""
    vocabulary: dict[str, int] = dict.fromkeys(SPECIAL, UNKNOWN)  # as words of a text
    pieces = [np.zeros(0, np.int64)]
    for text in texts:
        ids: list[int] = []
        for sentence in _sentences(text, words):
            known = [vocabulary.setdefault(word, len(vocabulary)) for word in sentence]
            ids += [BEGIN, *known, END]
        pieces.append(np.array(ids, np.int64))
    if len(vocabulary) == len(SPECIAL):
        raise UserError("the reference text of an n-gram model has no word in it", allowed="documents with words")
    vocabulary |= {word: number for number, word in enumerate(SPECIAL)}
    return vocabulary, np.concatenate(pieces)


class _Counted(NamedTuple):
    """The n-grams of one order in a text.

    Attributes:
        keys_G: as in `Level`.
        counts_G: how often they occur.
        suffixes_G: the numbers, in the level below, of all words but the first.
        opens_G: whether the first word is `<s>`.
    """

    keys_G: np.ndarray
    counts_G: np.ndarray
    suffixes_G: np.ndarray
    opens_G: np.ndarray


def _counted(ids_N: np.ndarray, size: int, order: int) -> list[_Counted]:
    """The n-grams of order 1 and up to `order`, or as far as there are any."""
    begins_N = ids_N == BEGIN
    starts_N = np.flatnonzero(begins_N)
    places_N = np.arange(len(ids_N)) - starts_N[np.cumsum(begins_N) - 1]
    all_words, counts_V = np.arange(size), np.bincount(ids_N, minlength=size)
    counts_V[BEGIN] = 0
    counted, nodes_N = [_Counted(all_words, counts_V, all_words, all_words == BEGIN)], ids_N
    for length in range(2, order + 1):
        ends_M = np.flatnonzero(places_N >= length - 1)
        if not len(ends_M):
            break
        keys_M = nodes_N[ends_M - 1] * size + ids_N[ends_M]
        keys_G, first_G, node_M, counts_G = np.unique(
            keys_M, return_index=True, return_inverse=True, return_counts=True
        )
        suffixes_G, opens_G = nodes_N[ends_M[first_G]], places_N[ends_M[first_G]] == length - 1
        counted.append(_Counted(keys_G, counts_G, suffixes_G, opens_G))
        nodes_N = np.full(len(ids_N), -1)
        nodes_N[ends_M] = node_M
    return counted


def _adjusted(counted: Sequence[_Counted]) -> list[np.ndarray]:
    """Below the highest order, how many different words stand before an n-gram, unless it opens a sentence."""
    adjusted = []
    for grams, longer in pairwise(counted):
        before_G = np.bincount(longer.suffixes_G, minlength=len(grams.keys_G))
        adjusted.append(np.where(grams.opens_G, grams.counts_G, before_G))
    return [*adjusted, counted[-1].counts_G]


def discounts(counts_G: np.ndarray) -> tuple[float, float, float] | None:
    """D1, D2 and D3+ from how many n-grams have a count of k = 1, 2, 3, 4 (Chen and Goodman, 1998, equation 26).

    D_k = k - (k + 1) Y n_{k+1} / n_k, with Y = n_1 / (n_1 + 2 n_2)

    Returns:
        None where a count does not occur, or a discount is not above 0.
    """
    n = np.bincount(np.minimum(counts_G, 5), minlength=6).tolist()
    if 0 in n[1:4]:
        return None
    share = n[1] / (n[1] + 2 * n[2])
    one, two, three = (k - (k + 1) * share * n[k + 1] / n[k] for k in (1, 2, 3))
    return (one, two, three) if min(one, two, three) > 0 else None


def _supported(counted: Sequence[_Counted]) -> int:
    """The highest order with discounts of its own; 1 where none has."""
    return max((k for k, grams in enumerate(counted, 1) if discounts(grams.counts_G)), default=1)


def _estimated(counted: Sequence[_Counted], size: int) -> tuple[Level, ...]:
    """Interpolated probabilities, and how much each context leaves to the level below.

    p(w | h) = (a(hw) - D(a(hw))) / sum_x a(hx) + gamma(h) p(w | h without its first word),
    gamma(h) = sum_x D(a(hx)) / sum_x a(hx), with the adjusted counts a
    """
    # Of the words that can be predicted, `<s>` is none.
    shorter_C, log_probs, backoffs = np.full(size, 1 / (size - 1)), [], []
    for k, (grams, counts_G) in enumerate(zip(counted, _adjusted(counted), strict=True), 1):
        known = discounts(counts_G)
        if known is None:
            say(f"{k}-grams of the reference text: their counts give no discounts, {FALLBACK} are taken")
        discounts_G = np.array((0.0, *(known or FALLBACK)))[np.minimum(counts_G, 3)]
        contexts_G, num_contexts = grams.keys_G // size, len(shorter_C) if k > 1 else 1
        totals_C = np.bincount(contexts_G, counts_G, num_contexts)
        left_C = np.bincount(contexts_G, discounts_G, num_contexts) / np.maximum(totals_C, 1)
        backoffs.append(np.log10(np.where(totals_C > 0, left_C, 1.0)))
        probs_G = (counts_G - discounts_G) / totals_C[contexts_G] + left_C[contexts_G] * shorter_C[grams.suffixes_G]
        # A probability of 1 may be rounded up, and readers of ARPA files refuse that.
        log_probs.append(np.minimum(np.log10(probs_G), 0.0))
        shorter_C = probs_G
    log_probs[0][BEGIN] = NEVER
    # What the empty context leaves is in the unigrams already; the longest n-grams are no contexts.
    backoffs = [*backoffs[1:], np.zeros(len(counted[-1].keys_G))]
    return tuple(
        Level(grams.keys_G, log_probs_G, backoffs_G)
        for grams, log_probs_G, backoffs_G in zip(counted, log_probs, backoffs, strict=True)
    )
