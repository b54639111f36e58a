from __future__ import annotations

from typing import Any

import pytest
import torch
from pydantic import ValidationError

from command import overhaul, refused
from overhaul import artifact
from overhaul.bct.model import block_matrices
from overhaul.errors import UserError
from overhaul.journal import recording
from overhaul.quantize.bct import Bct

QUICK = ["--evaluate", "none", "--dtype", "fp32"]


def read(path: Any) -> Any:
    return artifact.load(path, dtype=torch.float32).model


def test_by_default_everything_is_8_bits_in_blocks_of_64(tiny):
    model = Bct().apply(read(tiny), None)

    assert {(matrix.bits, matrix.block) for matrix in block_matrices(model).values()} == {(8, (1, 64))}
    assert model.config.quantization_config["mode"] == "w8a8"


def test_the_budget_is_told_tensor_by_tensor(tiny):
    with recording() as notes:
        Bct(mode="w4a32", budget=0.2).apply(read(tiny), None)

    (table,) = notes.tables
    assert len(table.rows) == 15
    assert {row[1] for row in table.rows} == {"4", "8"}
    assert "tensors have 8 bits" in table.title


def test_a_dense_model_stays_dense(tiny):
    model, before = read(tiny), read(tiny)
    with torch.no_grad():
        made = Bct(mode="w4a32", store="dense").apply(model, None)

    assert made is model
    assert block_matrices(made) == {}
    assert type(made.lm_head) is torch.nn.Linear
    assert made.lm_head.weight is made.model.embed_tokens.weight
    norms = [name for name, p in before.named_parameters() if p.ndim == 1]
    assert all(torch.equal(made.get_parameter(name), before.get_parameter(name)) for name in norms)
    blocks = [block for p in made.parameters() if p.ndim == 2 for row in p for block in row.split(64)]
    assert all(block.unique().numel() <= 15 for block in blocks)  # 4 bits


def test_a_pruned_models_zeros_stay_zero(tiny, tmp_path):
    assert overhaul("prune", "magnitude", tiny, "-o", tmp_path / "pruned", *QUICK).code == 0
    before = artifact.load(tmp_path / "pruned").model.model.layers[0].mlp.up_proj.weight == 0

    made = Bct(mode="w4a8").apply(artifact.load(tmp_path / "pruned").model, None)

    assert (made.model.layers[0].mlp.up_proj.dense()[before] == 0).all()
    assert int(before.sum()) == before.numel() // 2


def test_a_block_larger_than_a_tensor_is_said_and_made_as_large(tiny, capsys):
    model = Bct(mode="w8a32", block="1x100").apply(read(tiny), None)

    assert block_matrices(model)["model.layers.0.mlp.up_proj"].block == (1, 64)
    assert block_matrices(model)["model.layers.0.mlp.down_proj"].block == (1, 100)
    assert "12 tensors are smaller than the block" in capsys.readouterr().err


def test_blocks_that_were_flushed_are_said(tiny, capsys):
    model = read(tiny)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[:2] = 2.0**-121

    Bct(mode="w8a32").apply(model, None)

    assert "2 blocks hold nothing above 2^-120" in capsys.readouterr().err


def test_dense_and_integers_that_compute_exclude_each_other():
    with pytest.raises(ValidationError, match="mode w4a32 is that"):
        Bct(mode="w4a8", store="dense")


def test_a_budget_that_cannot_be_kept_is_refused_before_anything_is_measured(tiny, tmp_path):
    words = ("quantize", "bct", tiny, "-o", tmp_path / "out", "--mode", "w4a32", "--budget", "0.05")
    done = overhaul(*words)

    refused(done, "with 4 bits for every tensor")
    assert "measuring" not in done.err
    refused(overhaul(*words, "--dry-run"), "with 4 bits for every tensor")


def test_the_budget_counts_what_stays_float_as_it_is_on_disk(make_tiny):
    path = make_tiny(dtype="bfloat16")
    method = Bct(mode="w4a32", parts=("weights",), budget=0.4)

    widths = [method.apply(made.model, None).config.quantization_config["bits"] for made in
              (artifact.load(path), artifact.load(path, dtype=torch.float32))]  # fmt: skip

    assert widths[0] == widths[1]


def test_a_budget_and_a_dense_directory_exclude_each_other():
    with pytest.raises(ValidationError, match="as large as the model"):
        Bct(mode="w4a32", store="dense", budget=0.2)


def test_blocks_that_save_nothing_are_refused(tiny):
    with pytest.raises(UserError, match="--embedding-block 1x1 with a scale in fp32"):
        Bct(mode="w4a32", embedding_block="1x1", scale="fp32").apply(read(tiny), None)


def test_a_budget_needs_a_mode_of_4_bits():
    with pytest.raises(ValidationError, match="w4"):
        Bct(mode="w8a32", budget=0.2)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--block", "0x64"], ["0x64", "ROWSxCOLUMNS"]),
        (["--activation-block", "0"], ["activation_block"]),
        (["--accumulate", "integer", "--scale", "fp16"], ["shifting"]),
        (["--budget", "1.5"], ["budget"]),
    ],
)
def test_what_cannot_be_is_refused_as_typed(flags, said, tiny, tmp_path):
    refused(overhaul("quantize", "bct", tiny, "-o", tmp_path / "out", *flags, *QUICK), *said)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("flags", "said"), [(["--mode", "w3a8"], "w4a8"), (["--parts", "gelu"], "activation")])
def test_choices_are_listed(flags, said, tiny, tmp_path):
    done = overhaul("quantize", "bct", tiny, "-o", tmp_path / "out", *flags, *QUICK)

    assert done.code == 2
    assert said in done.err


def test_an_architecture_that_is_not_computed_names_the_mode_that_is(make_tiny, tmp_path):
    path = make_tiny(architecture="opt")

    refused(overhaul("quantize", "bct", path, "-o", tmp_path / "out", *QUICK), "opt", "w8a32")
    assert overhaul("quantize", "bct", path, "-o", tmp_path / "out", "--mode", "w8a32", *QUICK).code == 0
