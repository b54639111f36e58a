"""Prompts that a model writes after a few examples: the text that asks for them, and which of them to keep.

Nothing here computes with tensors: prompts in, prompts out.
"""

from __future__ import annotations

import math
import random
import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

LEAD = "Example: "
"""What stands before each example. Small base models go on with a list more readily than they follow an instruction."""
NEARLY = 0.8
"""From this share of common word sequences on, two prompts count as one."""
WORDS = 5
"""Of such a sequence; of shorter prompts only equal ones are the same."""


@dataclass(frozen=True, slots=True)
class Frame:
    """What all prompts of a task begin and end with, so that only what is between has to be written.

    Attributes:
        before, after: of every prompt.
    """

    before: str
    after: str

    @classmethod
    def of(cls, prompts: Sequence[str]) -> Frame:
        """The longest of these prompts, cut back to whole words."""
        before = _common_beginning(prompts)
        before = before[: max(before.rfind(end) for end in " \n") + 1]
        rest = [prompt[len(before) :][::-1] for prompt in prompts]
        after = _common_beginning(rest)[::-1]
        found = re.search(r"\s", after)
        return cls(before, after[found.start() :] if found else "")

    def inside(self, prompt: str) -> str:
        """What is between, on one line; all of a prompt that has another frame."""
        ends = len(prompt) - len(self.after)
        is_framed = ends >= len(self.before) and prompt.startswith(self.before) and prompt.endswith(self.after)
        return _on_one_line(prompt[len(self.before) : ends] if is_framed else prompt)

    def around(self, inside: str) -> str:
        """The prompt with this between."""
        return self.before + _as_it_was(inside) + self.after

    def to_json(self) -> dict[str, Any]:
        """`{"before":, "after":}`."""
        return asdict(self)


def _on_one_line(text: str) -> str:
    r"""A line break as `\n`; backslashes are doubled where one would be read so, and nowhere else, as in `\frac`."""
    return re.sub(r"\\+(?=[n\n])", lambda found: 2 * found[0], text).replace("\n", "\\n")


def _as_it_was(line: str) -> str:
    """The inverse of `_on_one_line`."""

    def read(found: re.Match[str]) -> str:
        pairs, one = divmod(len(found[1]), 2)
        return pairs * "\\" + ("\n" if one else "n")

    return re.sub(r"(\\+)n", read, line)


def _common_beginning(texts: Sequence[str]) -> str:
    first, last = min(texts), max(texts)  # what these two share, all between them in order share
    length = next(
        (place for place, (one, other) in enumerate(zip(first, last, strict=False)) if one != other), len(first)
    )
    return first[:length]


def request(seeds: Sequence[str], frame: Frame, order: random.Random) -> str:
    """A text whose next line would be another prompt of the task: the seeds in an order of their own."""
    lines = [f"{LEAD}{frame.inside(seed)}\n" for seed in order.sample(list(seeds), len(seeds))]
    # No space at the end: it belongs to the word that follows.
    return "".join(lines) + LEAD.rstrip()


def plain(prompt: str) -> str:
    """What two prompts share that differ in capitals and spaces only."""
    return " ".join(prompt.lower().split())


def sequences(text: str, words: int = WORDS) -> frozenset[tuple[str, ...]]:
    """All runs of so many words."""
    return frozenset(runs(plain(text).split(), words))


class NearDuplicates:
    """Texts that were met, and whether another one is nearly one of them: `NEARLY` of their runs of words are the same.

    Exact, and fast where few texts are alike: sets that have so much in common share one of their first few members
    in any order (Bayardo et al., Scaling Up All Pairs Similarity Search, 2007), so only texts found under one of
    those are compared. Sorted, the runs that begin with a number come first, which few texts share.
    """

    def __init__(self) -> None:
        self._runs: list[frozenset[tuple[str, ...]]] = []
        self._places: dict[tuple[str, ...], list[int]] = {}

    def holds(self, text: str) -> bool:
        """Whether one of the texts is nearly this one; never, where this has fewer than `WORDS` words."""
        own = sequences(text)
        near = dict.fromkeys(place for run in _first(own) for place in self._places.get(run, ()))
        return any(len(own & self._runs[place]) >= NEARLY * len(own | self._runs[place]) for place in near)

    def add(self, text: str) -> None:
        """One more text that was met."""
        own = sequences(text)
        for run in _first(own):
            self._places.setdefault(run, []).append(len(self._runs))
        self._runs.append(own)


def _first(runs: frozenset[tuple[str, ...]]) -> list[tuple[str, ...]]:
    """So many, in order, that of `NEARLY` of the runs one must be among them."""
    enough = math.ceil(NEARLY * len(runs) - 1e-9)
    return sorted(runs)[: len(runs) - enough + 1] if runs else []


class Sieve:
    """Lets a prompt through that is not empty, not too long, and unlike the seeds and all before it.

    Attributes:
        seen: how many were looked at.
        dropped: why how many were not let through.
    """

    def __init__(self, seeds: Iterable[str], frame: Frame, longest: int) -> None:
        self.frame, self.longest = frame, longest
        self._seeds = {plain(frame.inside(seed)) for seed in seeds}
        self._known: set[str] = set()
        self._near = NearDuplicates()
        self.seen = 0
        self.dropped = {"empty": 0, "too long": 0, "a seed": 0, "met before": 0}

    def __call__(self, written: str) -> str | None:
        """The prompt that a line makes, or None."""
        self.seen += 1
        inside = written.strip()
        why = self._why_not(inside)
        if why:
            self.dropped[why] += 1
            return None
        self._known.add(plain(inside))
        self._near.add(inside)
        return self.frame.around(inside)

    @property
    def unique_share(self) -> float:
        """Of the candidates that could be read, those that were new."""
        read = self.seen - self.dropped["empty"] - self.dropped["too long"]
        return 1 - (self.dropped["a seed"] + self.dropped["met before"]) / read if read else 0.0

    def _why_not(self, inside: str) -> str:
        name = plain(inside)
        if not name:
            return "empty"
        if len(inside) > self.longest:
            return "too long"
        if name in self._seeds:
            return "a seed"
        return "met before" if name in self._known or self._near.holds(inside) else ""


def longest_runs(texts: Sequence[str], others: Iterable[Sequence[str]]) -> list[int]:
    """Words of the longest run that each text has in common with any of the others, which are lists of words.

    Runs grow by a word at a time, and only those others are looked at again that had a run of the length before.
    """
    words, rest = [plain(text).split() for text in texts], list(others)
    best = [0] * len(words)
    for length in range(1, max(map(len, words), default=0) + 1):
        own = [runs(one, length) if best[place] == length - 1 else set() for place, one in enumerate(words)]
        wanted = set().union(*own)
        met = [(other, common) for other in rest if (common := wanted.intersection(runs(other, length)))]
        rest, shared = [other for other, _ in met], set().union(*(common for _, common in met))
        if not shared:
            break
        best = [length if shared & runs else before for before, runs in zip(best, own, strict=True)]
    return best


def runs(words: Sequence[str], length: int) -> set[tuple[str, ...]]:
    """All runs of so many words in a list of them."""
    return {tuple(words[start : start + length]) for start in range(len(words) - length + 1)}


def likeness(text: str, seeds: Sequence[str], words: int = 2) -> float:
    """Share of the text's pairs of words that the seed most like it has too."""
    own = sequences(text, words)
    return max((len(own & sequences(seed, words)) / len(own) for seed in seeds), default=0.0) if own else 0.0


def distinct_share(texts: Sequence[str], words: int = 2) -> float:
    """Of all pairs of words in these texts, those that are unlike each other."""
    runs = [
        tuple(found[start : start + words])
        for found in (plain(text).split() for text in texts)
        for start in range(len(found) - words + 1)
    ]
    return len(set(runs)) / len(runs) if runs else 0.0
