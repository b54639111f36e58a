"""A model directory, in and out: masks, tied weights, companions, and nothing half-written."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from overhaul import artifact
from overhaul.errors import UserError
from overhaul.layers import swap
from overhaul.layers.masked import MaskedLinear
from overhaul.lineage import LineageStep, Parent

UP = "model.layers.0.mlp.up_proj"


def masked(model: nn.Module, name: str = UP) -> torch.Tensor:
    """Prunes every third weight of a layer, and sets a kept one to zero as well: it is not pruned."""
    shape = model.get_submodule(name).weight.shape
    mask_OI = (torch.arange(shape.numel()) % 3 > 0).view(shape)
    swap(model, [name], lambda linear: MaskedLinear.from_linear(linear, mask_OI))  # pyright: ignore
    with torch.no_grad():
        model.get_submodule(name).weight[0, 1] = 0.0
    return mask_OI


def write(made: artifact.Artifact, directory: Path) -> Path:
    directory.mkdir()
    artifact.write_model(made, directory)
    return directory


def test_masks_come_back_exactly_and_are_not_guessed_from_zeros(tiny: Path, tmp_path: Path):
    made = artifact.load(tiny)
    mask_OI = masked(made.model)

    again = artifact.load(write(made, tmp_path / "out"))

    layer: Any = again.model.get_submodule(UP)
    assert isinstance(layer, MaskedLinear)
    assert torch.equal(layer.mask, mask_OI)
    assert mask_OI[0, 1]
    assert layer.weight[0, 1] == 0
    assert not isinstance(again.model.get_submodule("model.layers.1.mlp.up_proj"), MaskedLinear)
    assert not any("mask" in name for name in load_file(tmp_path / "out" / "model.safetensors"))


@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (8, 8), (7, 13)])
def test_masks_of_any_shape_are_packed_eight_to_a_byte(shape: tuple[int, int], tmp_path: Path):
    model = nn.Sequential(nn.Linear(shape[1], shape[0], bias=False))
    mask_OI = torch.rand(shape, generator=torch.Generator().manual_seed(0)) > 0.5
    swap(model, ["0"], lambda linear: MaskedLinear.from_linear(linear, mask_OI))  # pyright: ignore

    bits, shapes = artifact.pack_masks(model)
    artifact.save_file(bits, tmp_path / "masks.safetensors", metadata=shapes)
    other = nn.Sequential(nn.Linear(shape[1], shape[0], bias=False))
    artifact.apply_masks(other, tmp_path / "masks.safetensors")

    assert bits["0"].numel() == -(-shape[0] * shape[1] // 8)
    assert torch.equal(other[0].mask, mask_OI)


@pytest.mark.parametrize("tie", [True, False])
def test_tied_weights_are_stored_once_and_untied_ones_twice(make_tiny: Any, tie: bool, tmp_path: Path):
    made = artifact.load(make_tiny(tie=tie))

    names = load_file(write(made, tmp_path / "out") / "model.safetensors").keys()

    assert ("lm_head.weight" in names) == (not tie)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_dtype_on_disk_is_that_of_the_input(make_tiny: Any, dtype: str, tmp_path: Path):
    made = artifact.load(make_tiny(dtype=dtype), dtype=torch.float32)

    stored = load_file(write(made, tmp_path / "out") / "model.safetensors")

    assert {tensor.dtype for tensor in stored.values()} == {getattr(torch, dtype)}


def test_what_was_not_changed_is_written_as_it_was_read(tiny: Path, tmp_path: Path):
    out = write(artifact.load(tiny), tmp_path / "out")

    before, after = load_file(tiny / "model.safetensors"), load_file(out / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_companions_are_copied_verbatim_and_the_parents_own_files_are_not(tiny: Path, tmp_path: Path):
    parent = shutil.copytree(tiny, tmp_path / "parent")
    (parent / "preprocessor_config.json").write_text('{"size":  224}')
    for own in ("overhaul.json", "report.html", "README.md", "metrics.jsonl"):
        (parent / own).write_text("{}")
    (parent / ".state").mkdir()
    for weights in ("tf_model.h5", "model.gguf", "flax_model.msgpack", "pytorch_model.bin"):
        (parent / weights).write_text("those of the model before, in another format")

    out = write(artifact.load(parent), tmp_path / "out")

    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "preprocessor_config.json"):
        assert (out / name).read_bytes() == (parent / name).read_bytes()
    there = {path.name for path in out.iterdir()}
    assert not {"overhaul.json", "report.html", "README.md", ".state"} & there
    assert not {"tf_model.h5", "model.gguf", "flax_model.msgpack", "pytorch_model.bin"} & there


def test_a_result_that_is_not_finite_is_not_written(tiny: Path, tmp_path: Path):
    made = artifact.load(tiny)
    with torch.no_grad():
        made.model.get_submodule(UP).weight[1, 2] = float("nan")

    with pytest.raises(UserError, match=UP):
        write(made, tmp_path / "out")


def test_the_record_holds_lineage_and_a_hash_that_notices_changes(tiny: Path, tmp_path: Path):
    made = artifact.load(tiny)
    step = LineageStep(
        verb="prune", method="magnitude", fields={"sparsity": 0.5}, parents=(Parent(path="p", hash="h"),)
    )
    made = made.changed(made.model, step)
    out = write(made, tmp_path / "out")
    artifact.write_record(made, out, {"note": 1})

    again = artifact.load(out)

    assert again.lineage == (step,)
    assert again.record["note"] == 1
    assert artifact.verify(out)
    with (out / "model.safetensors").open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"\x00")
    assert not artifact.verify(out)


# Writing as a whole.


def test_a_stage_becomes_the_directory_when_it_ends_well(tmp_path: Path):
    with artifact.stage(tmp_path / "out") as directory:
        (directory / "file").write_text("x")
        assert not (tmp_path / "out").exists()

    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert (tmp_path / "out" / "file").read_text() == "x"


def test_a_stage_that_fails_leaves_nothing(tmp_path: Path):
    def fail() -> None:
        with artifact.stage(tmp_path / "out") as directory:
            (directory / "file").write_text("x")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()

    assert list(tmp_path.iterdir()) == []


def test_a_stage_takes_the_place_of_an_empty_directory_and_of_finished_checkpoints(tmp_path: Path):
    (tmp_path / "out" / ".state" / "step-000001").mkdir(parents=True)

    with artifact.stage(tmp_path / "out") as directory:
        (directory / "file").write_text("x")

    assert [path.name for path in (tmp_path / "out").iterdir()] == ["file"]


def test_a_stage_never_replaces_what_appeared_meanwhile(tmp_path: Path):
    def race() -> None:
        with artifact.stage(tmp_path / "out") as directory:
            (directory / "made").write_text("x")
            (tmp_path / "out").mkdir()
            (tmp_path / "out" / "precious").write_text("x")

    with pytest.raises(UserError, match="filled by something else meanwhile"):
        race()

    [kept] = tmp_path.glob(".out.partial-*")  # the work is not lost
    assert (kept / "made").exists()
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["precious"]


def test_checkpoints_alone_may_be_resumed(tmp_path: Path):
    (tmp_path / ".state").mkdir()

    artifact.check_out(tmp_path, resume=True)
    with pytest.raises(UserError, match="--resume"):
        artifact.check_out(tmp_path)
    (tmp_path / "notes.txt").write_text("")
    with pytest.raises(UserError, match=r"notes\.txt"):
        artifact.check_out(tmp_path, resume=True)


def test_out_inside_the_model_is_seen_through_links_and_dots(tiny: Path, tmp_path: Path):
    (tmp_path / "link").symlink_to(tiny)

    for out in (tmp_path / "link" / "out", tiny / "a" / ".." / "out"):
        with pytest.raises(UserError, match="inside the model"):
            artifact.check_out(out, parent=tiny)
    artifact.check_out(tiny.parent / f"{tiny.name}-pruned", parent=tiny)


def test_a_disk_without_room_is_refused_before_the_work(tmp_path: Path):
    with pytest.raises(UserError, match="MB free"):
        artifact.refuse_full_disk(tmp_path / "not" / "there", 10**18)
    artifact.refuse_full_disk(tmp_path, 1)


def test_the_hash_of_weights_is_that_of_their_content(tiny: Path, tmp_path: Path):
    copy = shutil.copytree(tiny, tmp_path / "copy")
    (copy / "config.json").write_text(json.dumps(json.loads((copy / "config.json").read_text()), indent=4))

    assert artifact.weights_sha256(copy) == artifact.weights_sha256(tiny)


def test_files_can_be_read_by_whom_any_new_file_can(tmp_path: Path) -> None:
    with artifact.stage(tmp_path / "out") as directory:
        (directory / "weights").touch(mode=0o600)
        (directory / "other").touch()
    modes = {file.name: file.stat().st_mode & 0o777 for file in (tmp_path / "out").iterdir()}
    (tmp_path / "plain").touch()
    assert set(modes.values()) == {(tmp_path / "plain").stat().st_mode & 0o777}
