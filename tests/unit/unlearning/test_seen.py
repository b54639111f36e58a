"""What is forgotten by a model's ledger: exactly what it was trained on, under every way of asking for it."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from command import overhaul, refused
from overhaul import ledger
from overhaul.documents import text_row
from overhaul.errors import UserError
from overhaul.forget.npo import Npo
from overhaul.inspect import seen as shown
from overhaul.unlearning import seen

TRAIN = ("--steps", 6, "--batch-size", 2, "--seq-len", 32, "--dtype", "fp32", "--evaluate", "none")
FORGET = ("--steps", 4, "--batch-size", 2, "--seq-len", 32, "--lr", "1e-3", "--dtype", "fp32", "--evaluate", "none")


def write(path: Path, rows: Sequence[dict[str, str]]) -> Path:
    path.write_text("\n".join(map(json.dumps, rows)) + "\n")
    return path


def texts(words: str, count: int = 60) -> list[dict[str, str]]:
    dice = random.Random(words)
    return [{"text": " ".join(dice.choices(words.split(), k=dice.randrange(15, 40)))} for _ in range(count)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`new.jsonl` and `old.jsonl`: sixty documents each; `others.jsonl`: ten that nothing is trained on."""
    folder = tmp_path_factory.mktemp("texts")
    words = {"new": "river stone lamp garden winter", "old": "letter bridge captain silver", "others": "salt rope moss"}
    for name, chosen in words.items():
        write(folder / f"{name}.jsonl", texts(chosen, 10 if name == "others" else 60))
    return folder


@pytest.fixture(scope="module")
def extended(tiny: Path, folder: Path) -> Path:
    """The tiny model after both texts, of which it has read some documents."""
    replay = ("--replay", folder / "old.jsonl", "--replay-share", "0.4")
    done = overhaul("extend", "cpt", tiny, "-o", folder / "extended", "--data", folder / "new.jsonl", *replay, *TRAIN)
    assert done.code == 0, done.err
    return folder / "extended"


def hashes(model: Path, source: str) -> set[str]:
    entries = [entry for entry in ledger.read(model) if entry.seen.origin.source == source]
    return {f"{document:016x}" for entry in entries for document in entry.seen.documents_D.tolist()}


def rows_of(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def forget(model: Path, out: Path, *how: object, method: str = "ga") -> Any:
    retained = () if method in ("task-vector", "whp") else ("--retain-term", "none")
    return overhaul("forget", method, model, "-o", out, *FORGET, *retained, *how)


def same(one: Path, other: Path) -> bool:
    left, right = (load_file(path / "model.safetensors") for path in (one, other))
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


@pytest.mark.parametrize("method", ["ga", "task-vector"])
def test_a_source_is_forgotten_as_a_file_of_what_was_read_of_it(
    extended: Path, folder: Path, tmp_path: Path, method: str
):
    read = hashes(extended, "new.jsonl")
    rows = [row for row in rows_of(folder / "new.jsonl") if text_row(row["text"]).id in read]
    assert 0 < len(rows) == len(read) < 60

    by_name = forget(extended, tmp_path / "name", "--from-ledger", "new.jsonl", method=method)
    by_file = forget(extended, tmp_path / "file", "--forget", write(tmp_path / "read.jsonl", rows), method=method)

    assert (by_name.code, by_file.code) == (0, 0), by_name.err
    assert same(tmp_path / "name", tmp_path / "file")
    assert f"new.jsonl (to forget): {len(rows)} documents were seen (" in by_name.err
    assert "tokens, last in step 1, extend cpt)" in by_name.err
    assert "what the model was trained on" in (tmp_path / "name" / "report.html").read_text()


def test_of_a_file_those_are_forgotten_that_were_seen(extended: Path, folder: Path, tmp_path: Path):
    read = hashes(extended, "new.jsonl") | hashes(extended, "old.jsonl")
    asked = [*rows_of(folder / "others.jsonl"), *rows_of(folder / "old.jsonl"), *rows_of(folder / "new.jsonl")]
    rows = [row for row in asked if text_row(row["text"]).id in read]
    asked_file, seen_file = write(tmp_path / "asked.jsonl", asked), write(tmp_path / "seen.jsonl", rows)

    done = forget(extended, tmp_path / "both", "--forget", asked_file, "--from-ledger")
    assert done.code == 0, done.err
    assert forget(extended, tmp_path / "file", "--forget", seen_file).code == 0
    assert same(tmp_path / "both", tmp_path / "file")
    tokens = sum(int(entry.seen.tokens_D.sum()) for entry in ledger.read(extended))
    assert f"{len(rows)} of 130 documents were seen ({tokens} tokens, last in step 1, extend cpt)" in done.err

    # Of one source alone.
    assert forget(extended, tmp_path / "old", "--forget", asked_file, "--from-ledger", "old.jsonl").code == 0
    assert forget(extended, tmp_path / "named", "--from-ledger", folder / "old.jsonl").code == 0
    assert same(tmp_path / "old", tmp_path / "named")


def test_the_ledger_is_found_behind_other_steps_and_two_of_them_count(
    tiny: Path, extended: Path, folder: Path, tmp_path: Path
):
    again = ("--data", folder / "new.jsonl", *TRAIN, "--seed", 5)
    assert overhaul("extend", "cpt", extended, "-o", tmp_path / "again", *again).code == 0
    pruned = ("--sparsity", "0.1", "--evaluate", "none")
    assert overhaul("prune", "magnitude", tmp_path / "again", "-o", tmp_path / "pruned", *pruned).code == 0
    first, both = hashes(extended, "new.jsonl"), hashes(tmp_path / "pruned", "new.jsonl")
    assert first < both

    done = forget(tmp_path / "pruned", tmp_path / "out", "--from-ledger", "new.jsonl")
    assert done.code == 0, done.err
    assert f"{len(both)} documents were seen (" in done.err
    assert "last in step 2, extend cpt)" in done.err


def test_its_recipe_makes_the_model_again(extended: Path, folder: Path, tmp_path: Path):
    asked = ("--forget", folder / "new.jsonl", "--from-ledger", "new.jsonl")
    assert forget(extended, tmp_path / "out", *asked).code == 0
    done = overhaul("run", tmp_path / "out" / "recipe.yaml", f"out={tmp_path / 'again'}")

    assert done.code == 0, done.err
    assert same(tmp_path / "out", tmp_path / "again" / "02-forget-ga")


def test_of_a_text_that_was_cut_the_part_is_forgotten_that_was_trained_on(tiny: Path, tmp_path: Path):
    book = "\n\n".join(f"Part {number} of a long text about nothing else." for number in range(90))
    (tmp_path / "book.txt").write_text(book)
    done = overhaul("extend", "cpt", tiny, "-o", tmp_path / "read", "--data", tmp_path / "book.txt", *TRAIN)
    assert done.code == 0, done.err

    corpus, known = seen.trained_on(tmp_path / "read", ["book.txt"])
    (row,) = corpus.train
    assert known.told().startswith("1 documents were seen (384 tokens")
    assert book.startswith(row["text"])
    assert 0.7 < len(row["text"]) / len(book) < 0.8
    # Who asks for all of it is told that it was seen.
    assert shown(str(tmp_path / "read"), str(tmp_path / "book.txt"))["seen"] == 1


def test_questions_that_were_read_as_plain_text_are_found(tiny: Path, folder: Path, tmp_path: Path):
    pairs = [{"question": f"How much is {n} and {n} and one?", "answer": f"It is {2 * n + 1}."} for n in range(80)]
    asked = write(tmp_path / "asked.jsonl", pairs)
    mixed = (
        "--data",
        folder / "new.jsonl",
        "--mix",
        f"{asked}=0.5",
        "--last-mix",
        f"{asked}=0.5",
        *TRAIN,
        "--evaluate-seq-len",
        64,
    )
    done = overhaul("extend", "upsample", tiny, "-o", tmp_path / "read", *mixed)
    assert done.code == 0, done.told

    corpus, known = seen.trained_on(tmp_path / "read", ["asked.jsonl"])
    assert {tuple(row) for row in corpus.train} == {("text",)}
    assert shown(str(tmp_path / "read"), str(asked))["seen"] == known.seen == len(corpus.train) > 2
    write(asked, [*pairs[:-1], {"question": "Another?", "answer": "One."}, *pairs[-1:]])
    changed, _ = seen.trained_on(tmp_path / "read", ["asked.jsonl"])
    assert sorted(row["text"] for row in changed.train) == sorted(row["text"] for row in corpus.train)


@pytest.fixture
def moved(tiny: Path, folder: Path, tmp_path: Path) -> tuple[Path, Path]:
    """A model, and the file that it was trained on."""
    data = write(tmp_path / "mine.jsonl", rows_of(folder / "new.jsonl"))
    assert overhaul("extend", "cpt", tiny, "-o", tmp_path / "model", "--data", data, *TRAIN).code == 0
    return tmp_path / "model", data


def test_a_corpus_with_more_in_it_is_read_whole_and_one_with_less_is_refused(moved: tuple[Path, Path], tmp_path: Path):
    model, data = moved
    rows, read = rows_of(data), hashes(model, "mine.jsonl")
    write(data, [*texts("more of other words", 5), *rows])
    done = forget(model, tmp_path / "more", "--from-ledger", "mine.jsonl")
    assert done.code == 0, done.err
    assert "mine.jsonl was changed since it was trained on: its documents are read whole" in done.err
    assert f"{len(read)} documents were seen" in done.err

    lost = sorted(read)[:2]
    write(data, [row for row in rows if text_row(row["text"]).id not in lost])
    how = (f"2 of {len(read)} documents of mine.jsonl", f"no longer in {data}", f"has the hash {lost[0]}")
    refused(forget(model, tmp_path / "less", "--from-ledger", "mine.jsonl"), *how)
    data.unlink()
    refused(forget(model, tmp_path / "gone", "--from-ledger", "mine.jsonl"), "mine.jsonl cannot be read again")
    assert not (tmp_path / "less").exists()


def test_what_cannot_be_found_is_refused(tiny: Path, extended: Path, folder: Path, tmp_path: Path):
    out = tmp_path / "out"
    refused(forget(tiny, out, "--from-ledger", "new.jsonl"), "has no ledger.jsonl", "--forget FILE without")
    refused(forget(tiny, out, "--forget", folder / "new.jsonl", "--from-ledger"), "has no ledger.jsonl")
    refused(forget(extended, out, "--from-ledger", "nev.jsonl"), "no source 'nev.jsonl'", "did you mean 'new.jsonl'?")
    refused(forget(extended, out, "--from-ledger"), "from_ledger names no corpus")
    refused(forget(extended, out), "nothing is to be forgotten")
    never = forget(extended, out, "--forget", folder / "others.jsonl", "--from-ledger")
    refused(never, "never saw any of the 10 documents of others.jsonl", "nothing is to be forgotten")
    refused(forget(extended, out, "--forget", folder / "old.jsonl", "--from-ledger", "new.jsonl"), "from new.jsonl")
    assert not out.exists()


def test_steps_of_which_the_ledger_says_nothing_are_named(extended: Path, folder: Path, tmp_path: Path):
    (tmp_path / ledger.FILE).write_bytes((extended / ledger.FILE).read_bytes())
    data = {"name": "talk.jsonl"}
    steps = [("extend", "cpt", data), ("learn", "bregman", data), ("quantize", "int8", None), ("adapt", "format", data)]
    lineage = [{"verb": verb, "method": method, "data": data} for verb, method, data in steps]
    (tmp_path / "overhaul.json").write_text(json.dumps({"lineage": lineage}))

    assert seen.untold(tmp_path, ledger.read(tmp_path)) == ("step 2, learn bregman", "step 4, adapt format")
    assert seen.untold(extended, ledger.read(extended)) == ()
    method = Npo(forget=str(folder / "others.jsonl"), from_ledger=(), retain_term="none").at(tmp_path)
    with pytest.raises(UserError, match="of step 2, learn bregman, and step 4, adapt format, it says nothing"):
        method.to_forget()


def test_standard_input_cannot_be_read_again(extended: Path, tmp_path: Path):
    lines = (extended / ledger.FILE).read_text().splitlines()
    lines[0] = json.dumps(json.loads(lines[0]) | {"source": "stdin", "path": "-"})
    (tmp_path / ledger.FILE).write_text("\n".join(lines) + "\n")

    with pytest.raises(UserError, match="stdin was standard input, which cannot be read again"):
        seen.trained_on(tmp_path, ["stdin"])


def test_the_texts_have_names_before_there_is_a_model(folder: Path):
    old = str(folder / "old.jsonl")
    named = Npo(from_ledger=("new.jsonl", "b"), retain=old)
    assert named.whole_names() == ("new.jsonl+b (to forget)", "old.jsonl (to retain)")
    assert Npo(forget=old, from_ledger=(), retain_term="none").whole_names() == ("old.jsonl (to forget)",)
    with pytest.raises(UserError, match="needs the directory of the model"):
        named.to_forget()


def test_a_named_corpus_is_known_by_the_documents_that_it_is_cut_out_of(tiny: Path, tmp_path: Path):
    assert overhaul("extend", "cpt", tiny, "-o", tmp_path / "read", "--data", "sample", *TRAIN).code == 0
    corpus, known = seen.trained_on(tmp_path / "read", ["sample"])

    assert 0 < known.seen == len(hashes(tmp_path / "read", "sample"))
    assert {row.document for row in corpus.train} == hashes(tmp_path / "read", "sample")
    assert shown(str(tmp_path / "read"), "sample")["tokens"] == known.tokens == 6 * 2 * 32


def test_a_model_is_asked_what_it_has_seen(tiny: Path, extended: Path, folder: Path):
    read = hashes(extended, "old.jsonl")
    wanted = [n for n, row in enumerate(rows_of(folder / "old.jsonl"), 1) if text_row(row["text"]).id in read]

    told = json.loads(overhaul("show", extended, "--seen", folder / "old.jsonl", "--json").out)
    assert told["seen"]["numbers"] == wanted
    assert [entry["source"] for entry in told["ledger"]] == ["new.jsonl", "old.jsonl"]
    assert sum(entry["tokens"] for entry in told["ledger"]) == 6 * 2 * 32
    lines = overhaul("show", extended, "--seen", folder / "old.jsonl").out.splitlines()
    assert f"old.jsonl: {len(wanted)} documents were seen, {told['seen']['tokens']} tokens, in step 1" in lines[-2]
    assert f"old.jsonl: {len(wanted)} of 60 documents were seen (" in lines[-1]
    assert overhaul("show", extended, "--seen", folder / "others.jsonl").out.endswith("0 of 10 documents were seen\n")
    refused(overhaul("show", tiny, "--seen", folder / "old.jsonl"), "has no ledger.jsonl")
