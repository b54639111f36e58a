"""`extend stability-gap`: which documents each pass reads, what it is with one pass over all, what it refuses."""

from __future__ import annotations

import json
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file
from transformers import AutoTokenizer

from command import overhaul, refused
from overhaul import journal
from overhaul.corpora import open_corpus
from overhaul.data import Data
from overhaul.errors import UserError
from overhaul.extend.stability_gap import Draw, StabilityGap

RUN = ("--batch-size", "2", "--seq-len", "32", "--dtype", "fp32", "--lr", "1e-3", "--evaluate", "none")


def write(path: Path, *kinds: str, count: int = 240) -> Path:
    """Documents of several kinds by turns, each kind with words of its own."""
    lines = (
        json.dumps({"text": f"{kinds[n % len(kinds)]} number {n} of {kinds[n % len(kinds)]} {n % 7}. " * (2 + n % 5)})
        for n in range(count)
    )
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("texts")
    kinds = {"all": ("good prose", "xq 77 zz"), "good": ("good prose",), "other": ("something else",)}
    return {name: write(folder / f"{name}.jsonl", *kind) for name, kind in kinds.items()}


@pytest.fixture
def data(tiny: Path, texts: dict[str, Path]) -> Data:
    return Data(open_corpus(texts["all"]), AutoTokenizer.from_pretrained(tiny))


def method(**settings: Any) -> StabilityGap:
    return StabilityGap(**{"steps": 20, "batch_size": 4, "seq_len": 32, "passes": 4, **settings})


def test_every_pass_reads_the_same_documents_in_another_order():
    lengths_D = np.array([3, 4, 5, 6])
    draw = Draw(np.array([7, 2, 9, 4]), lengths_D, 18, seed=0)

    passes = [draw(number).tolist() for number in range(5)]
    assert all(sorted(one) == [2, 4, 7, 9] for one in passes)
    assert len({tuple(one) for one in passes}) > 1
    assert draw.read_in(5).tolist() == [2, 4, 7, 9]


def test_a_dynamic_draw_has_its_tokens_and_no_document_twice():
    rng = np.random.default_rng(0)
    pool_D, lengths_D = np.arange(100), rng.integers(5, 20, 100)
    draw = Draw(pool_D, lengths_D, 300, seed=1)

    for number in range(6):
        drawn_D = draw(number)
        tokens = int(lengths_D[drawn_D].sum())
        assert len(set(drawn_D.tolist())) == len(drawn_D)
        assert 300 <= tokens < 320
    assert len(draw.read_in(4)) > len(draw(0))


def test_the_best_documents_are_those_like_the_reference(data: Data, texts):
    draw = method(reference=str(texts["good"]), order=2)._chosen(data)

    chosen = [data.corpus.train[place]["text"] for place in draw.pool_D]
    assert len(chosen) > 5
    assert all(text.startswith("good prose") for text in chosen)
    assert draw.pool_D.tolist() != sorted(draw.pool_D.tolist())


def test_without_a_reference_any_documents_are_chosen(data: Data):
    draw = method()._chosen(data)

    kinds = {data.corpus.train[place]["text"][:4] for place in draw.pool_D}
    assert kinds == {"good", "xq 7"}
    assert draw.lengths_D.sum() == pytest.approx(20 * 4 * 32 / 4, rel=0.1)


def test_the_tokens_of_the_run_are_passes_over_the_chosen_ones(data: Data, texts):
    """So the report's count of passes is the one that was asked for."""
    chosen = method(steps=40, mix=(f"{texts['other']}=0.2",))
    stream = chosen.mixed(chosen.sources(data), data)
    for _ in islice(stream, 40 * 4):
        pass

    ledger = {one.name: one for one in stream.ledger()}
    assert ledger["all.jsonl"].passes == pytest.approx(4, abs=0.3)
    assert ledger["other.jsonl"].tokens == 40 * 4 * 32 * 0.2


def test_what_was_chosen_is_told(data: Data, texts):
    with journal.recording() as notes:
        method(reference=str(texts["good"]), order=2, draw="dynamic").sources(data)

    (table,) = notes.tables
    everything, read = table.rows
    assert everything[1] == f"{len(data.corpus.train):,}"
    assert 0 < int(read[1].replace(",", "")) < len(data.corpus.train)
    assert float(read[4]) < float(everything[4])


def test_the_record_tells_where_the_reference_is(tiny: Path, texts, tmp_path: Path, monkeypatch):
    monkeypatch.chdir(texts["all"].parent)
    how = ("--data", "all.jsonl", *RUN, "--steps", "4", "--passes", "1", "--reference", "good.jsonl", "--order", "2")
    assert overhaul("extend", "stability-gap", tiny, "-o", tmp_path / "out", *how).code == 0

    monkeypatch.chdir(tmp_path)
    assert overhaul("run", tmp_path / "out" / "recipe.yaml", f"out={tmp_path / 'again'}").code == 0


def test_a_run_does_not_go_on_with_another_choice(tiny: Path, data: Data, texts, tmp_path: Path):
    one, other = (method(reference=str(texts[name]), order=2).sources(data)["all.jsonl"] for name in ("good", "other"))
    next(one.windows)

    with pytest.raises(UserError, match="is now chosen as"):
        other.windows.load_state_dict(one.windows.state_dict())
    assert one.key != other.key


@pytest.mark.parametrize("draw", ["fixed", "dynamic"])
def test_two_runs_are_one(tiny: Path, texts, tmp_path: Path, draw: str):
    """An interrupted run goes on in the middle of a pass: places are kept, whatever was chosen."""
    how = ("--data", texts["all"], "--replay", texts["other"], *RUN, "--passes", "2", "--draw", draw,
           "--reference", texts["good"], "--order", "2", "--schedule", "constant")  # fmt: skip
    gap = ("extend", "stability-gap")
    whole, one, two = (tmp_path / name for name in ("whole", "one", "two"))
    assert overhaul(*gap, tiny, "-o", whole, *how, "--steps", "12").code == 0
    assert overhaul(*gap, tiny, "-o", one, *how, "--steps", "6", "--passes", "1", "--keep-state").code == 0
    assert overhaul(*gap, one, "-o", two, *how, "--steps", "6", "--passes", "1", "--go-on").code == 0

    first, second = (load_file(made / "model.safetensors") for made in (whole, two))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_the_parts_of_a_run_read_the_same_documents(data: Data):
    trunk, branch = (
        method(steps=steps, part=part, go_on=bool(part[0]))._chosen(data)
        for steps, part in ((16, (0.0, 0.8)), (4, (0.8, 1.0)))
    )
    assert trunk.key() == branch.key() == method(steps=20)._chosen(data).key()


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"epochs": 2.0}, "use steps for the tokens of the run, and passes"),
        ({"pool": 0.5}, "greater than or equal to 1"),
        ({"passes": 0}, "greater than 0"),
        ({"mix": ("sample=1",)}, "leave nothing of the tokens for data"),
    ],
)
def test_settings_that_do_not_fit(settings: dict[str, Any], says: str):
    with pytest.raises(ValidationError, match=says):
        StabilityGap(**settings)


def test_more_than_there_is_is_refused(tiny: Path, texts, tmp_path: Path):
    how = ("extend", "stability-gap", tiny, "-o", tmp_path / "out", "--data", texts["all"], *RUN, "--dry-run")

    refused(overhaul(*how, "--steps", "5000"), "one pass would be 80,000 tokens", "--steps up to")
    assert "times all of" not in overhaul(*how, "--steps", "1500", "--passes", "8").err
    refused(overhaul(*how, "--steps", "1500", "--draw", "dynamic"), "2 times the tokens of a pass", "--steps up to")
    refused(overhaul(*how, "--steps", "20", "--reference", "gooood"), "neither a name nor an existing path")
    bad = tmp_path / "bad.arpa"
    bad.write_text("nothing of that kind")
    refused(overhaul(*how, "--steps", "20", "--reference", bad), "bad.arpa")


def test_a_reference_that_is_not_there_is_told_before_anything_is_measured(tiny: Path, texts, tmp_path: Path):
    how = ("--data", texts["all"], "--steps", "4", "--batch-size", "2", "--seq-len", "32", "--evaluate-seq-len", "32")
    done = overhaul("extend", "stability-gap", tiny, "-o", tmp_path / "out", *how, "--reference", "gooood")

    refused(done, "neither a name nor an existing path")
    assert "measuring" not in done.err
