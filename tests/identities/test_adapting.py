"""Settings at which a way to adapt is another one, to the last bit or up to rounding."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from command import overhaul

SHORT = ("--data", "sample", "--steps", "3", "--batch-size", "2", "--seq-len", "32", "--evaluate", "none",
         "--save-every", "0", "--dtype", "fp32")  # fmt: skip


@pytest.fixture(scope="module")
def half(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("half") / "half"
    assert overhaul("prune", "magnitude", tiny, "-o", out, "--evaluate", "none").code == 0
    return out


def weights(out: Path) -> dict[str, torch.Tensor]:
    return load_file(out / "model.safetensors")


def test_perp_of_everything_is_full_training_with_the_zeros_kept(half: Path, tmp_path: Path):
    for method, flags in (("perp", ("--train", "full")), ("full", ())):
        done = overhaul("adapt", method, half, "-o", tmp_path / method, *SHORT, "--lr", "1e-3", *flags)
        assert done.code == 0, done.err

    assert_equal(weights(tmp_path / "perp"), weights(tmp_path / "full"))


def test_half_fine_tuning_of_everything_is_full_training_with_the_zeros_kept(half: Path, tmp_path: Path):
    for method, flags in (("hft", ("--share", "1")), ("full", ())):
        done = overhaul("adapt", method, half, "-o", tmp_path / method, *SHORT, "--weight-decay", "0.1", *flags)
        assert done.code == 0, done.err

    assert_equal(weights(tmp_path / "hft"), weights(tmp_path / "full"))


@pytest.mark.parametrize("group", ["norms", "mask_lora"])
def test_perp_changes_nothing_but_what_it_trains(half: Path, tmp_path: Path, group: str):
    done = overhaul("adapt", "perp", half, "-o", tmp_path / "out", *SHORT, "--train", group)
    assert done.code == 0, done.err

    before, after = weights(half), weights(tmp_path / "out")
    for name, tensor in before.items():
        trained = ("norm" in name) if group == "norms" else name.endswith("_proj.weight")
        assert torch.equal(tensor, after[name]) != trained, name


def test_dropping_the_zeros_gives_a_dense_model(half: Path, tmp_path: Path):
    done = overhaul("adapt", "full", half, "-o", tmp_path / "out", *SHORT, "--lr", "1e-3", "--no-keep-zeros")
    assert done.code == 0, done.err

    assert not (tmp_path / "out" / "masks.safetensors").exists()
    regrown = weights(tmp_path / "out")["model.layers.0.mlp.up_proj.weight"]
    assert int((regrown == 0).sum()) < regrown.numel() // 100


def assert_equal(one: dict[str, Any], other: dict[str, Any]) -> None:
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert torch.equal(tensor, other[name]), name
