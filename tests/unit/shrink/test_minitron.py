"""`shrink minitron` as typed: shapes, sizes, scores that are used again, chains, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from command import contents, overhaul, refused
from overhaul import artifact
from overhaul.interop import decoder
from overhaul.layers.masked import MaskedLinear
from overhaul.shapes import Shape
from overhaul.shrink.minitron import Minitron

QUICK = ["--evaluate", "none", "--dtype", "fp32"]
SMALL = ["--samples", "4", "--seq-len", "32", *QUICK]
SEARCH = ["--search-steps", "2", "--search-seq-len", "32", "--search-batch-size", "2", *SMALL]
Type = Callable[..., Path]


@pytest.fixture
def shrink(tmp_path: Path) -> Type:
    """`shrink(model, "out", "--ffn", 64)` -> the directory."""

    def run(model: Path, name: str, *words: object) -> Path:
        done = overhaul("shrink", "minitron", model, "-o", tmp_path / name, *words)
        assert done.code == 0, done.err
        return tmp_path / name

    return run


def shape_of(directory: Path) -> Shape:
    return decoder.find(artifact.load(directory).model).shape


def record(directory: Path) -> dict[str, Any]:
    return json.loads((directory / "overhaul.json").read_text())


# A shape.


def test_a_shape_is_cut_at_once(tiny: Path, shrink: Type):
    out = shrink(tiny, "out", "--layers", 1, "--hidden", 48, "--ffn", 64, "--heads", 2, "--kv-groups", 1, *SMALL)

    assert shape_of(out) == Shape(layers=1, hidden=48, ffn=64, heads=2, kv_groups=1)
    stored = load_file(out / "model.safetensors")
    found = decoder.find(artifact.load(tiny).model)
    expected = found.architecture.parameters(shape_of(out))
    assert sum(tensor.numel() for tensor in stored.values()) == expected
    assert (out / "model.safetensors").stat().st_size == pytest.approx(4 * expected, rel=0.05)
    # Every value was one of the original's: nothing was trained.
    original = load_file(tiny / "model.safetensors")
    for name, tensor in stored.items():
        if name.startswith("model.layers"):
            values = torch.cat(
                [original[f"model.layers.{layer}.{name.split('.', 3)[3]}"].flatten() for layer in (0, 1)]
            )
        else:
            values = original[name].flatten()
        assert torch.isin(tensor, values).all(), name


def test_what_is_not_asked_for_stays(tiny: Path, shrink: Type):
    out = shrink(tiny, "out", "--ffn", 64, *SMALL)

    assert shape_of(out) == Shape(layers=2, hidden=64, ffn=64, heads=4, kv_groups=2)
    before, after = load_file(tiny / "model.safetensors"), load_file(out / "model.safetensors")
    assert torch.equal(after["model.embed_tokens.weight"], before["model.embed_tokens.weight"])


@pytest.mark.parametrize("depth", ["block", "perplexity", "contiguous"])
def test_layers_go_by_any_criterion_and_the_report_says_which(tiny: Path, shrink: Type, depth: str):
    out = shrink(tiny, "out", "--layers", 1, "--depth", depth, "--search-seq-len", 32, *SMALL)

    assert shape_of(out).layers == 1
    (table,) = record(out)["tables"]
    assert table["title"].startswith("The layers that matter least were cut: ")
    assert ("perplexity without it rises by" in table["columns"]) == (depth == "perplexity")
    assert table["title"] in (out / "report.html").read_text()


def test_the_head_residual_changes_queries_only(tiny: Path, shrink: Type):
    words = ["--heads", 2, "--kv-groups", 2, *SMALL]
    plain, moved = shrink(tiny, "plain", *words), shrink(tiny, "moved", *words, "--head-residual")

    before, after = load_file(plain / "model.safetensors"), load_file(moved / "model.safetensors")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {f"model.layers.{layer}.self_attn.q_proj.weight" for layer in (0, 1)}


def test_a_model_without_groups_needs_one_of_the_two(make_tiny: Callable[..., Path], tmp_path: Path):
    model = artifact.load(make_tiny()).model
    found = decoder.find(model)
    alike = Shape(layers=2, hidden=64, ffn=128, heads=4, kv_groups=4)
    ungrouped = decoder.Decoder(
        model=model, prefix=found.prefix, shape=alike, architecture=found.architecture, axes=found.axes
    )

    assert Minitron(heads=2).target(ungrouped).kv_groups == 2
    assert Minitron(kv_groups=2).target(ungrouped).heads == 2


# Scores that are used again.


def test_scores_lie_beside_the_weights_and_serve_the_next_target(tiny: Path, shrink: Type):
    first = shrink(tiny, "first", "--ffn", 64, *SMALL)
    again = shrink(tiny, "again", "--ffn", 32, "--scores", first, *QUICK)
    fresh = shrink(tiny, "fresh", "--ffn", 32, *SMALL)

    assert (again / "model.safetensors").read_bytes() == (fresh / "model.safetensors").read_bytes()
    stored, kept = (load_file(out / artifact.IMPORTANCE) for out in (first, again))
    assert all(torch.equal(tensor, kept[name]) for name, tensor in stored.items())
    with safe_open(first / artifact.IMPORTANCE, framework="pt") as stored:
        told = stored.metadata()
    assert told["weights_sha256"] == artifact.weights_sha256(tiny)
    assert (told["samples"], told["seq_len"], told["over_batch"], told["over_sequence"]) == ("4", "32", "l2", "mean")
    step = record(again)["lineage"][-1]
    assert [parent["path"] for parent in step["parents"]] == [str(tiny), str(first)]
    assert step["data"]["tokens"] == 0
    assert record(first)["lineage"][-1]["data"]["tokens"] == 4 * 32


def test_scores_of_other_weights_are_refused(tiny: Path, make_tiny: Callable[..., Path], shrink: Type, tmp_path: Path):
    first = shrink(tiny, "first", "--ffn", 64, *SMALL)

    done = overhaul(
        "shrink", "minitron", make_tiny(dtype="bfloat16"), "-o", tmp_path / "no", "--ffn", 32, "--scores", first
    )

    refused(done, "other weights", "without --scores")
    assert not (tmp_path / "no").exists()


# A size.


@pytest.mark.parametrize("size", [["--share", "0.8"], ["--parameters", "0.085M"]])
def test_a_size_is_looked_for(tiny: Path, shrink: Type, size: list[str]):
    before = contents(tiny)
    out = shrink(tiny, "out", *size, "--candidates", 3, *SEARCH)

    budget = 0.8 * 106_816 if size[0] == "--share" else 85_000
    parameters = sum(tensor.numel() for tensor in load_file(out / "model.safetensors").values())
    assert parameters == pytest.approx(budget, rel=0.05)
    table = record(out)["tables"][0]
    assert [row[0] for row in table["rows"]] == ["1", "2", "3"]
    assert table["rows"][0][1] == str(shape_of(out))
    assert table["rows"][0][2] == f"{parameters:,}"
    losses = [float(row[-1]) for row in table["rows"]]
    assert losses == sorted(losses)
    assert record(out)["lineage"][-1]["data"]["tokens"] == 4 * 32 + 3 * 2 * 2 * 32
    assert contents(tiny) == before


def test_a_search_with_the_same_seed_finds_the_same_bytes(tiny: Path, shrink: Type):
    words = ["--share", "0.8", "--candidates", 2, *SEARCH]
    first, second = shrink(tiny, "first", *words), shrink(tiny, "second", *words)

    assert (first / "model.safetensors").read_bytes() == (second / "model.safetensors").read_bytes()


def test_a_dry_run_lists_the_candidates(tiny: Path, tmp_path: Path):
    done = overhaul(
        "shrink", "minitron", tiny, "-o", tmp_path / "out", "--share", "0.8", "--candidates", 3, "--dry-run"
    )

    assert done.code == 0
    assert "scores from 1024 windows of 256" in done.told
    assert "trains 3 candidates on 51,200 tokens each" in done.told
    assert len([line for line in done.err.splitlines() if line.startswith("  2 layers, hidden")]) == 3
    assert not (tmp_path / "out").exists()


# Chains.


def test_shrink_prune_perp(tiny: Path, shrink: Type, tmp_path: Path):
    small = shrink(tiny, "small", "--ffn", 64, "--hidden", 48, *SMALL)
    pruned, won_back = tmp_path / "pruned", tmp_path / "back"

    calib = ["--samples", 4, "--seq-len", 32]
    assert overhaul("prune", "wanda", small, "-o", pruned, "--sparsity", 0.5, *calib, *QUICK).code == 0
    training = ["--data", "sample", "--steps", 2, "--batch-size", 1, "--seq-len", 32]
    for number, more in enumerate(([], ["--reconstruct", "--samples", 4])):
        done = overhaul("adapt", "perp", pruned, "-o", f"{won_back}{number}", *training, *more, *QUICK)
        assert done.code == 0, done.err

    assert shape_of(Path(f"{won_back}1")).ffn == 64
    assert [step["verb"] for step in record(Path(f"{won_back}1"))["lineage"]] == ["shrink", "prune", "adapt"]


def test_a_pruned_model_keeps_its_zeros_when_it_is_cut(tiny: Path, shrink: Type, tmp_path: Path):
    assert overhaul("prune", "magnitude", tiny, "-o", tmp_path / "pruned", *QUICK).code == 0

    small = shrink(tmp_path / "pruned", "small", "--ffn", 64, "--hidden", 48, *SMALL)

    model = artifact.load(small).model
    masked = [module for module in model.modules() if isinstance(module, MaskedLinear)]
    assert len(masked) == 14
    assert all(int(layer.weight[~layer.mask].count_nonzero()) == 0 for layer in masked)
    training = ["--data", "sample", "--steps", 1, "--batch-size", 1, "--seq-len", 32, *QUICK]
    assert overhaul("adapt", "perp", small, "-o", tmp_path / "back", *training).code == 0
    # The dense model has other shapes: its blocks are no target for those of the cut one.
    done = overhaul("adapt", "perp", small, "-o", tmp_path / "no", *training, "--reconstruct", "--samples", 4)
    refused(done, "needs the dense model")


def test_cut_twice(tiny: Path, shrink: Type):
    once = shrink(tiny, "once", "--ffn", 64, *SMALL)
    twice = shrink(once, "twice", "--layers", 1, *SMALL)

    assert shape_of(twice) == Shape(layers=1, hidden=64, ffn=64, heads=4, kv_groups=2)


# Mistakes: all before anything is measured.


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ([], ["nothing to reach", "share 0.6"]),
        (["--ffn", "64", "--share", "0.5"], ["ffn and share", "exclude each other"]),
        (["--share", "0.5", "--parameters", "50k"], ["two ways to say a size"]),
        (["--parameters", "90X"], ["90X", "write 90M"]),
        (["--share", "1.5"], ["share = 1.5", "less than 1"]),
        (["--layers", "0"], ["layers = 0", "greater than 0"]),
        (["--layers", "3"], ["--layers 3 is more than the model has", "up to 2"]),
        (["--hidden", "128"], ["--hidden 128 is more than the model has", "up to 64"]),
        (["--ffn", "65"], ["--ffn 65 is no multiple of 16", "64, 80"]),
        (["--hidden", "48", "--multiple", "32"], ["--hidden 48 is no multiple of 32", "32, 64"]),
        (["--heads", "2"], ["belong together", "--kv-groups 2 --heads 2"]),
        (["--kv-groups", "1"], ["belong together", "--kv-groups 1 --heads 2"]),
        (["--heads", "3", "--kv-groups", "2"], ["--heads 3 cannot be divided", "--heads 2"]),
        (["--heads", "1", "--kv-groups", "2"], ["--heads 1 cannot be divided", "--heads 2"]),
        (["--heads", "4", "--kv-groups", "1"], ["4 in each", "--heads up to 2"]),
        (["--ffn", "128"], ["already has this shape"]),
        (["--parameters", "90M"], ["90,000,000 parameters are not fewer than the 106,816"]),
        (["--parameters", "1k"], ["no shape on the grid", "the nearest", "1 layer"]),
        (["--ffn", "64", "--samples", "1", "--over-batch", "variance"], ["samples 2 or more"]),
        (["--ffn", "64", "--scores", "nowhere"], ["nowhere"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_mistakes(tiny: Path, tmp_path: Path, words: list[str], told: list[str]):
    done = overhaul("shrink", "minitron", tiny, "-o", tmp_path / "out", *words)

    refused(done, *told)
    assert "measuring" not in done.err
    assert not (tmp_path / "out").exists()


def test_a_model_whose_parts_are_not_known(make_tiny: Callable[..., Path], tmp_path: Path):
    opt = make_tiny(architecture="opt")

    refused(
        overhaul("shrink", "minitron", opt, "-o", tmp_path / "out", "--ffn", 64), "self_attn.out_proj", "llama", "fc1"
    )


def test_a_directory_without_scores(tiny: Path, tmp_path: Path):
    done = overhaul("shrink", "minitron", tiny, "-o", tmp_path / "out", "--ffn", 64, "--scores", tiny, *QUICK)

    refused(done, "holds no importance.safetensors", "shrink minitron wrote")


def test_scores_of_another_kind_are_refused_before_anything_is_measured(tiny: Path, shrink: Type, tmp_path: Path):
    first = shrink(tiny, "first", "--ffn", 64, *SMALL)

    done = overhaul(
        "shrink", "minitron", tiny, "-o", tmp_path / "no", "--ffn", 32, "--scores", first, "--over-batch", "mean"
    )

    refused(done, "l2 over windows", "--over-batch l2")
    assert "measuring" not in done.err


def test_text_that_cannot_rank_is_refused_before_anything_is_measured(tiny: Path, tmp_path: Path):
    long = overhaul("shrink", "minitron", tiny, "-o", tmp_path / "a", "--share", "0.8", "--search-seq-len", 1024)
    (tmp_path / "short.txt").write_text("\n\n\n".join(f"A sentence, number {number}." for number in range(40)))
    short = overhaul(
        "shrink", "minitron", tiny, "-o", tmp_path / "b", "--share", "0.8", "--data", tmp_path / "short.txt"
    )

    refused(long, "--search-seq-len 1024 is more than the model reads", "up to 512")
    refused(short, "its calib text has")
    assert "measuring" not in long.err + short.err


def test_an_odd_head(tiny: Path, tmp_path: Path):
    odd = tmp_path / "odd"
    odd.mkdir()
    for file in tiny.iterdir():
        (odd / file.name).write_bytes(file.read_bytes())
    config = json.loads((odd / "config.json").read_text()) | {"head_dim": 15}
    (odd / "config.json").write_text(json.dumps(config))

    refused(overhaul("shrink", "minitron", odd, "-o", tmp_path / "out", "--ffn", 64), "head_dim")


def test_without_groups_the_head_residual_moves_keys_and_values_too(make_tiny: Callable[..., Path], shrink: Type):
    model = make_tiny(architecture="llama-ungrouped")
    words = ["--heads", 3, *SMALL]
    plain, moved = shrink(model, "plain", *words), shrink(model, "moved", *words, "--head-residual")

    before, after = load_file(plain / "model.safetensors"), load_file(moved / "model.safetensors")
    changed = {name.split(".")[-2] for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"q_proj", "k_proj", "v_proj"}


def test_a_head_residual_that_would_do_nothing_is_refused(tiny: Path, tmp_path: Path):
    for words in (["--ffn", 64], ["--heads", 2, "--kv-groups", 1]):
        done = overhaul("shrink", "minitron", tiny, "-o", tmp_path / "out", "--head-residual", *words, *SMALL)
        refused(done, "none are removed")


def test_scores_are_read_as_they_were_taken(tiny: Path, shrink: Type, tmp_path: Path):
    first = shrink(tiny, "first", "--ffn", 64, *SMALL)

    done = overhaul("shrink", "minitron", tiny, "-o", tmp_path / "out", "--ffn", 32, "--scores", first, *SMALL)
    refused(done, "samples and seq_len have no effect")


def test_perplexity_without_a_layer_is_taken_again_on_another_text(tiny: Path, shrink: Type):
    depth = ["--layers", 1, "--depth", "perplexity", *QUICK]
    first = shrink(tiny, "first", *depth, "--search-seq-len", 32, "--samples", 4, "--seq-len", 32)
    again = shrink(tiny, "again", *depth, "--search-seq-len", 32, "--scores", first)
    other = shrink(tiny, "other", *depth, "--search-seq-len", 48, "--scores", first)

    rises = [[row[2] for row in record(out)["tables"][0]["rows"]] for out in (first, again, other)]
    assert rises[0] == rises[1] != rises[2]


def test_a_result_inside_the_scores_directory_is_refused(tiny: Path, shrink: Type):
    first = shrink(tiny, "first", "--ffn", 64, *SMALL)

    done = overhaul("shrink", "minitron", tiny, "-o", first / "out", "--ffn", 32, "--scores", first, *QUICK)
    refused(done, "is inside the model that is read")
