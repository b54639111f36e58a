"""Which questions with answers are kept: their form, whether they were met before, whether they are tested."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

from overhaul.answers import normalised, result
from overhaul.question_templates import Pair
from overhaul.synthetic import NearDuplicates, plain

FEWEST_WORDS = 3
"""Of a question."""
REASONS = (
    *("empty or unfinished", "not a question", "too long", "duplicate", "near duplicate", "in a test"),
    *("not from the page", "not agreed"),
)
"""Why a pair is dropped; the last is for who asks a generator about its own answers."""
_WORD = re.compile(r"\w+(?:[.,]\d+)*|[-+*/=%]")


class Forbidden:
    """The words of test items, so that nothing is trained on that is tested.

    Attributes:
        items: how many there are.
    """

    def __init__(self, run_words: int) -> None:
        self._run_words, self.items = run_words, 0
        self._runs: set[tuple[str, ...]] = set()
        self._short: set[tuple[str, ...]] = set()

    def add(self, texts: Iterable[str]) -> None:
        """More test items."""
        for text in texts:
            words = _words(text)
            self.items += 1
            if len(words) < self._run_words:
                self._short.add(words)
            self._runs.update(self._runs_of(words))

    def holds(self, question: str) -> bool:
        """Whether an item has a run of so many words in common with it, or is the same where it is shorter."""
        words = _words(question)
        if len(words) < self._run_words:
            return words in self._short
        return not self._runs.isdisjoint(self._runs_of(words))

    def _runs_of(self, words: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
        return (words[start : start + self._run_words] for start in range(len(words) - self._run_words + 1))


def _words(text: str) -> tuple[str, ...]:
    """Words and numbers without capitals and punctuation; the signs of arithmetic are words."""
    return tuple(_WORD.findall(text.casefold()))


def is_question(text: str) -> bool:
    """Whether a line has the form of a question: a few words, and the mark at their end."""
    return text.endswith("?") and len(text.split()) >= FEWEST_WORDS


class PairSieve:
    """Lets a pair through that has the right form, is unlike all before it, and asks nothing that is tested.

    Attributes:
        made: how many were looked at.
        dropped: why how many were not let through.
        forbidden: what may not be asked.
    """

    def __init__(self, *, longest: int, overlap: float = 0.0, run_words: int = 8, shown: Iterable[str] = ()) -> None:
        self.longest, self.overlap, self.forbidden = longest, overlap, Forbidden(run_words)
        self._known = {plain(question) for question in shown}  # a model may repeat what it is shown
        self._near = NearDuplicates()
        self.made = 0
        self.dropped: dict[str, int] = dict.fromkeys(REASONS, 0)

    def __call__(self, pair: Pair) -> bool:
        """Whether the pair is let through."""
        self.made += 1
        why = self._why_not(pair)
        if why:
            self.dropped[why] += 1
            return False
        self._known.add(plain(pair.question))
        self._near.add(pair.question)
        return True

    def is_still_good(self, pair: Pair) -> bool:
        """Whether a pair that was let through asks nothing that was added to the tests since."""
        is_tested = self.forbidden.holds(pair.question)
        self.dropped["in a test"] += is_tested
        return not is_tested

    @property
    def dropped_share(self) -> float:
        """Of all that was made."""
        return sum(self.dropped.values()) / self.made if self.made else 0.0

    def counts(self) -> str:
        """The reasons that were met, for a sentence."""
        return ", ".join(f"{count} {why}" for why, count in self.dropped.items() if count) or "none dropped"

    def _why_not(self, pair: Pair) -> str:
        question, answer = pair.question, pair.answer
        if not question.strip():
            return "empty or unfinished"
        if "\n" in question + answer or not is_question(question):
            return "not a question"
        if not normalised(result(answer)):
            return "empty or unfinished"
        if max(len(question), len(answer)) > self.longest:
            return "too long"
        if plain(question) in self._known:
            return "duplicate"
        if self._near.holds(question):
            return "near duplicate"
        if self.forbidden.holds(question):
            return "in a test"
        return "not from the page" if pair.text and self._shared(pair) < self.overlap else ""

    def _shared(self, pair: Pair) -> float:
        """Of the answer's words, those that the text has that its writer saw."""
        words, there = _words(pair.answer), set(_words(pair.text))
        return sum(word in there for word in words) / len(words) if words else 0.0
