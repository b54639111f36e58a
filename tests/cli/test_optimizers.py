"""`--optimizer` and `--per-layer` as typed, with every method that trains: made again, killed and resumed, refused."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from command import killed_at_the_third_step, overhaul, refused

TRAIN = ["--data", "sample", "--steps", "5", "--seq-len", "32", "--batch-size", "2", "--lr", "1e-3", "--dtype", "fp32"]
TRAIN += ["--evaluate", "none", "--save-every", "1"]
PROJECTED = ["--projection.rank", "8", "--projection.gap", "2"]
RULES = [
    pytest.param(["--optimizer", "galore", *PROJECTED], id="galore"),
    pytest.param(["--optimizer", "fira", *PROJECTED, "--projection.scale", "0.25"], id="fira"),
    pytest.param(["--optimizer", "fira", *PROJECTED, "--projection.subspace", "warm"], id="fira-warm"),
    pytest.param(["--optimizer", "fira", *PROJECTED, "--per-layer", "--clip", "0"], id="fira-per-layer"),
    pytest.param(["--optimizer", "adamw8bit"], id="adamw8bit"),
    pytest.param(["--per-layer", "--clip", "0"], id="adamw-per-layer"),
]


@pytest.fixture(autouse=True)
def _eight_bits(request: pytest.FixtureRequest) -> None:
    if "8bit" in request.node.name:
        pytest.importorskip("bitsandbytes")


@pytest.mark.parametrize("rule", RULES)
def test_a_killed_run_resumes_to_the_same_bytes(rule: list[str], tiny: Path, tmp_path: Path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert overhaul("adapt", "full", tiny, "-o", whole, *TRAIN, *rule).code == 0

    assert killed_at_the_third_step("adapt", "full", tiny, "-o", killed, *TRAIN, *rule) == -signal.SIGKILL
    resumed = overhaul("adapt", "full", tiny, "-o", killed, *TRAIN, *rule, "--resume")

    assert resumed.code == 0, resumed.err
    assert (killed / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()


def test_resuming_with_another_projection_is_refused(tiny: Path, tmp_path: Path):
    words = ["adapt", "full", tiny, "-o", tmp_path / "out", *TRAIN, "--optimizer", "fira"]
    assert killed_at_the_third_step(*words, *PROJECTED) == -signal.SIGKILL

    done = overhaul(*words, "--projection.rank", "4", "--projection.gap", "2", "--resume")

    refused(done, "projection.rank: 8 then, 4 now")


def test_the_recipe_in_the_directory_makes_it_again(tiny: Path, tmp_path: Path):
    out, again = tmp_path / "out", tmp_path / "again"
    assert overhaul("adapt", "full", tiny, "-o", out, *TRAIN, "--optimizer", "fira", *PROJECTED).code == 0
    assert json.loads((out / "overhaul.json").read_text())["lineage"][-1]["fields"]["projection.rank"] == 8

    done = overhaul("run", out / "recipe.yaml", f"out={again}", "evaluate=none", "dtype=fp32")

    assert done.code == 0, done.err
    (made,) = again.iterdir()
    assert (made / "model.safetensors").read_bytes() == (out / "model.safetensors").read_bytes()


@pytest.mark.parametrize("name", ["adapt lora", "adapt perp", "adapt perp --reconstruct", "distill kd"])
def test_every_method_that_trains_takes_it(name: str, tiny: Path, make_tiny: Callable[..., Path], tmp_path: Path):
    verb, method, *more = name.split()
    parent = tiny
    if method == "perp":
        parent, more = tmp_path / "half", [*more, "--train", "full"]
        assert overhaul("prune", "magnitude", tiny, "-o", parent, "--evaluate", "none").code == 0
    if method == "kd":
        more = ["--teacher", str(make_tiny(tie=False, bias=True)), "--states", "embedding", "layers"]
    words = [verb, method, parent, *TRAIN, *more, *PROJECTED]

    rest = [overhaul(*words, "-o", tmp_path / rule, "--optimizer", rule) for rule in ("galore", "fira")]

    assert [done.code for done in rest] == [0, 0], [done.err for done in rest]
    galore, fira = ((tmp_path / rule / "model.safetensors").read_bytes() for rule in ("galore", "fira"))
    assert galore != fira


@pytest.mark.parametrize(
    ("rule", "share"),
    [
        ([], 16),
        (["--per-layer", "--clip", "0"], 12 + 4 * 512 * 64 / 106_816),
        (["--optimizer", "fira", *PROJECTED], 11.5),
        (["--optimizer", "adamw8bit"], 10.2),
    ],
    ids=["adamw", "per-layer", "fira", "adamw8bit"],
)
def test_a_dry_run_knows_what_a_rule_keeps(rule: list[str], share: float, tiny: Path, tmp_path: Path):
    done = overhaul("adapt", "full", tiny, "-o", tmp_path / "out", *TRAIN, *rule, "--dry-run")

    (line,) = [line for line in done.err.splitlines() if line.startswith("trains ")]
    assert float(line.split(": ")[1].removesuffix(" MB of")) == pytest.approx(share * 106_816 / 1e6, abs=0.06), line


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--optimizer", "fira", "--projection.rank", "0"], ["projection.rank = 0", "greater than 0"]),
        (["--optimizer", "fira", "--projection.gap", "0"], ["projection.gap = 0", "greater than 0"]),
        (["--optimizer", "galore", "--projection.rank", "64"], ["nothing to project", "--projection.rank 16"]),
        (["--optimizer", "galore", *PROJECTED, "--projection.scaling", "none"], ["use optimizer fira"]),
        (["--projection.rank", "8"], ["read by optimizer galore and fira, not by adamw"]),
        (["--per-layer"], ["use clip 0"]),
        (["--per-layer", "--clip", "0", "--accumulate", "2"], ["use accumulate 1"]),
    ],
)
def test_mistakes_are_refused(words: list[str], told: list[str], tiny: Path, tmp_path: Path):
    refused(overhaul("adapt", "full", tiny, "-o", tmp_path / "out", *TRAIN, *words), *told)
    assert not (tmp_path / "out").exists()


def test_the_record_and_the_table_say_what_the_optimizer_kept(tiny: Path, tmp_path: Path):
    kept = {}
    for name, rule in {"adamw": [], "fira": ["--optimizer", "fira", *PROJECTED]}.items():
        done = overhaul("adapt", "full", tiny, "-o", tmp_path / name, *TRAIN, *rule)
        assert done.code == 0, done.err
        assert "optimizer state" in done.out
        kept[name] = json.loads((tmp_path / name / "overhaul.json").read_text())["lineage"][-1]["optimizer_bytes"]

    matrices = 2 * (2 * 64 * 64 + 2 * 32 * 64 + 3 * 128 * 64)
    # q and o, k and v, the MLP: r min + 2 r max and two scalars each, where AdamW has two moments and one.
    projected = 2 * (2 * (3 * 8 * 64 + 2) + 2 * (8 * 32 + 2 * 8 * 64 + 2) + 3 * (8 * 64 + 2 * 8 * 128 + 2))
    assert kept["adamw"] - kept["fira"] == 4 * (2 * matrices + 14 - projected)
