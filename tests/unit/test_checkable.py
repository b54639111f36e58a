"""The generated tasks that stand in for private data: answers are right, prompts differ, nothing is repeated."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from bench import checkable


@pytest.mark.parametrize("task", checkable.TASKS)
def test_answers_are_those_of_the_checker_and_prompts_differ(task: str, tmp_path: Path):
    rows = checkable.examples(task, 60, seed=1)
    more = checkable.examples(task, 60, seed=1, without=frozenset(prompt for prompt, _ in rows))

    assert all(checkable.answer(task, prompt) == completion.strip() for prompt, completion in rows)
    assert len({prompt for prompt, _ in (*rows, *more)}) == 120
    stored = [json.loads(line) for line in checkable.write(tmp_path / "rows.jsonl", rows).read_text().splitlines()]
    assert [(row["prompt"], row["completion"]) for row in stored] == rows


@pytest.mark.parametrize(
    ("task", "prompt", "answer"),
    [
        ("boolean", "not ( True and False ) =", "True"),
        ("boolean", "None or True =", None),
        ("boolean", "True True =", None),
        ("sorting", "sort 10 9 :", "9 10"),
        ("sorting", "sort a 9 :", None),
        ("units", "3 weeks in days :", "21 days"),
        ("boolean", "(True)and False =", "False"),
        ("units", "3 weeks in hours :", None),
        ("units", "3 weeks", None),
    ],
)
def test_prompts_that_others_wrote(task: str, prompt: str, answer: str | None):
    assert checkable.answer(task, prompt) == answer
