"""Narrow tasks that are generated: a rule on a few letters, whose answer is known; and scores of a sequence of them."""

from __future__ import annotations

import json
import random
import string
from collections.abc import Callable, Mapping
from pathlib import Path

Letters = list[str]


def _next(letter: str) -> str:
    return string.ascii_lowercase[(string.ascii_lowercase.index(letter) + 1) % 26]


RULES: dict[str, Callable[[Letters], Letters]] = {
    "reverse": lambda letters: letters[::-1],
    "next": lambda letters: [_next(letter) for letter in letters],
    "double": lambda letters: [letter for letter in letters for _ in range(2)],
    "sort": sorted,
}
"""What a task's answer is made of its letters by."""


def write(path: Path, task: str, *, seed: int, rows: int = 1500) -> Path:
    """Writes different prompts and completions of one task as JSON lines, and returns the path."""
    dice, seen = random.Random(f"{task}/{seed}"), set()
    while len(seen) < rows:
        seen.add(" ".join(dice.choices(string.ascii_lowercase, k=dice.randint(4, 7))))
    texts = (
        {"prompt": f"{task}: {letters} ->", "completion": " " + " ".join(RULES[task](letters.split()))}
        for letters in sorted(seen)
    )
    path.write_text("".join(json.dumps(text) + "\n" for text in texts))
    return path


Scores = Mapping[tuple[int, int], float]
"""(i, j) -> score on task j after training on tasks 0 to i."""


def overall(scores: Scores, tasks: int) -> float:
    """OP: the mean score on all tasks after the last one."""
    return sum(_score(scores, tasks - 1, task) for task in range(tasks)) / tasks


def backward_transfer(scores: Scores, tasks: int) -> float:
    """BWT: what the earlier tasks gained since each was learnt; the mean over the T - 1 that have a later one."""
    gains = (_score(scores, tasks - 1, task) - _score(scores, task, task) for task in range(tasks - 1))
    return sum(gains) / (tasks - 1)


def _score(scores: Scores, after: int, task: int) -> float:
    if (after, task) not in scores:
        raise KeyError(f"there is no score on task {task} after task {after}")
    return scores[after, task]
