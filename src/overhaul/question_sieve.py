"""Which questions with answers are kept: their form, whether they were met before, whether they are tested."""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Iterable

from overhaul.answers import normalised, result
from overhaul.question_templates import Pair
from overhaul.synthetic import NearDuplicates, plain, runs

FEWEST_WORDS = 3
"""Of a question."""
REASONS = (
    *("empty or unfinished", "not a question", "too long", "duplicate", "near duplicate", "in a test"),
    *("not from the page", "not agreed"),
)
"""Why a pair is dropped; the last is for who asks a generator about its own answers."""
SHORTEST_RUN = 4
"""Words of the shortest item that is looked for inside longer texts: fewer in a row are met everywhere."""
_UNSPACED = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff"
"""Letters of scripts that put no spaces between words: Thai, Lao, Burmese, Khmer, Japanese, Chinese."""
_LETTER = re.compile(f"[{_UNSPACED}]")
_WORD = re.compile(rf"[{_UNSPACED}]|[^\W{_UNSPACED}]+(?:[.,]\d+)*|[-+*/=%]")
_Words = tuple[str, ...]


class Forbidden:
    """The words of test items, so that nothing is trained on that is tested."""

    def __init__(self, run_words: int) -> None:
        self._run_words, self._fewest = run_words, min(SHORTEST_RUN, run_words)
        self._short: set[_Words] = set()
        # What follows each place of an item, `run_words` at most, sorted: a run of any length begins one of them.
        self._following: list[_Words] = []

    def add(self, texts: Iterable[str]) -> None:
        """More test items; they are sorted anew, so many at once are added sooner than one by one."""
        following = set(self._following)
        for text in texts:
            words = _words(text)
            if len(words) < self._run_words:
                self._short.add(words)
            following.update(words[start : start + self._run_words] for start in range(len(words) - self._fewest + 1))
        self._following = sorted(following)

    def holds(self, question: str, answer: str = "") -> bool:
        """Whether a question, read with its answer as one text, has the words of a test item.

        That is so if the text has a run of `run_words` words in common with an item; if all of an item stands in it
        that has fewer; or if all of the question stands in an item, where the question has fewer. Items and questions
        of fewer than `SHORTEST_RUN` words must be the same.
        """
        asked = _words(question)
        if asked in self._short or (self._fewest <= len(asked) < self._run_words and self._has(asked)):
            return True
        words = asked + _words(answer)
        if any(self._has(run) for run in runs(words, self._run_words)):
            return True
        lengths = range(self._fewest, self._run_words)
        return any(not self._short.isdisjoint(runs(words, length)) for length in lengths)

    def _has(self, run: _Words) -> bool:
        """Whether an item has the run."""
        place = bisect_left(self._following, run)
        return place < len(self._following) and self._following[place][: len(run)] == run


def _words(text: str) -> _Words:
    """Words and numbers without capitals and punctuation; signs of arithmetic are words, and letters without spaces."""
    return tuple(_WORD.findall(text.casefold()))


def is_question(text: str) -> bool:
    """Whether a line has the form of a question: a few words, or letters without spaces, and the mark at their end."""
    return text.endswith(("?", "？")) and max(len(text.split()), len(_LETTER.findall(text))) >= FEWEST_WORDS  # noqa: RUF001


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
        is_tested = self.forbidden.holds(pair.question, pair.answer)
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
        if self.forbidden.holds(question, answer):
            return "in a test"
        return "not from the page" if pair.text and self._shared(pair) < self.overlap else ""

    def _shared(self, pair: Pair) -> float:
        """Of the answer's words, those that the text has that its writer saw."""
        words, there = _words(pair.answer), set(_words(pair.text))
        return sum(word in there for word in words) / len(words) if words else 0.0
