from __future__ import annotations

import pytest

from overhaul import progress
from overhaul.progress import Bar


def test_without_a_terminal_the_last_step_is_one_plain_line_on_stderr(capsys: pytest.CaptureFixture[str]):
    with Bar("training", 3) as bar:
        for _ in range(3):
            bar.step("loss 2.31")

    out, err = capsys.readouterr()
    assert out == ""
    assert err == "training 3/3  loss 2.31  0 s left\n"


def test_lines_come_every_few_seconds(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    now = iter(range(0, 1000, 4))
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(now))

    with Bar("pruning", 6) as bar:
        for _ in range(6):
            bar.step()

    assert [line.split()[1] for line in capsys.readouterr().err.splitlines()] == ["3/6", "6/6"]


def test_a_resumed_bar_counts_on(capsys: pytest.CaptureFixture[str]):
    with Bar("training", 5, done=4) as bar:
        bar.step()

    assert "5/5" in capsys.readouterr().err


def test_quiet_says_nothing(capsys: pytest.CaptureFixture[str]):
    with Bar("training", 1, quiet=True) as bar:
        bar.step()

    assert capsys.readouterr().err == ""


def test_brackets_are_text_not_markup(capsys: pytest.CaptureFixture[str]):
    progress.say("[bold]1[/bold] [x]")

    assert capsys.readouterr().err == "[bold]1[/bold] [x]\n"
