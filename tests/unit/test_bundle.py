"""The bundle as a directory: what is in it, what is not, and what is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open

from command import contents, overhaul, refused
from overhaul import artifact
from overhaul.bundle import Bundle, Example, write_lines
from overhaul.corpora import open_corpus

Spoilt = Callable[[Path], None]


def rows(file: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


@pytest.fixture
def copy(bundle: Path, tmp_path: Path) -> Path:
    """A copy, to be damaged."""
    return shutil.copytree(bundle, tmp_path / "copy")


def test_of_the_rows_only_the_seeds_are_in_it(bundle: Path, private: Path):
    corpus = open_corpus(private / "private.jsonl")
    seeds = {row["prompt"]: row["answer"] for row in rows(bundle / "seeds.jsonl")}
    held = {file: file.read_bytes() for file in bundle.rglob("*") if file.is_file()}

    learnt_from = {row["prompt"]: row["completion"] for row in corpus.train}
    assert len(seeds) == 5
    assert seeds.items() <= learnt_from.items()
    for prompt in {row["prompt"] for row in rows(private / "private.jsonl")} - seeds.keys():
        assert [file for file, content in held.items() if prompt.removeprefix("sort ").encode() in content] == []
    with safe_open(bundle / "features.safetensors", framework="np") as stored:
        assert {name: stored.get_slice(name).get_shape() for name in stored.keys()} == {"sum": [512]}  # noqa: SIM118


def test_what_is_known_of_the_data(bundle: Path, private: Path):
    made, corpus = Bundle.read(bundle), open_corpus(private / "private.jsonl")

    assert (made.frame.before, made.frame.after) == ("sort ", " :")
    assert made.statistics["rows"] == len(corpus.train)
    assert made.real.count == len(corpus.calib) + len(corpus.heldout) == made.judge["heldout_real"]
    assert 0 <= made.judge["auroc"] <= 1
    assert made.ledger["rows_of_data"] == 5
    assert {"longest_common_run_words", "equal_to_a_row_share"} <= made.ledger.keys()
    made.check()


def test_same_seed_same_bundle(bundle: Path, adapter: Path, private: Path, tmp_path: Path):
    how = ("--data", private / "private.jsonl", "--rows", 40, "--steps", 10)
    assert overhaul("bundle", adapter, "-o", tmp_path / "again", *how).code == 0

    assert contents(tmp_path / "again") == contents(bundle)


def test_a_whole_model_is_a_teacher_by_its_path(tiny: Path, private: Path, tmp_path: Path):
    out = tmp_path / "bundle"
    done = overhaul("bundle", tiny, "-o", out, "--data", private / "private.jsonl", "--rows", 20, "--steps", 2)

    assert done.code == 0, done.err
    assert Bundle.read(out).teacher_path == str(tiny)
    assert not (out / "teacher").exists()


def test_a_bundle_is_pointed_at_another_teacher(bundle: Path, tiny: Path, tmp_path: Path):
    out = tmp_path / "next"
    done = overhaul("bundle", tiny, "-o", out, "--from", bundle)

    assert done.code == 0, done.err
    old, new = Bundle.read(bundle), Bundle.read(out)
    new.check()
    assert new.teacher_path == str(tiny)
    assert (new.seeds, new.judge, new.frame, new.ledger) == (old.seeds, old.judge, old.frame, old.ledger)
    assert contents(out / "judge") == contents(bundle / "judge")


def test_only_an_adapter_and_its_tokenizer_are_copied(
    adapter: Path, bundle: Path, private: Path, tiny: Path, tmp_path: Path
):
    crowded = shutil.copytree(adapter, tmp_path / "crowded")
    shutil.copy2(private / "private.jsonl", crowded / "tokenized_private.jsonl")
    shutil.copy2(private / "private.jsonl", crowded / "tokens.jinja")
    (crowded / "token-cache").mkdir()
    shutil.copy2(tiny / "tokenizer.json", crowded)

    done = overhaul("bundle", crowded, "-o", tmp_path / "out", "--from", bundle)

    assert done.code == 0, done.err
    assert {file.name for file in (tmp_path / "out" / "teacher").iterdir()} == {
        *("adapter_config.json", "adapter_model.safetensors", "tokenizer.json"),
        *(file.name for file in (bundle / "teacher").iterdir()),
    }


def test_a_line_break_of_another_kind_may_stand_in_a_seed(copy: Path):
    seeds = [Example(f"sort {number} {mark} 2 :", f" 1{mark}2") for number, mark in enumerate("\u2028\u2029\x85\r\v")]
    write_lines(copy / "seeds.jsonl", [asdict(seed) for seed in seeds])
    _edited(copy, lambda stored: stored["parts"].update(contents(copy)))

    assert Bundle.read(copy).seeds == tuple(seeds)


def test_where_another_teacher_cannot_be_written(bundle: Path, tiny: Path, tmp_path: Path):
    full, file = tmp_path / "full", tmp_path / "file"
    full.mkdir()
    (full / "something").write_text("")
    file.write_text("")

    for out, says in (
        (full, "is not empty"),
        (file, "is a file"),
        (bundle / "next", "inside"),
        (tiny / "next", "inside"),
    ):
        refused(overhaul("bundle", tiny, "-o", out, "--from", bundle), says)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["file", "full"]
    assert not (bundle / "next").exists()


@pytest.fixture
def moved(bundle: Path, tiny: Path, tmp_path: Path) -> Callable[[str], Path]:
    """`moved("base")` or `moved("teacher")` -> a bundle whose model is somewhere else by now."""

    def make(what: str) -> Path:
        gone, out = shutil.copytree(tiny, tmp_path / "gone"), tmp_path / "moved"
        assert overhaul("bundle", gone, "-o", out, "--from", bundle).code == 0
        if what == "base":
            _edited(out, lambda stored: stored["base"].update(path=str(gone)))
            _edited(out, lambda stored: stored["teacher"].update(path=str(tiny)))
        gone.rename(tmp_path / "elsewhere")
        return out

    return make


@pytest.mark.parametrize("what", ["base", "teacher"])
def test_a_model_that_is_gone_is_named_with_its_bundle(
    moved: Callable[[str], Path], tiny: Path, tmp_path: Path, what: str
):
    found = moved(what)

    done = overhaul("adapt", "translora", tiny, "-o", tmp_path / "out", "--bundle", found)

    refused(done, f"the {what} of {found}, {tmp_path / 'gone'}, is not there")


def test_a_teacher_that_is_gone_is_replaced(moved: Callable[[str], Path], tmp_path: Path):
    done = overhaul("bundle", tmp_path / "elsewhere", "-o", tmp_path / "next", "--from", moved("teacher"))

    assert done.code == 0, done.err
    Bundle.read(tmp_path / "next").check()


def test_a_base_that_was_moved_is_found_again(adapter: Path, private: Path, tiny: Path, other: Path, tmp_path: Path):
    gone, own = shutil.copytree(tiny, tmp_path / "gone"), shutil.copytree(adapter, tmp_path / "own")
    config = json.loads((own / "adapter_config.json").read_text()) | {"base_model_name_or_path": str(gone)}
    (own / "adapter_config.json").write_text(json.dumps(config))
    how = ("--data", private / "private.jsonl", "--rows", 20, "--steps", 2)
    assert overhaul("bundle", own, "-o", tmp_path / "old", *how).code == 0
    there = gone.rename(tmp_path / "elsewhere")
    again = ("bundle", tmp_path / "old" / "teacher", "-o", tmp_path / "new", "--from", tmp_path / "old", "--base")

    refused(overhaul(*again, other), "is not the model that the judge of")
    done = overhaul(*again, there)

    assert done.code == 0, done.err
    new = Bundle.read(tmp_path / "new")
    new.check()
    assert new.base.path == str(there)
    assert artifact.directories(new.teacher_path) == (new.path / "teacher", there)
    quick = ("--samples", 4, "--steps", 1, "--threshold", 0, "--evaluate", "none")
    done = overhaul("adapt", "translora", tiny, "-o", tmp_path / "out", "--bundle", new.path, *quick)
    assert done.code == 0, done.err


@pytest.fixture
def other(make_tiny: Callable[..., Path]) -> Path:
    return make_tiny(tie=False)


def test_another_teacher_does_not_help_where_the_base_is_gone(moved: Callable[[str], Path], tiny: Path, tmp_path: Path):
    found = moved("base")

    refused(overhaul("bundle", tiny, "-o", tmp_path / "next", "--from", found), f"the base of {found}", "is not there")


@pytest.mark.parametrize(
    ("part", "says"),
    [
        ("bundle.json", "is no bundle"),
        ("judge/adapter_model.safetensors", "has no judge"),
        ("teacher/adapter_config.json", "has no teacher"),
        ("seeds.jsonl", "has no seeds"),
        ("features.safetensors", "has no sums"),
    ],
)
def test_a_missing_part_is_named(copy: Path, tiny: Path, tmp_path: Path, part: str, says: str):
    (copy / part).unlink()

    refused(overhaul("adapt", "translora", tiny, "-o", tmp_path / "out", "--bundle", copy), says)


def _edited(copy: Path, change: Callable[[dict[str, Any]], object]) -> None:
    stored = json.loads((copy / "bundle.json").read_text())
    change(stored)
    (copy / "bundle.json").write_text(json.dumps(stored))


def _cut_seeds(copy: Path) -> None:
    (copy / "seeds.jsonl").write_text((copy / "seeds.jsonl").read_text()[:-9])


def _renamed_column(copy: Path) -> None:
    (copy / "seeds.jsonl").write_text((copy / "seeds.jsonl").read_text().replace('"answer"', '"completion"'))


def _cut_sums(copy: Path) -> None:
    (copy / "features.safetensors").write_bytes((copy / "features.safetensors").read_bytes()[:100])


def _cut_config(copy: Path) -> None:
    (copy / "judge" / "adapter_config.json").write_text("{")


def _no_ledger(copy: Path) -> None:
    _edited(copy, lambda stored: stored.pop("ledger"))


def _no_threshold(copy: Path) -> None:
    _edited(copy, lambda stored: stored["judge"].pop("threshold"))


def _no_hash(copy: Path) -> None:
    _edited(copy, lambda stored: stored["parts"].pop("seeds.jsonl"))


def _unknown_field(copy: Path) -> None:
    _edited(copy, lambda stored: stored["base"].update(name="other"))


def _a_list(copy: Path) -> None:
    (copy / "bundle.json").write_text("[]")


def _one_seed(copy: Path) -> None:
    (copy / "seeds.jsonl").write_text((copy / "seeds.jsonl").read_text().splitlines()[0] + "\n")


def _other_seed(copy: Path) -> None:
    (copy / "seeds.jsonl").write_text((copy / "seeds.jsonl").read_text().replace("sort", "mix"))


def _other_format(copy: Path) -> None:
    (copy / "bundle.json").write_text('{"format": "another"}')


def _no_json(copy: Path) -> None:
    (copy / "bundle.json").write_text("{")


def _other_base(copy: Path) -> None:
    stored = json.loads((copy / "bundle.json").read_text())
    stored["base"]["sha256"] = stored["base"]["base_sha256"] = "0" * 64
    (copy / "bundle.json").write_text(json.dumps(stored))


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (_one_seed, "has 1 seeds"),
        (_other_seed, "seeds.jsonl is not as it was written"),
        (_other_format, "another format"),
        (_no_json, "not valid JSON"),
        (_other_base, "is not the model that the judge"),
        (_cut_seeds, "seeds.jsonl is not as it was written"),
        (_renamed_column, "seeds.jsonl is not as it was written"),
        (_cut_sums, "features.safetensors is not as it was written"),
        (_cut_config, "judge/adapter_config.json is not as it was written"),
        (_no_ledger, "it has no 'ledger'"),
        (_no_threshold, "it has no 'threshold'"),
        (_no_hash, "it has no 'seeds.jsonl'"),
        (_unknown_field, "unexpected keyword argument 'name'"),
        (_a_list, "another format"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_a_changed_part_is_refused(copy: Path, tiny: Path, tmp_path: Path, spoil: Spoilt, says: str):
    spoil(copy)

    refused(overhaul("adapt", "translora", tiny, "-o", tmp_path / "out", "--bundle", copy), says)
    assert not (tmp_path / "out").exists()


def test_what_cannot_become_a_bundle(adapter: Path, bundle: Path, private: Path, tmp_path: Path):
    few = tmp_path / "few.jsonl"
    few.write_text("".join((private / "private.jsonl").read_text().splitlines(keepends=True)[:9]))
    data, out = private / "private.jsonl", tmp_path / "out"

    refused(overhaul("bundle", adapter, "-o", out), "needs --data")
    refused(overhaul("bundle", adapter, "-o", out, "--data", few), "different prompts", "10 and 4")
    refused(overhaul("bundle", adapter, "-o", out, "--data", "sample"), "no prompts with answers")
    refused(overhaul("bundle", adapter, "-o", out, "--data", data, "--seeds", 1), "seeds", "2")
    refused(overhaul("bundle", adapter, "-o", out, "--data", data, "--from", bundle), "without --data")
    unread = ("--seeds", 3, "--steps", 5, "--seed", 1)
    refused(overhaul("bundle", adapter, "-o", out, "--data", data, "--base", adapter), "with --from")
    refused(overhaul("bundle", adapter, "-o", out, "--from", bundle, *unread), "without --seeds, --steps, --seed")
    refused(overhaul("bundle", adapter, "-o", bundle, "--data", data), "not empty")
    refused(overhaul("bundle", tmp_path, "-o", out, "--data", data), "not a model directory")
    assert not out.exists()
