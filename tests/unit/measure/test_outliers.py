"""`measure outliers`: planted dimensions are found, counted by hand, and missed when they are taken away."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from command import overhaul
from overhaul import artifact
from overhaul.measure.outliers import MeasureOutliers
from overhaul.outliers import inputs_of, look, without

IDS_NT = torch.randint(3, 200, (2, 24), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def model(tiny: Path) -> Any:
    """Dimension 11 is large in three of the four inputs, 20 in one; the norms' weights are near one otherwise."""
    model: Any = artifact.load(tiny).model
    for name in list(inputs_of(model))[:3]:
        model.get_submodule(name).weight.data[11] = -60.0
    model.get_submodule("model.layers.1.input_layernorm").weight.data[20] = 60.0
    return model


def test_the_inputs_are_the_outputs_of_the_blocks_norms(model: Any):
    assert list(inputs_of(model)) == [
        f"model.layers.{block}.{norm}" for block in (0, 1) for norm in ("input_layernorm", "post_attention_layernorm")
    ]


def test_planted_dimensions_are_counted(model: Any):
    seen = look(model, IDS_NT, 6.0)
    wanted = {}
    for name in seen.names:
        hook = model.get_submodule(name).register_forward_hook(lambda _, __, x, name=name: wanted.update({name: x}))
        with torch.no_grad():
            model(IDS_NT)
        hook.remove()

    for row, name in enumerate(seen.names):
        x_TD = wanted[name].flatten(0, 1)
        assert seen.hits[row].tolist() == (x_TD.abs() >= 6).sum(0).tolist()
        assert seen.positive[row].tolist() == (x_TD >= 6).sum(0).tolist()
    assert seen.num_tokens == 48
    assert seen.emergent(layers=0.5, positions=0.06) == [11]
    assert seen.emergent(layers=0.25, positions=0.06) == [11, 20]
    assert seen.emergent(layers=0.25, positions=1.0) == []


def test_values_in_16_bit_are_whole_columns_window_by_window(model: Any):
    seen = look(model, IDS_NT, 6.0)

    by_window = [look(model, IDS_NT[index : index + 1], 6.0) for index in (0, 1)]
    wanted = sum((one.hits > 0).sum(1) * 24 for one in by_window)
    assert seen.sixteen.tolist() == torch.as_tensor(wanted).tolist()


def test_left_out_they_are_zero_inside_only(model: Any):
    with torch.no_grad():
        before = model(IDS_NT).logits
        with without(model, [11, 20]):
            assert look(model, IDS_NT, 6.0).hits[:, [11, 20]].sum() == 0
        assert torch.equal(model(IDS_NT).logits, before)
        with without(model, []):
            assert torch.equal(model(IDS_NT).logits, before)


def test_rows_maps_and_curves(model: Any, tiny: Path, tmp_path: Path):
    model.save_pretrained(tmp_path / "model")
    for file in tiny.glob("tokenizer*"):
        (tmp_path / "model" / file.name).write_bytes(file.read_bytes())

    words = [tmp_path / "model", "--windows", 2, "--seq-len", 32, "--layers", 0.5, "--ablation"]
    done = overhaul("measure", "outliers", *words, "--html", tmp_path / "page.html", "--json")

    assert done.code == 0, done.err
    table = json.loads(done.out)
    rows = {row["metric"]: row["value"] for row in table["rows"]}
    assert rows["emergent dimensions"] == 1
    assert rows["layers/11"] == 0.75
    assert rows["share of layers with an emergent outlier"] == 0.75
    assert 0.5 <= rows["one-sided share"] <= 1
    assert 6 <= rows["magnitude, first quartile"] <= rows["magnitude, median"] <= rows["magnitude, third quartile"]
    assert 0 < rows["share of values in 16 bit"] < 0.1
    ablated = {name: value for name, value in rows.items() if name.startswith("perplexity")}
    assert len(ablated) == len(set(ablated.values())) == 3
    assert len(table["maps"]) == 2
    assert len(table["curves"]) == 1
    assert "dimensions with an outlier" in (tmp_path / "page.html").read_text()


def test_a_model_without_outliers_says_so(tiny: Path):
    done = overhaul("measure", "outliers", tiny, "--windows", 1, "--seq-len", 16, "--threshold", 1000, "--ablation")

    assert done.code == 0, done.err
    assert "emergent dimensions 0" in done.out
    assert "nothing to leave out" in done.err


def test_shares_are_shares():
    with pytest.raises(ValueError, match="layers"):
        MeasureOutliers(layers=1.5)
