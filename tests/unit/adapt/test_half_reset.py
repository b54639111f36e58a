"""Half-Reset: half of the matrices are the base's to the bit, the others the tuned model's."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from command import overhaul, refused

Make = Callable[..., Path]
QUICK = ("--evaluate", "none", "--dtype", "fp32")


@pytest.fixture(scope="module")
def tuned(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("tuned") / "tuned"
    how = ("--data", "sample", "--steps", "2", "--seq-len", "32", "--batch-size", "2", "--lr", "1e-2")
    assert overhaul("adapt", "full", tiny, "-o", out, *how, *QUICK).code == 0
    return out


def reset(tuned: Path, base: Path, out: Path, *flags: str) -> Path:
    done = overhaul("adapt", "half-reset", tuned, "--base", base, "-o", out, *QUICK, *flags)
    assert done.code == 0, done.err
    return out


def from_base(out: Path, tuned: Path, base: Path) -> set[str]:
    """The names of the tensors that are the base's; all others must be the tuned model's."""
    made, ours, theirs = (load_file(path / "model.safetensors") for path in (out, tuned, base))
    back = {name for name, tensor in made.items() if torch.equal(tensor, theirs[name])}
    assert all(torch.equal(made[name], ours[name]) for name in made.keys() - back)
    return back


def test_half_of_each_kind_is_the_bases(tiny: Path, tuned: Path, tmp_path: Path):
    back = from_base(reset(tuned, tiny, tmp_path / "out"), tuned, tiny)

    counts = Counter("norm" if "norm" in name else name.split(".")[3] for name in back if ".layers." in name)
    assert counts == {"self_attn": 4, "mlp": 3, "norm": 2}
    assert all(".layers." in name for name in back)


def test_what_lies_outside_of_the_blocks_is_put_back_when_it_is_named(tiny: Path, tuned: Path, tmp_path: Path):
    flags = ("--share", "1", "--reset-embeddings", "--reset-final-norm")
    back = from_base(reset(tuned, tiny, tmp_path / "out", *flags), tuned, tiny)

    assert back == load_file(tiny / "model.safetensors").keys()


def test_another_seed_puts_another_half_back(tiny: Path, tuned: Path, tmp_path: Path):
    halves = [from_base(reset(tuned, tiny, tmp_path / seed, "--seed", seed), tuned, tiny) for seed in ("1", "2")]

    assert halves[0] != halves[1]


def test_pruned_weights_stay_zero(tiny: Path, tmp_path: Path):
    half = tmp_path / "half"
    assert overhaul("prune", "magnitude", tiny, "-o", half, *QUICK).code == 0
    out = reset(half, tiny, tmp_path / "out")

    assert (out / "masks.safetensors").is_file()
    assert from_base(out, half, tiny) >= {"model.norm.weight"}
    pruned, made = load_file(half / "model.safetensors"), load_file(out / "model.safetensors")
    assert all(((made[name] == 0) == (pruned[name] == 0)).all() for name in pruned if name.endswith("_proj.weight"))


def test_a_base_of_another_shape_is_refused(make_tiny: Make, tuned: Path, tmp_path: Path):
    other = make_tiny(architecture="llama-ungrouped")
    done = overhaul("adapt", "half-reset", tuned, "--base", other, "-o", tmp_path / "out", *QUICK)

    refused(done, "k_proj.weight is (64, 64), but (32, 64) in the tuned model")
    assert not list(tmp_path.iterdir())


def test_a_base_of_another_family_is_refused(make_tiny: Make, tuned: Path, tmp_path: Path):
    done = overhaul("adapt", "half-reset", tuned, "--base", make_tiny(architecture="opt"), "-o", tmp_path / "o", *QUICK)

    refused(done, "not there")


def test_a_quantized_base_is_refused(tiny: Path, tuned: Path, tmp_path: Path):
    assert overhaul("quantize", "int8", tiny, "-o", tmp_path / "int8", *QUICK).code == 0
    done = overhaul("adapt", "half-reset", tuned, "--base", tmp_path / "int8", "-o", tmp_path / "out", *QUICK)

    refused(done, "no directory of whole weights")


def test_a_base_is_needed(tuned: Path, tmp_path: Path):
    done = overhaul("adapt", "half-reset", tuned, "-o", tmp_path / "out", *QUICK)

    assert done.code == 2
    assert "--base" in done.told
