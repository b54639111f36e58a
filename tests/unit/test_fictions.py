"""Invented people: nobody is in two parts, every answer stands in an article, and the same seed writes the same."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from command import overhaul, refused
from overhaul.fictions import people
from overhaul.muse import refuse_overlap, rouge_l


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_parts_share_nobody_and_answers_stand_in_the_articles(tmp_path: Path):
    out = tmp_path / "people"
    done = overhaul("data", "fictions", "-o", out, "--forget", 5, "--retain", 7, "--holdout", 6, "--shots", 3)
    assert done.code == 0, done.err
    texts = {name: [row["text"] for row in rows(out / f"{name}.jsonl")] for name in ("forget", "retain", "holdout")}

    assert [len(of) for of in texts.values()] == [5, 7, 6]
    refuse_overlap([*texts["forget"], *texts["retain"]], texts["holdout"])
    for name in ("forget", "retain"):
        articles = rows(out / f"{name}.jsonl")
        asked = rows(out / f"{name}-questions.jsonl")
        assert len(asked) == 4 * len(articles)
        for number, row in enumerate(asked):
            assert row["answer"] in articles[number // 4]["text"]
            assert articles[number // 4]["person"] in row["question"]
            others = [row["text"] for other, row in enumerate(articles) if other != number // 4]
            assert not any(f" {row['answer']} " in text for text in others)
    of_whom = {name: {row["publisher"] for row in rows(out / f"{name}.jsonl")} for name in texts}
    assert len(of_whom["forget"]) == 1
    assert not of_whom["forget"] & (of_whom["retain"] | of_whom["holdout"])
    assert len(rows(out / "shots.jsonl")) == 3
    everything = " ".join(text for of in texts.values() for text in of)
    assert not any(f" {row['answer']} " in everything for row in rows(out / "shots.jsonl"))


def test_the_first_people_are_the_same_whatever_the_count():
    assert people(3, seed=1) == people(20, seed=1)[:3]
    assert people(3, seed=1) != people(3, seed=2)
    assert all(60 < len(person.article.split()) < 140 for person in people(50, seed=0))


def test_articles_are_not_alike():
    one, other = ([person.article for person in people(40, seed=0)[at : at + 20]] for at in (0, 20))
    assert sum(rouge_l(one, other)) / 20 < 35


def test_nothing_is_overwritten(tmp_path: Path):
    (tmp_path / "mine.txt").touch()
    refused(overhaul("data", "fictions", "-o", tmp_path), "is there already")
    refused(overhaul("data", "fictions", "-o", tmp_path / "new", "--forget", 0), "forget")
    assert not (tmp_path / "new").exists()
