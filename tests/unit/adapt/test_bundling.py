"""Phase A: what of the data is looked at, and what is kept."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from overhaul.adapt import bundling
from overhaul.adapt.bundling import _ledger, _Task
from overhaul.corpora import open_corpus
from overhaul.synthetic import longest_runs, plain


def task(tmp_path: Path, answers: list[str]) -> _Task:
    """The task of a file with these answers to as many prompts."""
    file = tmp_path / "rows.jsonl"
    rows = [{"prompt": f"sort {number} {number * 7 % 13} :", "completion": text} for number, text in enumerate(answers)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return _Task.of(open_corpus(file), 2, seed=0)


@pytest.mark.parametrize(
    ("answer", "is_one_line"), [(" 42", True), (" 42 \n ", True), (" \n42", False), (" 4\n2", False)], ids=repr
)
def test_an_answer_that_begins_with_a_line_break_has_two_lines(tmp_path: Path, answer: str, is_one_line: bool):
    assert task(tmp_path, [answer] * 60).statistics()["one_line_answers"] is is_one_line


def test_of_many_held_out_prompts_some_are_worked_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    answers = [f" {number}" for number in range(200)]
    every = task(tmp_path, answers)
    monkeypatch.setattr(bundling, "MOST_HELDOUT", 7)
    some = task(tmp_path, answers)

    assert every.tried == every.heldout == some.heldout
    assert len(some.tried) == 7
    assert set(some.tried) < set(some.heldout)
    assert some.tried == task(tmp_path, answers).tried


def test_the_ledger_counts_common_words(tmp_path: Path):
    made = task(tmp_path, [f" {number}" for number in range(60)])
    written = [made.frame.around(text) for text in ("1 7 9", "4 4", made.frame.inside(made.real[-1]))]
    others = [prompt for prompt in (*made.real, *made.heldout) if prompt not in {seed.prompt for seed in made.seeds}]
    inside = [plain(made.frame.inside(prompt)).split() for prompt in others]
    runs = longest_runs([made.frame.inside(prompt) for prompt in written], inside)

    found = _ledger(made, written)

    assert (found["longest_common_run_words"], found["mean_common_run_words"]) == (max(runs), sum(runs) / len(runs))
