"""The commands about text, as they are typed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from command import overhaul, python, refused


def test_questions_are_written_measured_and_trained_on(tiny: Path, tmp_path: Path):
    out = tmp_path / "new" / "sums.jsonl"
    done = overhaul("data", "questions", "-o", out, "--kinds", "arithmetic", "--count", 300, "--heldout", 20)
    assert done.code == 0, done.err
    assert "300 pairs" in done.out

    test = out.with_suffix(".heldout.jsonl")
    measured = overhaul("measure", "answers", tiny, "--task", test, "--tokens", 2, "--json")
    (row,) = json.loads(measured.out)["rows"]
    assert (row["metric"], row["count"]) == ("exact match/sums.heldout", 20)

    how = ("--data", out, "--steps", 1, "--seq-len", 64, "--batch-size", 1, "--evaluate", "none")
    trained = overhaul("adapt", "full", tiny, "-o", tmp_path / "trained", *how)
    assert trained.code == 0, trained.err

    refused(overhaul("data", "questions", "-o", out), "sums.jsonl exists")


def test_a_model_that_writes_no_question_is_refused_with_the_counts(tiny: Path, tmp_path: Path):
    words = ("--generator", tiny, "--seeds", "sample", "--count", 5, "--tokens", 8, "--page-words", 8)

    done = overhaul("data", "questions", "-o", tmp_path / "q.jsonl", *words)

    assert done.code == 2
    assert "wrote too little that is of use: of 32," in done.told
    assert "at most 90% dropped (--most-dropped)" in done.told
    assert list(tmp_path.iterdir()) == []


def test_the_ledger_can_be_read_from_stdout(tmp_path: Path):
    done = overhaul("data", "questions", "-o", tmp_path / "q.jsonl", "--count", 5, "--json")

    assert json.loads(done.out) == json.loads((tmp_path / "q.json").read_text())


def test_topics_are_written(tiny: Path, tmp_path: Path):
    rows = [{"text": f"{word} {n} {word}", "topic": word} for word in ("sea", "law") for n in range(10)]
    (tmp_path / "labels.jsonl").write_text("\n".join(map(json.dumps, rows)))
    words = ("--labels", tmp_path / "labels.jsonl", "--model", tiny, "--tokens", 16)

    done = overhaul("data", "topics", "sample", *words, "-o", tmp_path / "out")

    assert done.code == 0, done.err
    assert done.out.startswith("accuracy ")
    told = json.loads((tmp_path / "out" / "topics.json").read_text())
    assert sum(topic["rows"] for topic in told["topics"].values()) == told["corpus"]["rows"] >= 28
    refused(overhaul("data", "topics", "sample", *words, "-o", tmp_path / "out"), "out exists")


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["qestions"], "did you mean 'questions'?"),
        ([], "data list, data preview, data questions, data topics"),
        (["questions", "-o", "q.jsonl", "--kinds", "sums"], "arithmetic, units, definitions"),
        (["questions", "-o", "q.jsonl", "--most-dropped", "1"], "most_dropped"),
    ],
    ids=str,
)
def test_mistakes(words: list[str], says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)

    refused(overhaul("data", *words), says)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("command", ["questions", "topics"])
def test_help_is_instant(command: str):
    code = "import sys\nfrom overhaul.cli import main\n"
    code += "try:\n main(sys.argv[1:])\nfinally:\n assert 'torch' not in sys.modules"

    done = python(code, "data", command, "--help")

    assert done.code == 0, done.err
    assert "--seed" in done.out
