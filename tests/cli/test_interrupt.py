"""Ctrl-C: a checkpoint, exit 130, and the command that goes on."""

from __future__ import annotations

import shlex
import signal
from pathlib import Path

import pytest

from command import overhaul, python
from overhaul import artifact

TRAIN = ["--data", "sample", "--steps", "5", "--seq-len", "32", "--batch-size", "2", "--save-every", "0"]
QUICK = ["--evaluate", "none", "--dtype", "fp32"]

CTRL_C_IN_STEP_2 = """
import os, signal, sys
from overhaul import cli, train
step = train._Run.step
def interrupted(run, number):
    if number == 2:
        os.kill(os.getpid(), signal.SIGINT)
    return step(run, number)
train._Run.step = interrupted
cli.main(sys.argv[1:])
"""


def test_ctrl_c_while_training_writes_a_checkpoint_and_the_command_that_goes_on(tiny: Path, tmp_path: Path):
    command = ["adapt", "full", str(tiny), "-o", str(tmp_path / "stopped"), *TRAIN, *QUICK]

    done = python(CTRL_C_IN_STEP_2, *command)

    assert done.code == 130
    assert "Traceback" not in done.err
    assert "stopped after step 2 of 5" in done.err
    assert [path.name for path in (tmp_path / "stopped" / ".state").iterdir()] == ["step-000002"]

    goes_on = shlex.split(done.err.strip().splitlines()[-1])
    assert goes_on == ["overhaul", *command, "--resume"]
    assert overhaul(*goes_on[1:]).code == 0
    assert overhaul("adapt", "full", tiny, "-o", tmp_path / "whole", *TRAIN, *QUICK).code == 0
    stopped, whole = (tmp_path / name / "model.safetensors" for name in ("stopped", "whole"))
    assert stopped.read_bytes() == whole.read_bytes()


def test_a_second_ctrl_c_does_not_wait_for_the_step(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from overhaul import train

    def impatient(*_: object) -> None:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(train._Run, "step", impatient)
    before = signal.getsignal(signal.SIGINT)
    done = overhaul("adapt", "full", tiny, "-o", tmp_path / "out", *TRAIN, *QUICK)

    assert done.code == 130
    assert list(tmp_path.iterdir()) == []
    assert signal.getsignal(signal.SIGINT) == before


def test_ctrl_c_before_the_work_leaves_nothing(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(artifact, "load", stop)
    done = overhaul("prune", "magnitude", tiny, "-o", tmp_path / "out")

    assert done.code == 130
    assert "stopped" in done.err
    assert "Traceback" not in done.err
    assert list(tmp_path.iterdir()) == []


STAGES = {
    "reconstruct": ["perp", "--reconstruct", "--granularity", "attn_mlp", "--samples", "4"],
    "rounds": ["hft", "--rounds", "3"],
    "moments": ["hft", "--rounds", "3", "--keep-moments"],
    "soft": ["hft", "--rounds", "3", "--soft", "0.1", "--clip", "0"],
}


@pytest.mark.parametrize("method", STAGES)
@pytest.mark.parametrize("at", [5, 8, 11])
def test_ctrl_c_in_any_stage_resumes_to_the_same_bytes(
    method: str, at: int, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Stages of four steps: the interruption comes early, at the end of a stage, and when one is done already."""
    from overhaul import train

    assert overhaul("prune", "magnitude", tiny, "-o", tmp_path / "half", *QUICK).code == 0
    name, *flags = STAGES[method]
    words = ["adapt", name, tmp_path / "half", *flags, "--data", "sample", "--steps", "4", "--seq-len", "32",
             "--batch-size", "2", "--save-every", "2", *QUICK]  # fmt: skip
    assert overhaul(*words, "-o", tmp_path / "whole").code == 0
    step, done = train._Run.step, []

    def interrupted(run: train._Run, number: int) -> dict[str, object]:
        done.append(number)
        if len(done) == at:
            signal.raise_signal(signal.SIGINT)
        return step(run, number)

    monkeypatch.setattr(train._Run, "step", interrupted)
    stopped = overhaul(*words, "-o", tmp_path / "out")
    assert stopped.code == 130
    assert "--resume" in stopped.err
    resumed = overhaul(*words, "-o", tmp_path / "out", "--resume")

    assert resumed.code == 0, resumed.err
    whole, out = tmp_path / "whole", tmp_path / "out"
    assert len(done) == len((whole / "metrics.jsonl").read_text().splitlines()), "no step was taken twice"
    assert (out / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
