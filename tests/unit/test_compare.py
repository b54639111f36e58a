"""Which models are meant, which is the reference, and what is said of models that differ in more than values."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import overhaul
from command import overhaul as typed
from command import refused
from images import write_bars, write_cnn
from overhaul import artifact, packed
from overhaul.compare import Comparison, compare, dense_tensors, difference, models_of
from overhaul.errors import UserError
from overhaul.kinds import Kind
from overhaul.options import Options
from packed_rows import QUANT_METHOD, write_rows

IMAGES = (Kind.IMAGE_CLASSIFIER,)
QUICK = Options(evaluate_windows=2, evaluate_seq_len=32)


@pytest.fixture
def rows_format(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(packed.FORMATS, QUANT_METHOD, "packed_rows")


@pytest.fixture
def runs(tiny: Path, tmp_path: Path) -> Path:
    """A folder: `b` and `deep/a-10`, `deep/a-9` made from `tiny`, and what is no model."""
    folder = tmp_path / "runs"
    for name in ("b", "deep/a-10", "deep/a-9"):
        done = typed("prune", "magnitude", tiny, "-o", folder / name, "--evaluate", "none")
        assert done.code == 0, done.err
    shutil.copytree(tiny, folder / ".state" / "step-1")
    shutil.copytree(tiny, folder / "b" / "inside")
    (folder / "notes").mkdir()
    (folder / "notes" / "text.md").write_text("no model")
    return folder


def measured(*models: Path) -> Comparison:
    return compare([str(model) for model in models], QUICK)


# Which models.


def test_a_folder_stands_for_the_models_below_it_and_what_they_were_made_from_comes_first(runs: Path, tiny: Path):
    assert models_of([str(runs)]) == [str(path) for path in (tiny, runs / "b", runs / "deep/a-9", runs / "deep/a-10")]


def test_a_model_that_is_named_first_is_the_reference_and_each_is_taken_once(runs: Path, tiny: Path):
    b, nine, ten = (str(runs / name) for name in ("b", "deep/a-9", "deep/a-10"))

    assert models_of([ten, str(runs), b]) == [ten, b, nine]
    assert models_of([str(tiny), str(runs / "deep")]) == [str(tiny), nine, ten]


def test_an_origin_inside_the_folder_is_moved_to_the_front(tiny: Path, tmp_path: Path):
    origin, pruned = tmp_path / "z-origin", tmp_path / "a-pruned"
    shutil.copytree(tiny, origin)
    assert typed("prune", "magnitude", origin, "-o", pruned, "--evaluate", "none").code == 0

    assert models_of([str(tmp_path)]) == [str(origin), str(pruned)]


def test_without_its_origin_the_first_of_a_folder_is_the_reference(tiny: Path, tmp_path: Path):
    origin = tmp_path / "elsewhere"
    shutil.copytree(tiny, origin)
    for name in ("one", "two"):
        assert typed("prune", "magnitude", origin, "-o", tmp_path / "runs" / name, "--evaluate", "none").code == 0
    shutil.rmtree(origin)

    assert models_of([str(tmp_path / "runs")]) == [str(tmp_path / "runs" / name) for name in ("one", "two")]


def test_a_link_to_a_folder_above_is_not_followed_for_ever(runs: Path):
    (runs / "loop").symlink_to(runs.parent)

    assert len(models_of([str(runs)])) == 4


def test_a_folder_without_models_and_a_single_model_are_refused(tiny: Path, tmp_path: Path):
    (tmp_path / "empty").mkdir()

    with pytest.raises(UserError, match="no directory below it is one"):
        models_of([str(tmp_path / "empty")])
    with pytest.raises(UserError, match="at least two"):
        models_of([str(tiny), str(tiny)])
    with pytest.raises(UserError, match="at least two models; got none"):
        models_of([])


# Packed beside dense.


@pytest.mark.usefixtures("rows_format")
def test_packed_weights_are_compared_as_they_act(tiny: Path, tmp_path: Path):
    write_rows(tiny, tmp_path / "rows")

    found = measured(tiny, tmp_path / "rows")

    dense, rows = found.report.facts
    (change,) = found.changes
    assert (change["changed_tensors"], change["other_tensors"]) == (14, 0)
    assert rows.parameters == dense.parameters
    assert rows.bytes is not None
    assert dense.bytes is not None
    assert rows.bytes < dense.bytes
    assert rows.perplexity is not None
    assert dense.perplexity is not None
    assert rows.perplexity.value == pytest.approx(dense.perplexity.value, rel=0.02)


def test_an_embedding_in_blocks_is_compared_by_what_it_stands_for(tiny: Path, tmp_path: Path):
    done = typed("quantize", "bct", tiny, "-o", tmp_path / "out", "--mode", "w8a32", "--evaluate", "none")
    assert done.code == 0, done.err
    reference = dict(dense_tensors(artifact.load(tiny).model))

    found = difference(reference, artifact.load(tmp_path / "out").model)

    assert found["other_tensors"] == 0
    assert all(float(told.split("(")[1].rstrip(")")) < 0.05 for told in found["most_changed"])


@pytest.mark.usefixtures("rows_format")
def test_a_packed_model_can_be_the_reference(tiny: Path, tmp_path: Path):
    write_rows(tiny, tmp_path / "rows")

    forwards, backwards = measured(tiny, tmp_path / "rows"), measured(tmp_path / "rows", tiny)

    assert backwards.changes[0]["changed_tensors"] == forwards.changes[0]["changed_tensors"]
    assert backwards.changes[0]["other_tensors"] == 0


@pytest.mark.usefixtures("rows_format")
def test_packed_layers_are_named_as_dense_ones(tiny: Path, tmp_path: Path):
    write_rows(tiny, tmp_path / "rows")
    dense, rows = (dict(dense_tensors(artifact.load(path).model)) for path in (tiny, tmp_path / "rows"))

    assert rows.keys() == dense.keys()
    for name, tensor in dense.items():
        assert rows[name].shape == tensor.shape
        assert (rows[name] - tensor).norm() <= 0.01 * tensor.norm(), name


def test_the_difference_counts_changes_and_what_has_no_counterpart():
    model = torch.nn.ModuleDict({"a": torch.nn.Linear(2, 2, bias=False), "b": torch.nn.Linear(2, 3, bias=False)})
    weight_OI = model["a"].weight.detach().clone()
    same = {"a.weight": weight_OI, "b.weight": torch.zeros(3, 2)}

    cut = difference({"a.weight": weight_OI * 2, "b.weight": torch.zeros(2, 2), "c.weight": weight_OI}, model)

    assert (cut["tensors"], cut["changed_tensors"], cut["other_tensors"]) == (2, 1, 2)
    assert cut["most_changed"] == ["a.weight (0.5)"]
    assert cut["change_bytes"] == 4 * 4
    assert difference(same, model)["changed_tensors"] == 1


# Other tokenizers.


@pytest.fixture
def other_tokenizer(tiny: Path, tmp_path: Path) -> Path:
    """The model `tiny` with a tokenizer that cuts text into shorter pieces."""
    directory = tmp_path / "short-tokens"
    texts = [path.read_text() for path in sorted((Path(overhaul.__file__).parent / "texts").glob("*.txt"))]
    tokenizer: Any = AutoTokenizer.from_pretrained(tiny)
    tokenizer.train_new_from_iterator(texts, vocab_size=300, show_progress=False).save_pretrained(directory)
    AutoModelForCausalLM.from_pretrained(tiny).save_pretrained(directory)
    return directory


def test_other_tokenizers_get_bits_per_byte_and_a_note(tiny: Path, other_tokenizer: Path):
    found = measured(tiny, other_tokenizer)

    bits = [{row.metric: row for row in one.metrics}["bits per byte"] for one in found.report.facts]
    (note,) = found.report.warnings
    assert "short-tokens cuts the text into other tokens" in note
    for one, row in zip(found.report.facts, bits, strict=True):
        assert one.perplexity is not None
        assert row.value == pytest.approx(math.log2(one.perplexity.value) * one.perplexity.count / row.count)
        assert row.low < row.value < row.high
    # The same number of tokens, and fewer bytes in each of them.
    assert bits[1].count < bits[0].count


def test_bytes_are_those_of_the_text_that_is_scored(tiny: Path, other_tokenizer: Path):
    """About as many bytes in a token as in any other text: neither tokens nor letters were counted."""
    facts = measured(tiny, other_tokenizer).report.facts

    for one, path in zip(facts, (tiny, other_tokenizer), strict=True):
        tokenizer: Any = AutoTokenizer.from_pretrained(path)
        row = next(row for row in one.metrics if row.metric == "bits per byte")
        text = (Path(overhaul.__file__).parent / "texts" / "moby-dick-029.txt").read_text()
        bytes_a_token = len(text.encode()) / len(tokenizer(text)["input_ids"])
        assert row.count / (2 * 31) == pytest.approx(bytes_a_token, rel=0.3)


def test_one_tokenizer_needs_no_bits_per_byte(tiny: Path, tmp_path: Path):
    shutil.copytree(tiny, tmp_path / "copy")

    report = measured(tiny, tmp_path / "copy").report

    assert report.warnings == ()
    assert [one.metrics for one in report.facts] == [(), ()]


# What is believed of a record.


def test_quality_is_taken_from_the_record_and_speed_is_not(tiny: Path, tmp_path: Path):
    judged = ("--evaluate-windows", "2", "--evaluate-seq-len", "32", "--dtype", "fp32")
    assert typed("prune", "magnitude", tiny, "-o", tmp_path / "half", *judged).code == 0
    stored = artifact.read_record(tmp_path / "half")["facts"][-1]

    _, half = compare([str(tiny), str(tmp_path / "half")], QUICK.model_copy(update={"dtype": "fp32"})).report.facts

    assert half.perplexity is not None
    assert half.perplexity.value == stored["perplexity"]["value"]
    assert half.tokens_per_second != stored["tokens_per_second"]
    assert half.decode_tokens_per_second != stored["decode_tokens_per_second"]


def test_the_chains_are_told(tiny: Path, tmp_path: Path):
    assert typed("prune", "magnitude", tiny, "-o", tmp_path / "half", "--evaluate", "none").code == 0

    (chains,) = measured(tiny, tmp_path / "half").report.tables

    assert [row[:2] for row in chains.rows] == [(tiny.name, "as it came"), ("half", "prune magnitude")]


def test_the_size_of_an_adapter_is_that_with_its_base(tiny: Path, tmp_path: Path):
    words = ("--data", "sample", "--steps", "1", "--batch-size", "1", "--seq-len", "32", "--evaluate", "none")
    done = typed("adapt", "lora", tiny, "-o", tmp_path / "adapter", "--no-merge", *words)
    assert done.code == 0, done.err

    dense, adapter = measured(tiny, tmp_path / "adapter").report.facts

    assert dense.bytes is not None
    assert adapter.bytes is not None
    own = (tmp_path / "adapter" / "adapter_model.safetensors").stat().st_size
    assert adapter.bytes == dense.bytes + own


def test_a_model_that_cannot_be_read_is_said_before_any_is_measured(tiny: Path, tmp_path: Path):
    shutil.copytree(tiny, tmp_path / "broken")
    (tmp_path / "broken" / "model.safetensors").unlink()

    done = typed("compare", tiny, tmp_path / "broken")

    assert done.code == 2
    assert "broken has no weights" in done.err
    assert "measuring" not in done.err


# Classifiers.

MEMORY = ("--memory", "24")
TASKS = ("--split", "2", "--batch-size", "8", "--epochs", "1", "--dtype", "fp32")


@pytest.fixture(scope="module")
def learnt(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder: `cnn`, and `er` and `none` that learnt the same tasks from it, `four` others."""
    root = tmp_path_factory.mktemp("learnt")
    cnn, bars = write_cnn(root / "cnn", classes=4), write_bars(root / "bars.npz")
    for name, flags in {
        "er": MEMORY,
        "none": ("--output-term", "none"),
        "four": (*MEMORY, "--split", "4"),
    }.items():
        done = typed("learn", "bregman", cnn, "-o", root / name, "--tasks", bars, *TASKS, *flags)
        assert done.code == 0, done.err
    return root


def test_classifiers_are_compared_by_what_they_know_of_the_same_tasks(learnt: Path):
    found = measured(learnt / "cnn", learnt / "er", learnt / "none")

    blank, er, _ = found.report.facts
    recorded = {row["metric"]: row for row in artifact.read_record(learnt / "er")["facts"][-1]["metrics"]}
    assert blank.metrics == ()
    for row in er.metrics:
        assert (row.value, row.low, row.high) == tuple(recorded[row.metric][end] for end in ("value", "low", "high"))
    assert [row.metric for row in er.metrics] == ["accuracy, class-IL", "accuracy, task-IL"]
    assert [one.label for one in found.learnt] == ["er", "none"]
    assert found.report.warnings == ("Without a tasks.json, and so without accuracies: cnn.",)
    # The counters of its batch normalisations are no weights.
    names = [
        name for name in artifact.load(learnt / "er", kinds=IMAGES).model.state_dict() if "num_batches" not in name
    ]
    assert found.changes[0]["changed_tensors"] == len(names)
    assert found.changes[0]["other_tensors"] == 0
    assert all("num_batches" not in told for told in found.changes[0]["most_changed"])


def test_accuracies_on_other_tasks_are_not_put_side_by_side(learnt: Path):
    found = measured(learnt / "er", learnt / "four")

    assert [one.metrics for one in found.report.facts] == [(), ()]
    assert found.learnt == ()
    assert found.report.warnings == (
        "Accuracies are not compared: er and four learnt different tasks: 2 and 4 tasks.",
    )  # fmt: skip


def test_classifiers_that_learnt_no_tasks_are_compared_by_their_tensors(learnt: Path, tmp_path: Path):
    found = measured(learnt / "cnn", write_cnn(tmp_path / "other", classes=4, seed=1))

    assert found.report.warnings == ("No model has a tasks.json: what they know is not compared.",)
    assert found.changes[0]["changed_tensors"] > 0


def test_the_command_compares_classifiers_too(learnt: Path, tmp_path: Path):
    models = (learnt / "er", learnt / "none")
    told = typed("compare", *models, "--html", tmp_path / "page.html")

    assert told.code == 0, told.err
    assert "global forgetting, as learnt" in told.out
    page = (tmp_path / "page.html").read_text()
    assert "knows most of the tasks" in page
    assert "Prefill" not in page
    assert "on the front" not in page
    rows = json.loads(typed("compare", *models, "--json").out)
    assert [one["method"] for one in rows["tasks"]["methods"]] == ["er", "none"]
    assert [row["kind"] for row in rows["rows"]] == ["image classifier"] * 2


def test_models_of_several_kinds_and_what_is_of_text_are_refused(learnt: Path, tiny: Path):
    er, none = learnt / "er", learnt / "none"

    refused(typed("compare", er, tiny), "of different kinds: image classifier and causal language model")
    refused(typed("compare", er, none, "--task", "sample"), "--task is of language models")
    refused(typed("compare", er, none, "--spectra"), "--spectra is of language models")
    refused(typed("compare", er, none, "--data", "austen"), "--data austen is of language models")
