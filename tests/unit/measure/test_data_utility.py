"""`measure data-utility`: which mixtures are tried, what a text is worth to itself, intervals, bad input."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from scipy import stats
from transformers import AutoModelForCausalLM, AutoTokenizer

from command import overhaul, refused
from overhaul.corpora import open_corpus
from overhaul.data import Data
from overhaul.evaluate import mean_over_runs
from overhaul.measure.data_utility import DataUtility

QUICK: dict[str, Any] = {"steps": 12, "batch_size": 4, "seq_len": 32, "lr": 3e-3, "windows": 4}


def write(path: Path, word: str) -> Path:
    lines = (json.dumps({"text": f"{word} number {n} of {n % 7}, {word}. " * (3 + n % 6)}) for n in range(300))
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("texts")
    return {word: write(folder / f"{word}.jsonl", word) for word in ("web", "papers", "code")}


@pytest.fixture
def data(tiny: Path, texts: dict[str, Path]) -> Data:
    return Data(open_corpus(texts["web"]), AutoTokenizer.from_pretrained(tiny), model=str(tiny))


def test_what_is_left_out_is_shared_out_over_the_others(data: Data, texts: dict[str, Path]):
    papers, code = str(texts["papers"]), str(texts["code"])
    tried = DataUtility(last_mix=(f"{papers}=0.2", f"{code}=0.3"))._mixtures(data)

    assert tried == {
        "all texts": {papers: 0.2, code: 0.3},
        "papers.jsonl": {code: pytest.approx(0.375)},
        "code.jsonl": {papers: pytest.approx(0.2 / 0.7)},
        "web.jsonl": {papers: pytest.approx(0.4), code: pytest.approx(0.6)},
    }


def test_without_a_text_the_loss_on_it_is_higher(tiny: Path, texts, data: Data):
    """And the model that was given is as it was."""
    model = AutoModelForCausalLM.from_pretrained(tiny)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    mix = (f"{texts['papers']}=0.3", f"{texts['code']}=0.3")
    table = DataUtility(last_mix=mix, mix=(f"{texts['papers']}=0.05",), runs=2, **QUICK).measure(model, data)

    utility = {row.metric: row for row in table.rows}
    for word in ("papers", "code"):
        row = utility[f"utility of {word}.jsonl on {word}.jsonl"]
        assert row.value > 0
        assert row.low < row.value < row.high
        assert row.count == 2
    assert utility["utility of web.jsonl on web.jsonl"].value > 0
    assert utility["utility of the change on code.jsonl"].value > 0
    assert len(table.details) == 2 * 5
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_the_interval_is_students():
    values = [0.3, 0.5, 0.1, 0.4]
    found = mean_over_runs(values)

    wanted = stats.ttest_1samp(values, 0).confidence_interval()
    assert (found.low, found.high) == pytest.approx((wanted.low, wanted.high))
    assert mean_over_runs([0.25]).low == mean_over_runs([0.25]).high == 0.25


def test_it_goes_on_from_a_trunk(tiny: Path, texts, tmp_path: Path):
    mixes = ("--last-mix", f"{texts['code']}=0.5")
    run = ("--data", texts["web"], *mixes, "--batch-size", "2", "--seq-len", "32")
    trunk = ("--part", "0", "0.8", "--keep-state", "--steps", "8", "--evaluate", "none", "--dtype", "fp32")
    assert overhaul("extend", "upsample", tiny, "-o", tmp_path / "trunk", *run, *trunk).code == 0
    quick = ("--steps", "2", "--runs", "1", "--windows", "2", "--dtype", "fp32", "--json")
    found = overhaul("measure", "data-utility", tmp_path / "trunk", *run, *quick, "--go-on")
    assert found.code == 0, found.err

    assert len(json.loads(found.out)["rows"]) == 2 * 2
    refused(
        overhaul("measure", "data-utility", tiny, *run, *quick, "--go-on"), "which a run to go on from leaves there"
    )


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({}, "last_mix is empty"),
        ({"last_mix": ("code=1",)}, "has code alone"),
        ({"last_mix": ("code=0.8", "web=0.4")}, "sum to 1.2"),
        ({"last_mix": ("code=0.5",), "runs": 0}, "greater than 0"),
    ],
)
def test_settings_that_do_not_fit(settings: dict[str, Any], says: str):
    with pytest.raises(ValidationError, match=says):
        DataUtility(**settings)
