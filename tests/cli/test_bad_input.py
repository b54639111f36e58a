"""Mistakes: each is exit 2, one box that says what to type, no traceback, nothing written and nothing changed."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from command import Finished, contents, overhaul, python, refused
from overhaul import artifact

QUICK = ("--evaluate", "none")
TENSOR = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture
def change(tiny: Path, tmp_path: Path) -> Callable[..., Finished]:
    """`change("prune", "magnitude", ..., model=DIR, out=DIR)`; nothing may be new or changed afterwards."""

    def run(verb: str, method: str, *flags: object, model: Path = tiny, out: Path | None = None) -> Finished:
        where = out or tmp_path / "out"
        before = {path: contents(path) for path in (model, tmp_path) if path.is_dir()}
        done = overhaul(verb, method, model, "-o", where, *QUICK, *flags)
        for path, held in before.items():
            assert contents(path) == held, f"{path} was changed"
        assert not (tmp_path / "out").exists()
        return done

    return run


@pytest.fixture
def damaged(tiny: Path, tmp_path: Path) -> Path:
    """A copy of the tiny model, to be damaged."""
    return shutil.copytree(tiny, tmp_path / "damaged")


# Fields.


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--sparsity", "0"], "greater than 0"),
        (["--sparsity", "1"], "less than 1"),
        (["--sparsity", "1.7"], "sparsity = 1.7"),
        (["--sparsity", "nan"], "finite"),
        (["--pattern", "4:2"], "0 < N < M"),
        (["--pattern", "half"], "2:4"),
        (["--pattern", "2:4", "--sparsity", "0.7"], "pattern 2:4 removes 0.5"),
        (["--pattern", "3:7"], "64 inputs"),
        (["--device", "tpu"], "cpu"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_fields_out_of_range(change: Callable[..., Finished], flags: list[str], says: str):
    refused(change("prune", "magnitude", *flags), says)


def test_the_name_of_a_pattern_keeps_its_capital(change: Callable[..., Finished]):
    assert "N:M keeps N" in change("prune", "magnitude", "--pattern", "4:2").told


def test_two_mistakes_are_told_in_one_box(change: Callable[..., Finished]):
    refused(change("prune", "wanda", "--pattern", "4:2", "--samples", "0"), "4:2", "samples = 0")


def test_text_where_a_number_belongs(change: Callable[..., Finished]):
    done = change("prune", "magnitude", "--sparsity", "half")

    assert done.code == 2
    assert "--sparsity" in done.err
    assert "Traceback" not in done.err


@pytest.mark.parametrize(
    ("words", "suggestion"),
    [
        (("prune", "wand"), "did you mean 'wanda'?"),
        (("prun", "wanda"), "did you mean 'prune'?"),
        (("adapt", "loar"), "did you mean 'lora'?"),
    ],
)
def test_unknown_names_get_a_suggestion(change: Callable[..., Finished], words: tuple[str, str], suggestion: str):
    refused(change(*words), suggestion, "allowed:")


def test_training_without_data(change: Callable[..., Finished]):
    refused(change("adapt", "full"), "--data sample")


def test_windows_longer_than_the_model_reads(change: Callable[..., Finished]):
    refused(change("adapt", "full", "--data", "sample", "--seq-len", "4096"), "4096", "up to 512")


def test_a_target_that_no_layer_has(change: Callable[..., Finished]):
    refused(change("adapt", "lora", "--data", "sample", "--targets", "q_prj"), "did you mean 'q_proj'?", "up_proj")


# Models.


def without_config(model: Path) -> None:
    (model / "config.json").unlink()


def with_half_a_config(model: Path) -> None:
    (model / "config.json").write_text("{")


def of_unknown_kind(model: Path) -> None:
    _configure(model, model_type="abacus", architectures=["Abacus"])


def quantized(model: Path) -> None:
    _configure(model, quantization_config={"quant_method": "gptq", "bits": 4})


def _configure(model: Path, **changes: Any) -> None:
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | changes))


def without_weights(model: Path) -> None:
    (model / "model.safetensors").unlink()


def truncated(model: Path) -> None:
    file = model / "model.safetensors"
    os.truncate(file, file.stat().st_size // 2)


def corrupt(model: Path) -> None:
    (model / "model.safetensors").write_bytes(b"\xff" * 1000)


def with_a_missing_shard(model: Path) -> None:
    names = load_file(model / "model.safetensors")
    (model / "model.safetensors").rename(model / "model-00001-of-00002.safetensors")
    shards = {name: f"model-0000{2 if name == TENSOR else 1}-of-00002.safetensors" for name in names}
    index = {"metadata": {}, "weight_map": shards}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))


def without_a_tensor(model: Path) -> None:
    _edit(model, lambda weights: weights.pop(TENSOR))


def with_a_tensor_too_small(model: Path) -> None:
    _edit(model, lambda weights: weights.update({TENSOR: weights[TENSOR][:50].contiguous()}))


def with_infinity(model: Path) -> None:
    _edit(model, lambda weights: weights[TENSOR].view(-1).__setitem__(7, float("inf")))


def with_sums_beyond_fp32(model: Path) -> None:
    """Finite weights whose sum is not; the check must not be fooled into refusing them."""
    _edit(model, lambda weights: weights[TENSOR].view(-1)[:4].fill_(3e38))


def _edit(model: Path, edit: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    weights = load_file(model / "model.safetensors")
    edit(weights)
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})


def without_tokenizer(model: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (model / name).unlink()


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (without_config, "no config.json"),
        (with_half_a_config, "config.json is not valid JSON"),
        (of_unknown_kind, "abacus"),
        (quantized, "quantized (gptq)"),
        (without_weights, "has no weights"),
        (truncated, "model.safetensors is damaged or cut short"),
        (corrupt, "model.safetensors is damaged or cut short"),
        (with_a_missing_shard, "model-00002-of-00002.safetensors"),
        (without_a_tensor, f"such as {TENSOR}"),
        (with_a_tensor_too_small, f"{TENSOR} is (50, 64) in the file and (128, 64)"),
        (with_infinity, f"{TENSOR} has 1 values that are NaN or infinite"),
        (without_tokenizer, "no tokenizer"),
    ],
)
def test_damaged_models(change: Callable[..., Finished], damaged: Path, damage: Callable[[Path], None], says: str):
    damage(damaged)

    refused(change("prune", "magnitude", model=damaged), says)


def test_large_weights_are_not_taken_for_infinite(damaged: Path, tmp_path: Path):
    with_sums_beyond_fp32(damaged)

    assert overhaul("prune", "magnitude", damaged, "-o", tmp_path / "out", *QUICK).code == 0


def test_a_model_that_is_not_there(change: Callable[..., Finished], tmp_path: Path):
    refused(change("prune", "magnitude", model=tmp_path / "nowhere"), "there is no model", "smollm2-135m")


def test_a_file_instead_of_a_model(change: Callable[..., Finished], tiny: Path):
    refused(change("prune", "magnitude", model=tiny / "model.safetensors"), "is a file", f"give {tiny}")


# OUT.


def test_out_that_is_not_empty(change: Callable[..., Finished], tmp_path: Path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("years of work")

    refused(change("prune", "magnitude", out=tmp_path / "full"), "not empty", "thesis.txt")


def test_out_inside_the_model(change: Callable[..., Finished], damaged: Path):
    refused(change("prune", "magnitude", model=damaged, out=damaged / "out"), "inside the model")
    refused(change("prune", "magnitude", model=damaged, out=damaged), "inside the model")


def test_out_that_is_a_file_or_below_one(change: Callable[..., Finished], tmp_path: Path):
    (tmp_path / "file").write_text("")

    refused(change("prune", "magnitude", out=tmp_path / "file"), "is a file")
    refused(change("prune", "magnitude", out=tmp_path / "file" / "out"), "is a file")


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs a file system that nobody can write to")
def test_out_where_nobody_can_write(change: Callable[..., Finished]):
    refused(change("prune", "magnitude", out=Path("/proc/out")), "/proc")


@pytest.mark.skipif(os.geteuid() == 0, reason="permissions do not bind root")
def test_out_without_permission(change: Callable[..., Finished], tmp_path: Path):
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o500)

    refused(change("prune", "magnitude", out=locked / "out"), "no permission")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of one megabyte."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)]
    if os.geteuid() != 0 or shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("cannot mount a file system")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def test_a_disk_that_is_too_small_is_refused_before_the_work(change: Callable[..., Finished], small_disk: Path):
    (small_disk / "ballast").write_bytes(bytes(900_000))

    refused(change("prune", "magnitude", out=small_disk / "out"), "MB free", "larger disk")


def test_a_disk_that_fills_up_while_writing(
    change: Callable[..., Finished], small_disk: Path, monkeypatch: pytest.MonkeyPatch
):
    """The space is there when the work begins, and gone when the result is written."""
    monkeypatch.setattr(artifact, "refuse_full_disk", lambda *_: None)
    (small_disk / "ballast").write_bytes(bytes(900_000))

    refused(change("prune", "magnitude", out=small_disk / "out"), "disk is full", "nothing partial was left")
    assert [path.name for path in small_disk.iterdir()] == ["ballast"]


WITH_A_LIMIT = """
import resource, signal, sys
from overhaul import cli
import overhaul.write
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
write = overhaul.write.artifacts.write_model
def limited(*arguments):
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
    write(*arguments)
overhaul.write.artifacts.write_model = limited
cli.main(sys.argv[1:])
"""


def test_a_file_larger_than_the_system_allows(tiny: Path, tmp_path: Path):
    before = contents(tiny)
    done = python(WITH_A_LIMIT, "prune", "magnitude", tiny, "-o", tmp_path / "out", *QUICK)

    refused(done, "cannot be written: File too large")
    assert list(tmp_path.iterdir()) == []
    assert contents(tiny) == before


@pytest.mark.parametrize("file", ["overhaul.json", "report.html", "README.md"])
def test_a_disk_that_fills_up_at_any_file(
    change: Callable[..., Finished], file: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    (tmp_path / "earlier").mkdir()
    (tmp_path / "earlier" / "result").write_text("kept")
    write_text = Path.write_text

    def full(path: Path, *rest: Any, **more: Any) -> int:
        if path.name == file:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        return write_text(path, *rest, **more)

    monkeypatch.setattr(Path, "write_text", full)

    refused(change("prune", "magnitude"), "disk is full")
    assert [path.name for path in tmp_path.iterdir()] == ["earlier"]


def test_a_disk_that_fills_up_at_a_checkpoint_leaves_no_partial_one(
    tiny: Path, small_disk: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(artifact, "refuse_full_disk", lambda *_: None)
    (small_disk / "ballast").write_bytes(bytes(1_000_000))
    often = ("--train", "norms", "--save-every", "1", "--steps", "3")

    refused(overhaul("adapt", "perp", tiny, "-o", small_disk / "out", *SHORT, *often), "disk is full", "step-000001")
    assert list((small_disk / "out" / ".state").iterdir()) == []


# Data.


@pytest.mark.parametrize(
    ("name", "content", "flags", "says"),
    [
        ("empty.txt", b"", [], "is empty"),
        ("blank.jsonl", b'{"text": ""}\n', [], "is empty"),
        ("short.txt", b"One.\n\n\nTwo words.\n\n\nThree short words.", [], "--seq-len"),
        ("latin.txt", "caf\u00e9 ".encode("latin1") * 100, [], "is not UTF-8: byte 0xe9 at offset 3"),
        ("odd.jsonl", b'{"body": "hello"}\n' * 20, [], "--field body"),
        ("odd.jsonl", b'{"body": "hello"}\n' * 20, ["--field", "txt"], "no column 'txt'"),
        ("half.jsonl", b'{"text": "hel\n', [], "half.jsonl:1 is not JSON"),
        ("data.xlsx", b"PK", [], "unknown suffix '.xlsx'"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
@pytest.mark.parametrize("method", [("adapt", "full"), ("prune", "wanda")], ids=" ".join)
def test_unusable_data(
    change: Callable[..., Finished],
    method: tuple[str, str],
    name: str,
    content: bytes,
    flags: list[str],
    says: str,
    tmp_path: Path,
):
    (tmp_path / name).write_bytes(content)

    refused(change(*method, "--data", tmp_path / name, "--seq-len", "64", *flags), says)


def test_a_corpus_that_does_not_exist(change: Callable[..., Finished]):
    refused(change("adapt", "full", "--data", "sampel"), "did you mean 'sample'?")


# While training.

SHORT = ("--data", "sample", "--seq-len", "32", "--batch-size", "2", "--dtype", "fp32", *QUICK)


def test_a_loss_that_is_not_finite_names_step_batch_and_module_and_keeps_the_last_checkpoint(
    tiny: Path, tmp_path: Path
):
    out = tmp_path / "out"
    wild = ("--lr", "1e38", "--warmup", "0", "--clip", "0", "--save-every", "1", "--steps", "9")

    done = overhaul("adapt", "full", tiny, "-o", out, *SHORT, *wild)

    refused(done, "not finite at step 2", "micro-batch 0", "model.", "--lr")
    assert [path.name for path in (out / ".state").iterdir()] == ["step-000001"]


def test_nothing_to_train(tiny: Path, tmp_path: Path):
    done = overhaul("adapt", "perp", tiny, "-o", tmp_path / "out", *SHORT, "--train", "biases")

    refused(done, "bias")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("flags", "says"), [(("--prompt", ""), "empty"), (("--prompt", "x", "--tokens", "0"), "0")])
def test_generating_nothing(tiny: Path, flags: tuple[str, ...], says: str):
    refused(overhaul("generate", tiny, *flags), says)


def test_an_adapter_of_an_adapter(tiny: Path, tmp_path: Path):
    flags = ("--data", "sample", "--steps", "1", "--seq-len", "32", "--no-merge", *QUICK)
    assert overhaul("adapt", "lora", tiny, "-o", tmp_path / "one", *flags).code == 0

    refused(overhaul("adapt", "lora", tmp_path / "one", "-o", tmp_path / "two", *flags), "adapter of an adapter")
    assert not (tmp_path / "two").exists()


def test_a_tracker_that_is_not_there(change: Callable[..., Finished]):
    refused(change("adapt", "full", *SHORT, "--track", "wandb"), "not installed", "pip install wandb")


@pytest.mark.parametrize(("flags", "says"), [(("--windows", "0"), "greater than 0"), (("--html", "no/r.html"), "no")])
def test_comparing_with_impossible_settings(tiny: Path, flags: tuple[str, str], says: str):
    refused(overhaul("compare", tiny, tiny, *flags), says)


def test_other_settings_on_resume(tiny: Path, tmp_path: Path):
    out = tmp_path / "out"
    wild = ("--warmup", "0", "--clip", "0", "--save-every", "1", "--steps", "9")
    overhaul("adapt", "full", tiny, "-o", out, *SHORT, *wild, "--lr", "1e38")

    done = overhaul("adapt", "full", tiny, "-o", out, *SHORT, *wild, "--lr", "1e-4", "--resume")

    refused(done, "lr: 1e+38 then, 0.0001 now")


# Recipes.


def test_a_recipe_with_five_mistakes_shows_all_five_with_their_lines(tmp_path: Path):
    (tmp_path / "recipe.yaml").write_text(
        "model: smollm2-135m\n"
        "out: runs/x\n"
        "sed: 1\n"
        "steps:\n"
        "  - {verb: prune, method: wand}\n"
        "  - verb: prune\n"
        "    method: magnitude\n"
        "    sparsity: 1.7\n"
        "    scop: row\n"
        "  - {method: full}\n"
    )
    done = overhaul("run", tmp_path / "recipe.yaml")

    file = tmp_path / "recipe.yaml"
    refused(done, f"{file}:3: unknown key 'sed'", "did you mean 'seed'?", f"{file}:5: prune has no method 'wand'")
    refused(done, f"{file}:8: prune magnitude: sparsity = 1.7", f"{file}:9: prune magnitude has no field 'scop'")
    refused(done, f"{file}:10: step 3 needs a verb and a method")
    assert [path.name for path in tmp_path.iterdir()] == ["recipe.yaml"]


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("", "is not a recipe"),
        ("- a\n- b\n", "the top must be a mapping"),
        ("model: [", "not valid YAML"),
        ("model: m\nout: o\n", "'steps' is missing"),
        ("model: m\nout: o\nsteps: 3\n", "'steps' must be a list"),
    ],
)
def test_what_is_not_a_recipe(content: str, says: str, tmp_path: Path):
    (tmp_path / "recipe.yaml").write_text(content)

    refused(overhaul("run", tmp_path / "recipe.yaml"), says)


def test_a_recipe_that_is_not_there(tmp_path: Path):
    refused(overhaul("run", tmp_path / "recipe.yaml"), "no recipe at")


def test_whole_is_of_training_on_data(change: Callable[..., Finished]):
    refused(change("prune", "wanda", "--data", "sample", "--whole"), "--whole is of training on --data")
