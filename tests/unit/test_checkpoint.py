"""A checkpoint is whole or not there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from overhaul import checkpoint
from overhaul.errors import UserError


def save(root: Path, step: int, *, model: nn.Module | None = None, keep: int = 2, **asked: Any) -> None:
    tensors = checkpoint.trained_tensors(model or nn.Linear(2, 2))
    checkpoint.write(root, step, tensors=tensors, state={"step": step}, asked=asked, keep=keep)


def names(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir())


def test_tensors_and_state_come_back(tmp_path: Path):
    written, read = nn.Linear(2, 2), nn.Linear(2, 2)
    save(tmp_path, 7, model=written)

    newest = checkpoint.newest(tmp_path)

    assert newest is not None
    assert newest.step == 7
    assert checkpoint.read(newest, read) == {"step": 7}
    assert torch.equal(read.weight, written.weight)


def test_frozen_parameters_are_not_stored_and_buffers_are():
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    model[0].requires_grad_(False)

    assert checkpoint.trained_tensors(model).keys() == {
        "1.weight",
        "1.bias",
        "1.running_mean",
        "1.running_var",
        "1.num_batches_tracked",
    }


def test_the_newest_are_kept_and_what_is_not_ours_stays(tmp_path: Path):
    (tmp_path / "step-by-step.txt").write_text("a user's notes")
    (tmp_path / "step-000000").mkdir()

    for step in (1, 2, 3, 10):
        save(tmp_path, step)

    assert names(tmp_path) == ["step-000000", "step-000003", "step-000010", "step-by-step.txt"]


def test_a_partial_write_is_never_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    save(tmp_path, 1)

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", interrupted)
    with pytest.raises(KeyboardInterrupt):
        save(tmp_path, 2)
    (tmp_path / ".step-000003.partial-1").mkdir()  # of a process that was killed

    newest = checkpoint.newest(tmp_path)
    assert newest is not None
    assert newest.step == 1


@pytest.mark.parametrize("file", ["model.safetensors", "state.pt"])
@pytest.mark.parametrize("how", ["cut", "flipped", "gone"])
def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(tmp_path: Path, file: str, how: str):
    save(tmp_path, 1)
    save(tmp_path, 2)
    damaged = tmp_path / "step-000002" / file
    content = damaged.read_bytes()
    if how == "gone":
        damaged.unlink()
    else:
        damaged.write_bytes(content[:-9] if how == "cut" else content[:-9] + b"\0" * 8 + b"x")

    newest = checkpoint.newest(tmp_path)

    assert newest is not None
    assert newest.step == 1


def test_a_damaged_manifest_is_passed_over(tmp_path: Path):
    save(tmp_path, 1)
    save(tmp_path, 2)
    (tmp_path / "step-000002" / "manifest.json").write_text('{"step": 2, "as')

    newest = checkpoint.newest(tmp_path)

    assert newest is not None
    assert newest.step == 1


def test_there_is_none(tmp_path: Path):
    assert checkpoint.newest(tmp_path / "nowhere") is None


def test_a_step_written_again_replaces_the_first(tmp_path: Path):
    save(tmp_path, 1, lr=1)
    save(tmp_path, 1, lr=2)

    manifest = json.loads((tmp_path / "step-000001" / "manifest.json").read_text())
    assert manifest["asked"] == {"lr": 2}


def test_other_settings_are_refused_with_every_difference(tmp_path: Path):
    save(tmp_path, 1, lr=0.1, seed=0, keep_every=5)
    newest = checkpoint.newest(tmp_path)
    assert newest is not None

    checkpoint.refuse_changes(newest, {"lr": 0.1, "seed": 0, "keep_every": 9}, free=("keep_every",))
    with pytest.raises(UserError) as caught:
        checkpoint.refuse_changes(newest, {"lr": 0.2, "seed": 1, "keep_every": 5}, free=("keep_every",))

    assert "lr: 0.1 then, 0.2 now; seed: 0 then, 1 now" in str(caught.value)
    assert "changes of keep_every" in str(caught.value)


def test_a_model_that_trains_other_tensors_is_refused(tmp_path: Path):
    save(tmp_path, 1)
    newest = checkpoint.newest(tmp_path)
    assert newest is not None

    with pytest.raises(UserError, match="other tensors"):
        checkpoint.read(newest, nn.Linear(2, 2, bias=False))
