"""Two processes on this machine's CPU give the losses of one process with the doubled batch."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file
from torch.testing import assert_close

from command import contents, environment, overhaul

# On a CPU accelerate starts several processes without MPI only under the name --multi_gpu.
LAUNCH = ["-m", "accelerate.commands.launch", "--num_processes", "2", "--num_machines", "1", "--main_process_port", "0"]
LAUNCH += ["--mixed_precision", "no", "--dynamo_backend", "no"]
TRAIN = ["--steps", "4", "--seq-len", "32", "--accumulate", "2", "--lr", "1e-3", "--dtype", "fp32", "--save-every", "1"]
JUDGE = ["--evaluate", "sample", "--evaluate-windows", "2", "--evaluate-seq-len", "32", "--eval-every", "2"]


@pytest.fixture(scope="module")
def questions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Text of which each window has another number of trained tokens."""
    file = tmp_path_factory.mktemp("data") / "questions.jsonl"
    rows = ({"prompt": f"How much is {n} and {n % 7}? ", "completion": "ja" * (n % 23 + 1)} for n in range(600))
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.fixture(scope="module")
def half(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pruned model: its zeros must survive the sharding."""
    out = tmp_path_factory.mktemp("half") / "half"
    assert overhaul("prune", "magnitude", tiny, "-o", out, "--evaluate", "none").code == 0
    return out


@pytest.fixture(
    scope="module", params=["adapt full", "adapt full fira", "adapt full galore", "adapt hft", "distill kd"]
)
def method(request: pytest.FixtureRequest, make_tiny: Callable[..., Path]) -> list[str]:
    """Verb and method, and what it needs; distillation with hidden states, whose weight is that of the step before."""
    verb, name, *optimizer = request.param.split()
    projected = ["--optimizer", *optimizer, "--projection.rank", "8", "--projection.gap", "2"] if optimizer else []
    teacher = ["--states", "embedding", "layers", "--teacher", str(make_tiny(tie=False, bias=True))]
    more = {"kd": teacher, "hft": ["--rounds", "2"]}
    return [verb, name, *projected, *more.get(name, [])]


@pytest.fixture(scope="module")
def alone(method: list[str], half: Path, questions: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One process, twice the batch."""
    out = tmp_path_factory.mktemp("alone") / "out"
    done = overhaul(*method, half, "-o", out, "--data", questions, "--batch-size", "4", *TRAIN, *JUDGE)
    assert done.code == 0, done.err
    return out


def points(directory: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("how", [["--multi_gpu"], ["--use_fsdp", "--fsdp_version", "2"]], ids=["ddp", "fsdp2"])
def test_two_processes_train_like_one_with_the_doubled_batch(
    how: list[str], method: list[str], alone: Path, half: Path, questions: Path, tmp_path: Path
):
    out = tmp_path / "out"
    before = contents(half)
    if "--use_fsdp" in how and "--optimizer" in method:
        pytest.skip("needs whole matrices: refused, see test_a_rule_that_needs_whole_matrices_is_refused_under_fsdp")
    words = [*method, str(half), "-o", str(out), "--data", str(questions), "--batch-size", "2"]
    command = [sys.executable, *LAUNCH, *how, "-m", "overhaul", *words, *TRAIN, *JUDGE]

    done = subprocess.run(command, capture_output=True, text=True, env=environment(), timeout=300)

    assert done.returncode == 0, done.stderr
    assert done.stdout.count("written:") == 1, "only the first process reports"
    for ours, theirs in zip(points(out), points(alone), strict=True):
        assert ours["tokens"] == theirs["tokens"]
        measured = [name for name in ("loss", "grad_norm", "perplexity") if name in theirs]
        assert [ours[name] for name in measured] == pytest.approx([theirs[name] for name in measured], rel=1e-5)
    trained, expected = load_file(out / "model.safetensors"), load_file(alone / "model.safetensors")
    for name, tensor in expected.items():
        assert_close(trained[name], tensor, rtol=0, atol=2e-5, msg=name)
        assert ((trained[name] == 0) == (tensor == 0)).all(), f"{name} has other zeros"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert {path.name for path in out.iterdir()} == {path.name for path in alone.iterdir()}
    assert contents(half) == before


def test_a_rule_that_needs_whole_matrices_is_refused_under_fsdp(half: Path, questions: Path, tmp_path: Path):
    words = ["adapt", "full", str(half), "-o", str(tmp_path / "out"), "--data", str(questions), *TRAIN]
    words += ["--optimizer", "fira", "--projection.rank", "8", "--evaluate", "none"]
    command = [sys.executable, *LAUNCH, "--use_fsdp", "--fsdp_version", "2", "-m", "overhaul", *words]

    done = subprocess.run(command, capture_output=True, text=True, env=environment(), timeout=300)

    assert done.returncode != 0
    assert "--optimizer fira needs whole matrices" in done.stderr
    assert not (tmp_path / "out").exists()
