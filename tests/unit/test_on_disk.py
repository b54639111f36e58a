"""Corpora that stay on disk: the parts, what is learnt once, memory, and a training on one."""

from __future__ import annotations

import json
import random
import tracemalloc
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import zstandard
from transformers import AutoTokenizer

from command import overhaul
from overhaul import data as data_module
from overhaul import on_disk
from overhaul.corpora import Corpus, as_plain_text, open_corpus
from overhaul.data import Data
from overhaul.documents import Reading, Row
from overhaul.errors import UserError
from overhaul.on_disk import RowsOnDisk


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """All is small: a corpus of 20 kB is large."""
    for name, value in {"LARGE_BYTES": 20_000, "HELDOUT_BYTES": 6_000, "CALIB_BYTES": 3_000, "AT_HAND": 20}.items():
        monkeypatch.setattr(on_disk, name, value)
    monkeypatch.setattr(data_module, "IN_MEMORY_BYTES", 20_000)
    monkeypatch.setenv("OVERHAUL_CACHE", str(tmp_path / "cache"))


def rows(count: int, *, seed: int = 0) -> list[dict[str, str]]:
    draw = random.Random(seed)
    words = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
    return [{"text": f"{number}. " + " ".join(draw.choices(words, k=60)) + "."} for number in range(count)]


def write(path: Path, some: list[dict[str, Any]]) -> Path:
    lines = "".join(json.dumps(row) + "\n" for row in some).encode()
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(zstandard.compress(lines) if path.suffix == ".zst" else lines)
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two files, one of them packed; the second repeats a row of the first."""
    some = rows(300)
    write(tmp_path / "texts" / "a.jsonl", some[:150])
    write(tmp_path / "texts" / "b.jsonl.zst", [*some[150:], some[3]])
    return tmp_path / "texts"


def texts(part: Any) -> list[str]:
    return [row["text"] for row in part]


def test_the_parts_are_all_rows_in_order_without_leaks(folder: Path):
    corpus = open_corpus(folder)
    everything = texts(Reading(folder))

    assert isinstance(corpus.train, RowsOnDisk)
    others = {*texts(corpus.heldout), *texts(corpus.calib)}
    assert texts(corpus.train) == [text for text in everything if text not in others]
    assert len(corpus.train) == len(list(corpus.train))
    assert corpus.check_leakage() == []
    assert corpus.bytes == sum(len(text) for text in everything)


def test_the_least_hashes_are_held_out_then_kept_for_calibration(folder: Path):
    corpus = open_corpus(folder)
    order = sorted({row.id: row for row in Reading(folder)}.values(), key=lambda row: row.id)

    assert [*corpus.heldout, *corpus.calib] == order[: len(corpus.heldout) + len(corpus.calib)]
    sizes = [sum(map(len, texts(part))) for part in (corpus.heldout, corpus.calib)]
    assert 6_000 <= sizes[0] < 6_400
    assert 2_600 <= sizes[1] < 3_400


def test_what_the_held_out_text_repeats_is_left_out(tmp_path: Path):
    """A line that all documents have stays in none of those that are trained on."""
    line = "This licence text, of more than fifty characters, stands in every document."
    some = [{"text": f"{row['text']}\n{line}"} for row in rows(300)]
    corpus = open_corpus(write(tmp_path / "a.jsonl", some))

    assert isinstance(corpus.train, RowsOnDisk)
    assert not any(line in text for text in (*texts(corpus.train), *texts(corpus.calib)))
    assert len(corpus.heldout) + len(corpus.calib) + len(corpus.train) == 300
    assert any("lines or sentences" in note for note in corpus.notes)
    chosen = {text.split(".")[0] for text in (*texts(corpus.heldout), *texts(corpus.calib))}
    assert chosen.isdisjoint(text.split(".")[0] for text in texts(corpus.train))


def test_it_is_read_through_once_until_a_file_changes(folder: Path, monkeypatch: pytest.MonkeyPatch):
    looks: list[Path] = []
    look = on_disk._look
    monkeypatch.setattr(on_disk, "_look", lambda path, field: looks.append(path) or look(path, field))
    first, second = open_corpus(folder), open_corpus(folder)
    assert (first, len(looks)) == (second, 1)

    write(folder / "c.jsonl", rows(20, seed=1))

    assert open_corpus(folder).fingerprint != first.fingerprint
    assert len(looks) == 2


def test_small_corpora_and_limited_ones_are_in_memory(folder: Path, tmp_path: Path):
    from overhaul.corpora import CorpusSpec

    small = open_corpus(write(tmp_path / "small.jsonl", rows(30)))
    limited = open_corpus(CorpusSpec(path=str(folder), limit=50))

    assert isinstance(small.train, tuple)
    assert isinstance(limited.train, tuple)


def test_conversations_survive_the_cache(tmp_path: Path):
    def turns(said: str, number: int) -> list[dict[str, str]]:
        return [{"role": "user", "content": said}, {"role": "assistant", "content": f"Yes, {number}."}]

    some = [{"messages": turns(row["text"], number)} for number, row in enumerate(rows(200))]
    corpus = open_corpus(write(tmp_path / "a.jsonl", some))

    read = {row.id: row for row in Reading(tmp_path / "a.jsonl")}
    assert corpus.heldout
    assert all(read[row.id] == row for row in (*corpus.heldout, *corpus.calib))


def test_a_single_long_text_is_held_in_memory_as_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(on_disk, "LONGEST_BYTES", 15_000)
    (tmp_path / "book.txt").write_text("\n".join(f"Sentence {number} of one long text." for number in range(2000)))

    corpus = open_corpus(tmp_path / "book.txt")

    assert isinstance(corpus.train, tuple)
    assert len(corpus.heldout) == 1


def test_a_saved_dataset_is_measured_too(tmp_path: Path):
    from datasets import Dataset

    Dataset.from_list(rows(300)).save_to_disk(str(tmp_path / "saved"))

    assert isinstance(open_corpus(tmp_path / "saved").train, RowsOnDisk)


def test_documents_that_are_all_too_long(tmp_path: Path):
    some = [{"text": f"{number} " * 4000} for number in range(5)]

    with pytest.raises(UserError, match="small enough to be held out"):
        open_corpus(write(tmp_path / "a.jsonl", some))


def test_as_plain_text_row_by_row(tmp_path: Path):
    some = [{"prompt": row["text"], "completion": " yes"} for row in rows(300)]
    corpus = open_corpus(write(tmp_path / "a.jsonl", some))
    plain = as_plain_text(corpus)

    assert isinstance(plain.train, RowsOnDisk)
    assert next(iter(plain.train))["text"].endswith(". yes")
    assert plain.fingerprint != corpus.fingerprint


def data(corpus: Corpus, tiny: Path) -> Data:
    return Data(corpus, AutoTokenizer.from_pretrained(tiny))


def test_windows_of_a_corpus_on_disk_are_those_of_one_in_memory(
    folder: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch
):
    left = open_corpus(folder)
    held = Corpus(**{name: getattr(left, name) for name in Corpus.__dataclass_fields__ if name != "train"},
                  train=tuple(left.train))  # fmt: skip
    on = data(left, tiny)
    monkeypatch.setattr(data_module, "IN_MEMORY_BYTES", 10**9)
    within = data(held, tiny)

    both = [list(islice(one.endless(seq_len=32), 400)) for one in (on, within)]

    assert on.num_training_tokens == within.num_training_tokens
    assert [window["input_ids"].tolist() for window in both[0]] == [window["input_ids"].tolist() for window in both[1]]
    assert len(on.documents("train").items) == on_disk.AT_HAND


def test_a_training_reads_it(folder: Path, tiny: Path, tmp_path: Path):
    how = (
        "--steps",
        "2",
        "--batch-size",
        "2",
        "--seq-len",
        "32",
        "--evaluate-windows",
        "2",
        "--evaluate-seq-len",
        "32",
    )
    done = overhaul("adapt", "full", tiny, "-o", tmp_path / "out", "--data", folder, *how)

    assert done.code == 0, done.err
    again = overhaul("prune", "wanda", tmp_path / "out", "-o", tmp_path / "pruned", "--data", folder, "--samples", "4",
                     "--seq-len", "32", "--evaluate", "none")  # fmt: skip
    assert again.code == 0, again.err


def test_memory_does_not_grow_with_the_corpus(tmp_path: Path, tiny: Path):
    def peak(count: int) -> int:
        path = write(tmp_path / str(count) / "a.jsonl", rows(count))
        tracemalloc.start()
        corpus = open_corpus(path)
        assert sum(1 for _ in corpus.train) == len(corpus.train)
        found = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return found

    peak(400)  # imports
    few, many = peak(1000), peak(4000)

    assert many < 1.2 * few


def test_a_row_keeps_its_hash_through_json():
    row = Row((("prompt", "a"), ("completion", "b")))

    assert on_disk._row(json.loads(json.dumps(row.columns))).id == row.id
