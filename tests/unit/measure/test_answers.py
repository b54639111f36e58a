"""Exact match of answers that a model writes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from command import overhaul, refused
from overhaul import artifact
from overhaul.evaluate import generate, wilson_interval

QUESTIONS = [f"What is {a} + {b}?" for a in range(2, 8) for b in range(2, 5)]


def table(path: Path, rows: list[tuple[str, str]]) -> Path:
    path.write_text("".join(json.dumps({"question": q, "answer": a}) + "\n" for q, a in rows))
    return path


@pytest.fixture(scope="module")
def said(make_tiny: Any) -> dict[str, str]:
    """What the model says to each question, one by one, on the first line."""
    made = artifact.load(make_tiny(tie=False))
    texts = {q: generate(made.model, made.processor, f"{q}\n", tokens=8).split("\n")[0] for q in QUESTIONS}
    assert all(any(letter.isalnum() for letter in text) for text in texts.values())
    return texts


def test_a_share_of_the_answers_is_right_and_the_interval_is_wilsons(
    said: dict[str, str], make_tiny: Any, tmp_path: Path
):
    rows = [(q, text if number % 3 == 0 else "no such answer") for number, (q, text) in enumerate(said.items())]
    task = table(tmp_path / "sums.jsonl", rows)

    done = overhaul(
        "measure", "answers", make_tiny(tie=False), "--task", task, "--tokens", 8, "--dtype", "fp32", "--json"
    )

    told = json.loads(done.out)
    (row,) = told["rows"]
    assert (row["metric"], row["count"]) == ("exact match/sums", 18)
    assert row["value"] == pytest.approx(6 / 18)
    assert (row["low"], row["high"]) == pytest.approx(wilson_interval(6, 18))
    assert {detail["question"]: detail["answer"] for detail in told["details"]} == said
    assert sum(detail["right"] for detail in told["details"]) == 6


def test_of_an_answer_with_several_lines_all_counts(said: dict[str, str], make_tiny: Any, tmp_path: Path):
    task = table(tmp_path / "poem.jsonl", [(q, f"{text.strip()}\nand no such line") for q, text in said.items()])

    done = overhaul(
        "measure", "answers", make_tiny(tie=False), "--task", task, "--tokens", 8, "--dtype", "fp32", "--json"
    )

    assert [row["value"] for row in json.loads(done.out)["rows"]] == [0.0]


def test_a_smaller_limit_asks_some_of_the_same_questions(tiny: Path, tmp_path: Path):
    task = table(tmp_path / "sums.jsonl", [(q, "5") for q in QUESTIONS])

    def asked(limit: int, seed: int = 0) -> set[str]:
        how = ("--limit", limit, "--seed", seed, "--tokens", 2, "--json")
        done = overhaul("measure", "answers", tiny, "--task", task, *how)
        return {detail["question"] for detail in json.loads(done.out)["details"]}

    assert len(asked(3)) == 3
    assert asked(3) < asked(6)
    assert asked(6) != asked(6, seed=1)


def test_tables_of_one_name_are_told_apart(tiny: Path, tmp_path: Path):
    tasks = []
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        tasks.append(table(tmp_path / folder / "sums.jsonl", [("What is 2 + 2?", "4")]))

    done = overhaul("measure", "answers", tiny, "--task", *tasks, "--json")

    assert [row["metric"] for row in json.loads(done.out)["rows"]] == [f"exact match/{task}" for task in tasks]


def test_mistakes(tiny: Path, tmp_path: Path):
    (tmp_path / "text.jsonl").write_text('{"text": "no question"}')
    long = table(tmp_path / "long.jsonl", [("What is it? " * 200, "4")])

    refused(overhaul("measure", "answers", tiny, "--task", tmp_path / "nowhere.jsonl"), "nowhere.jsonl is no file")
    refused(overhaul("measure", "answers", tiny, "--task"), "name at least one table")
    refused(overhaul("measure", "answers", tiny, "--task", tmp_path / "text.jsonl"), "has no question and no answer")
    refused(overhaul("measure", "answers", tiny, "--task", long), "reads 512 tokens")
