"""The tasks of the bench: answers by hand, and the scores of a sequence."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from bench import tasks


@pytest.mark.parametrize(("task", "answer"), [
    ("reverse", "z c a"), ("next", "b d a"), ("double", "a a c c z z"), ("sort", "a c z"),
])  # fmt: skip
def test_an_answer_follows_the_rule(task: str, answer: str):
    assert " ".join(tasks.RULES[task](["a", "c", "z"])) == answer


def test_rows_differ_and_follow_from_the_seed(tmp_path: Path):
    texts = [tasks.write(tmp_path / name, "sort", seed=seed, rows=50).read_text() for name, seed in
             (("a", 1), ("b", 1), ("c", 2))]  # fmt: skip

    assert texts[0] == texts[1] != texts[2]
    assert len({json.loads(line)["prompt"] for line in texts[0].splitlines()}) == 50


SCORES = {(0, 0): 0.9, (1, 0): 0.7, (1, 1): 0.8, (2, 0): 0.5, (2, 1): 0.9, (2, 2): 0.7}


def test_the_scores_of_a_sequence():
    assert tasks.overall(SCORES, 3) == pytest.approx(0.7)
    assert tasks.backward_transfer(SCORES, 3) == pytest.approx((-0.4 + 0.1) / 2)


def test_a_missing_score_is_named():
    with pytest.raises(KeyError, match="no score on task 1 after task 1"):
        tasks.backward_transfer({key: value for key, value in SCORES.items() if key != (1, 1)}, 3)
