"""`extend upsample`: what it is without a change of the mixture, where the change comes, branches, what it refuses."""

from __future__ import annotations

import json
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from command import overhaul, refused
from overhaul.corpora import open_corpus
from overhaul.data import Data
from overhaul.extend.cpt import ContinualPretraining
from overhaul.extend.upsample import Upsampling

RUN = ("--batch-size", "2", "--seq-len", "32", "--dtype", "fp32", "--lr", "1e-3", "--evaluate", "none")


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder, found = tmp_path_factory.mktemp("texts"), {}
    for name in ("web", "papers", "code"):
        found[name] = folder / f"{name}.jsonl"
        lines = (json.dumps({"text": f"{name} number {n} of {n % 7}. " * (3 + n % 9)}) for n in range(300))
        found[name].write_text("\n".join(lines) + "\n")
    return found


@pytest.fixture
def data(tiny: Path, texts: dict[str, Path]) -> Data:
    return Data(open_corpus(texts["web"]), AutoTokenizer.from_pretrained(tiny))


def method(texts: dict[str, Path], **settings: Any) -> Upsampling:
    common: dict[str, Any] = {"steps": 10, "batch_size": 4, "seq_len": 32, "last": 0.2}
    mixes = {"mix": (f"{texts['papers']}=0.25",), "last_mix": (f"{texts['papers']}=0.5", f"{texts['code']}=0.5")}
    return Upsampling(**{**common, **mixes, **settings})


def drawn(chosen: ContinualPretraining, data: Data, windows: int) -> list[dict[str, int]]:
    """The ledger after each window."""
    stream = chosen.mixed(chosen.sources(data), data)
    return [{one.name: one.tokens for one in stream.ledger()} for _ in islice(stream, windows)]


def test_with_one_mixture_for_both_parts_it_is_a_run_without_a_change(tiny: Path, texts, tmp_path: Path):
    """To the bit: the control that every upsampling is held against."""
    mix = (f"{texts['papers']}=0.25", f"{texts['code']}=0.25")
    how = ("--data", texts["web"], *RUN, "--steps", "10", "--mix", *mix)
    assert overhaul("extend", "upsample", tiny, "-o", tmp_path / "up", *how, "--last-mix", *mix).code == 0
    other = ("--data", texts["web"], *RUN, "--steps", "10", "--mix", *mix, "--last", "0.5", "--last-mix", *mix)
    assert overhaul("extend", "upsample", tiny, "-o", tmp_path / "half", *other).code == 0

    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("up", "half"))
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_the_mixture_changes_with_the_step_that_begins_the_last_part(texts, data: Data):
    """10 steps of 4 windows, the last 2 steps of them: after window 32."""
    after = drawn(method(texts), data, 40)

    assert after[31] == {"web.jsonl": 24 * 32, "papers.jsonl": 8 * 32, "code.jsonl": 0}
    assert after[39] == {"web.jsonl": 24 * 32, "papers.jsonl": 12 * 32, "code.jsonl": 4 * 32}


def test_before_the_change_all_branches_read_the_same(texts, data: Data):
    def windows(last: float) -> list[list[int]]:
        chosen = method(texts, last=last)
        return [window["input_ids"].tolist() for window in islice(chosen.mixed(chosen.sources(data), data), 40)]

    assert windows(0.1)[:28] == windows(0.3)[:28]
    assert windows(0.1)[:36] != windows(0.3)[:36]


def test_epochs_are_passes_over_the_text_of_data_in_both_parts(texts):
    assert method(texts).new_share() == pytest.approx(0.8 * 0.75)
    assert method(texts, part=(0.0, 0.8)).new_share() == pytest.approx(0.75)
    assert method(texts, part=(0.8, 1.0), go_on=True).new_share() == pytest.approx(0)


@pytest.mark.parametrize("schedule", ["rewarm-cosine", "wsd", "infinite"])
def test_a_trunk_and_its_branch_are_one_run(tiny: Path, texts, tmp_path: Path, schedule: str):
    """Moments, places and the rate go on through the border, whatever the schedule."""
    mixes = ("--mix", f"{texts['papers']}=0.25", "--last-mix", f"{texts['papers']}=0.5", f"{texts['code']}=0.25")
    how = ("--data", texts["web"], *RUN, *mixes, "--schedule", schedule)
    whole, trunk, branch = (tmp_path / name for name in ("whole", "trunk", "branch"))
    upsample = ("extend", "upsample")
    assert overhaul(*upsample, tiny, "-o", whole, *how, "--steps", "10").code == 0
    assert overhaul(*upsample, tiny, "-o", trunk, *how, "--steps", "8", "--part", "0", "0.8", "--keep-state").code == 0
    assert overhaul(*upsample, trunk, "-o", branch, *how, "--steps", "2", "--part", "0.8", "1", "--go-on").code == 0

    one, two = (load_file(made / "model.safetensors") for made in (whole, branch))
    assert all(torch.equal(one[name], two[name]) for name in one)
    rates = [
        json.loads(line)["lr"] for made in (trunk, branch) for line in (made / "metrics.jsonl").read_text().splitlines()
    ]
    assert rates == pytest.approx(
        [json.loads(line)["lr"] for line in (whole / "metrics.jsonl").read_text().splitlines()]
    )


@pytest.mark.parametrize("last", [0.1, 0.2, 0.3, 0.55, 0.7, 0.8, 0.85, 0.9, 0.95])
def test_a_trunk_may_end_wherever_the_last_part_begins(texts, data: Data, last: float):
    begins = round(1 - last, 2)
    trunk = method(texts, steps=20, last=last, part=(0.0, begins))
    branch = method(texts, steps=20, last=last, part=(begins, 1.0), go_on=True)

    assert [len(chosen._lengths(data)) for chosen in (trunk, branch)] == [1, 1]


def test_a_file_of_shares_is_recorded_by_what_it_says(tiny: Path, texts, tmp_path: Path):
    file = tmp_path / "shares.yaml"
    file.write_text(f"{texts['papers']}: 0.25\n{texts['code']}: 0.25\n")
    how = ("--data", texts["web"], *RUN, "--steps", "5", "--mix", file, "--last-mix", f"{texts['code']}=1")
    assert overhaul("extend", "upsample", tiny, "-o", tmp_path / "up", *how).code == 0
    record = json.loads((tmp_path / "up" / "overhaul.json").read_text())["lineage"][-1]

    assert record["fields"]["mix"] == [f"{texts['papers']}=0.25", f"{texts['code']}=0.25"]
    file.unlink()
    assert overhaul("run", tmp_path / "up" / "recipe.yaml", f"out={tmp_path / 'again'}").code == 0


def test_a_text_that_gave_nothing_has_no_tokens_in_the_record(tiny: Path, texts, tmp_path: Path):
    how = (
        "--data",
        texts["web"],
        *RUN,
        "--steps",
        "5",
        "--mix",
        f"{texts['code']}=1",
        "--last-mix",
        f"{texts['papers']}=1",
    )
    assert overhaul("extend", "upsample", tiny, "-o", tmp_path / "up", *how).code == 0
    record = json.loads((tmp_path / "up" / "overhaul.json").read_text())["lineage"][-1]

    assert record["data"]["tokens"] == 0
    assert sum(one["tokens"] for one in record["beside"]) == 5 * 2 * 32


def test_the_same_text_under_two_names_is_refused(tiny: Path, texts, tmp_path: Path):
    copied = tmp_path / "copied.jsonl"
    copied.write_bytes(texts["code"].read_bytes())
    how = (
        "--data",
        texts["web"],
        *RUN,
        "--steps",
        "5",
        "--last-mix",
        f"{texts['code']}=0.2",
        f"{copied}=0.2",
        "--dry-run",
    )
    refused(overhaul("extend", "upsample", tiny, "-o", tmp_path / "up", *how), "is the same text as")
    asked = tmp_path / "asked.jsonl"
    asked.write_text("".join(json.dumps({"question": f"{n} + 1?", "answer": str(n + 1)}) + "\n" for n in range(300)))
    itself = ("--data", asked, *RUN, "--steps", "5", "--last-mix", f"{asked}=0.5", "--dry-run")
    refused(overhaul("extend", "upsample", tiny, "-o", tmp_path / "up", *itself), "is the new text itself")


def test_the_record_has_all_texts_by_where_they_are(tiny: Path, texts, tmp_path: Path, monkeypatch):
    monkeypatch.chdir(texts["web"].parent)
    how = ("--data", "web.jsonl", *RUN, "--steps", "5", "--mix", "papers.jsonl=0.25", "--last-mix", "code.jsonl=0.5")
    assert overhaul("extend", "upsample", tiny, "-o", tmp_path / "up", *how).code == 0
    record = json.loads((tmp_path / "up" / "overhaul.json").read_text())["lineage"][-1]

    assert record["fields"]["mix"] == [f"{texts['papers']}=0.25"]
    assert record["fields"]["last_mix"] == [f"{texts['code']}=0.5"]
    assert {one["name"]: one["tokens"] for one in record["beside"]} == {"papers.jsonl": 64, "code.jsonl": 32}


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"last": 0.0}, "greater than 0"),
        ({"last": 1.0}, "less than 1"),
        ({"last_mix": ()}, "last_mix is empty"),
        ({"last_mix": ("code=0.7", "papers=0.6")}, "sum to 1.3"),
        ({"replay": "sample", "last_mix": ("sample=0.5",)}, "sample is replayed"),
        ({"replay": "sample", "replay_share": 0.6, "last_mix": ("code=0.5",)}, "last_mix and replay together are 1.1"),
        ({"replay": "sample", "mix": ("sample=0.5",)}, "mix and replay are both sample"),
        ({"replay": "sample", "replay_share": 0.6, "mix": ("code=0.5",)}, "mix and replay together are 1.1"),
        ({"part": (0.8, 0.2), "go_on": True}, "ends before it begins"),
        ({"part": (0.0, 0.2), "go_on": True}, "is the beginning of a run"),
        ({"epochs": 1.0, "mix": ("code=1",), "last_mix": ("code=1",)}, "which has no share of the tokens"),
        ({"mix": ("nothing.yaml",)}, "No such file"),
        ({"part": (0.2, 0.8)}, "is the later part of a run"),
    ],
)
def test_settings_that_do_not_fit(settings: dict[str, Any], says: str):
    with pytest.raises(ValidationError, match=says):
        Upsampling(**{"last_mix": ("code=0.5",), **settings})


def test_a_last_part_of_no_step_is_told(tiny: Path, texts, data: Data, capsys: pytest.CaptureFixture[str]):
    chosen = method(texts, steps=4, last=0.1)
    assert drawn(chosen, data, 16)[-1]["papers.jsonl"] == 4 * 32

    chosen.check(AutoModelForCausalLM.from_pretrained(tiny), data)
    assert "of 4 steps there is none with the mixture that ends at 1 of the run" in capsys.readouterr().err


def test_a_text_that_is_not_there_is_refused(tiny: Path, texts, tmp_path: Path):
    how = ("--data", texts["web"], *RUN, "--last-mix", "stdlbi=0.5", "--dry-run")
    refused(overhaul("extend", "upsample", tiny, "-o", tmp_path / "up", *how), "neither a name nor an existing path")
    itself = ("--data", texts["web"], *RUN, "--last-mix", f"{texts['web']}=0.5", "--dry-run")
    refused(overhaul("extend", "upsample", tiny, "-o", tmp_path / "up", *itself), "is the new text itself")
