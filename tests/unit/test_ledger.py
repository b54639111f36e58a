"""Which documents a model was given: held against the windows that were trained on, and how the file is read."""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
from transformers import AutoTokenizer

from command import interrupted, overhaul
from overhaul import ledger, train
from overhaul.corpora import CorpusSpec, open_corpus, open_whole
from overhaul.documents import text_row
from overhaul.errors import UserError
from overhaul.ledger import Origin, Seen, merged

HOW = ("--steps", 6, "--batch-size", 2, "--seq-len", 32, "--dtype", "fp32", "--evaluate", "none")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`new.jsonl` and `old.jsonl`: sixty documents each, of different words, some of them longer than a window."""
    folder, dice = tmp_path_factory.mktemp("texts"), random.Random(0)
    for name, words in (("new", "river stone lamp garden winter"), ("old", "letter bridge captain silver")):
        rows = [{"text": " ".join(dice.choices(words.split(), k=dice.randrange(5, 40)))} for _ in range(60)]
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


def tokens_of(directory: Path) -> dict[str, dict[int, int]]:
    """By source, tokens by document; what several steps read is added up."""
    found: dict[str, Counter[int]] = {}
    for entry in ledger.read(directory):
        told = dict(zip(entry.seen.documents_D.tolist(), entry.seen.tokens_D.tolist(), strict=True))
        found.setdefault(entry.seen.origin.source, Counter()).update(told)
    return {source: dict(told) for source, told in found.items()}


def counted(windows: list[list[int]], path: Path, tokenizer: Any, *, whole: bool) -> dict[int, int]:
    """Tokens by document, from the windows alone: documents end with the end-of-text token, the last one is cut off."""
    corpus = open_whole(CorpusSpec(path=str(path))) if whole else open_corpus(path)
    known = {row["text"]: int(row.document, 16) for row in corpus.train}
    found, read = Counter(), []
    for token in [token for window in windows for token in window]:
        read.append(token)
        if token == tokenizer.eos_token_id:
            found[known[tokenizer.decode(read[:-1])]] += len(read)
            read = []
    if read:
        (begun,) = [document for text, document in known.items() if text.startswith(tokenizer.decode(read))]
        found[begun] += len(read)
    return dict(found)


@pytest.fixture
def given() -> Iterator[list[list[int]]]:
    """The windows that went through the model, in order."""
    windows: list[list[int]] = []
    forward = train._Loss.forward

    def seen(self: Any, batch: Any) -> Any:
        windows.extend(batch["input_ids"].tolist())
        return forward(self, batch)

    with patch.object(train._Loss, "forward", seen):
        yield windows


@pytest.mark.parametrize(
    "words",
    [
        ("extend", "cpt"),
        ("extend", "cpt", "--whole", "--accumulate", 2),
        ("extend", "cpt", "--steps", 40),
        ("extend", "cpt", "--document-mask", "--replay", "OLD", "--replay-share", "0.4"),
        ("extend", "upsample", "--mix", "OLD=0.3", "--last-mix", "OLD=0.6"),
        ("extend", "mix-cpt", "--general", "OLD", "--kl-weight", 0),
        ("extend", "stability-gap", "--mix", "OLD=0.3", "--passes", 2),
        ("extend", "syne", "--mix", "OLD=0.3", "--rounds", 2),
        ("adapt", "full"),
        ("adapt", "hft", "--rounds", 2),
        ("adapt", "lora", "--no-merge"),
        ("adapt", "sltrain", "--rank", 4),
        ("distill", "kd", "--teacher", "TINY"),
    ],
    ids=lambda words: "-".join(str(word).strip("-") for word in words[:3]),
)
def test_the_ledger_is_what_was_in_the_windows(
    tiny: Path, folder: Path, tmp_path: Path, given: list[list[int]], words: tuple[Any, ...]
):
    old = str(folder / "old.jsonl")
    verb, method, *flags = (str(word).replace("OLD", old).replace("TINY", str(tiny)) for word in words)
    done = overhaul(verb, method, tiny, "-o", tmp_path / "out", "--data", folder / "new.jsonl", *HOW, *flags)
    assert done.code == 0, done.err
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    of_old = [any(word in tokenizer.decode(window) for word in ("letter", "bridge", "captain")) for window in given]

    wanted = {}
    for source, is_old in (("new.jsonl", False), ("old.jsonl", True)):
        windows = [window for window, old in zip(given, of_old, strict=True) if old == is_old]
        if windows:
            wanted[source] = counted(windows, folder / source, tokenizer, whole="--whole" in flags)
    assert tokens_of(tmp_path / "out") == wanted
    assert len(wanted) == (2 if any("old.jsonl" in flag for flag in flags) else 1)
    assert sum(sum(told.values()) for told in wanted.values()) == 32 * len(given)


def test_a_resumed_run_has_the_ledger_of_an_uninterrupted_one(tiny: Path, folder: Path, tmp_path: Path):
    mixed = ("--mix", f"{folder / 'old.jsonl'}=0.3", "--rounds", 2, "--save-every", 2)
    how = ("extend", "syne", tiny, "--data", folder / "new.jsonl", *HOW, *mixed)
    assert overhaul(*how, "-o", tmp_path / "whole").code == 0

    for stopped in (4, 10):
        cut = tmp_path / f"cut-{stopped}"
        assert interrupted(lambda seen, at=stopped: len(seen) == at, *how, "-o", cut).code != 0
        assert not (cut / ledger.FILE).exists()
        assert overhaul(*how, "-o", cut, "--resume").code == 0
        assert (cut / ledger.FILE).read_bytes() == (tmp_path / "whole" / ledger.FILE).read_bytes()


def test_a_run_that_goes_on_counts_its_own_tokens_alone(
    tiny: Path, folder: Path, tmp_path: Path, given: list[list[int]]
):
    how = ("--data", folder / "new.jsonl", *HOW)
    assert overhaul("extend", "cpt", tiny, "-o", tmp_path / "one", *how, "--keep-state").code == 0
    assert overhaul("extend", "cpt", tmp_path / "one", "-o", tmp_path / "two", *how, "--go-on").code == 0

    first, second = ledger.read(tmp_path / "two")
    assert [(entry.step, int(entry.seen.tokens_D.sum())) for entry in (first, second)] == [(1, 384), (2, 384)]
    one, two = ((tmp_path / name / ledger.FILE).read_text() for name in ("one", "two"))
    assert two.startswith(one)
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    assert tokens_of(tmp_path / "two")["new.jsonl"] == counted(given, folder / "new.jsonl", tokenizer, whole=False)


def test_it_goes_with_the_model_and_random_weights_begin_another(tiny: Path, folder: Path, tmp_path: Path):
    how = ("--data", folder / "new.jsonl", *HOW)
    assert overhaul("extend", "cpt", tiny, "-o", tmp_path / "one", *how).code == 0
    assert overhaul("quantize", "int8", tmp_path / "one", "-o", tmp_path / "int8", "--evaluate", "none").code == 0
    assert overhaul("extend", "cpt", tmp_path / "one", "-o", tmp_path / "new", *how, "--from-scratch").code == 0

    assert (tmp_path / "int8" / ledger.FILE).read_bytes() == (tmp_path / "one" / ledger.FILE).read_bytes()
    assert [entry.step for entry in ledger.read(tmp_path / "new")] == [2]
    assert not (tiny / ledger.FILE).exists()
    assert ledger.read(tiny) == ()


def test_what_learns_tasks_keeps_none_and_says_so(tiny: Path, folder: Path, tmp_path: Path):
    assert overhaul("extend", "cpt", tiny, "-o", tmp_path / "one", "--data", folder / "new.jsonl", *HOW).code == 0
    few = ("--steps", 2, "--batch-size", 2, "--seq-len", 32, "--dtype", "fp32", "--heldout", 1, "--output-term", "er")
    tasks = ("--tasks", folder / "new.jsonl", folder / "old.jsonl")
    done = overhaul("learn", "bregman", tmp_path / "one", "-o", tmp_path / "two", *tasks, *few)
    assert done.code == 0, done.told

    assert (tmp_path / "two" / ledger.FILE).read_bytes() == (tmp_path / "one" / ledger.FILE).read_bytes()
    asked = overhaul("show", tmp_path / "two", "--seen", folder / "old.jsonl").out
    assert asked.endswith("0 of 60 documents were seen\nthe ledger says nothing of step 2, learn bregman\n")


def test_a_document_that_was_cut_is_there_under_the_hash_of_all_of_it(tiny: Path, tmp_path: Path):
    text = "\n\n".join(f"Part {number} of a long text about nothing else." for number in range(60))
    (tmp_path / "book.txt").write_text(text)
    done = overhaul("extend", "cpt", tiny, "-o", tmp_path / "out", "--data", tmp_path / "book.txt", *HOW)
    assert done.code == 0, done.err

    assert list(tokens_of(tmp_path / "out")["book.txt"]) == [int(text_row(text).id, 16)]


def test_it_is_small_and_without_text(tiny: Path, folder: Path, tmp_path: Path):
    how = ("--data", folder / "new.jsonl", *HOW, "--steps", 60)
    assert overhaul("extend", "cpt", tiny, "-o", tmp_path / "out", *how).code == 0
    head, *lines = (tmp_path / "out" / ledger.FILE).read_text().splitlines()

    assert json.loads(head)["path"] == str(folder / "new.jsonl")
    assert len(lines) == json.loads(head)["documents"] > 40
    assert max(map(len, lines)) <= 27
    assert all(word not in "\n".join(lines) for word in ("river", "stone", "lamp"))


def seen(name: str, *pairs: tuple[int, int]) -> Seen:
    hashes, counts = zip(*pairs, strict=True)
    return Seen(Origin(source=name, path=name), np.array(hashes, np.uint64), np.array(counts, np.int64))


def test_parts_are_merged_by_source_and_document_and_what_was_not_reached_is_left_out():
    largest = 2**64 - 1
    a, b = merged([seen("a", (largest, 3), (1, 5), (2, 0)), seen("b", (1, 7)), seen("a", (1, 2), (1, 1))])

    assert (a.documents_D.tolist(), a.tokens_D.tolist()) == ([1, largest], [8, 3])
    assert (b.origin.source, b.documents_D.tolist(), b.tokens_D.tolist()) == ("b", [1], [7])
    assert merged([seen("a", (1, 0))]) == merged([]) == ()


def test_what_is_written_is_read(tmp_path: Path):
    ledger.add(tmp_path, [seen("a", (2**64 - 1, 3), (1, 5)), seen("ä", (7, 1))], step=1, verb="extend", method="cpt")
    ledger.add(tmp_path, [seen("a", (9, 4))], step=3, verb="adapt", method="full")
    one, two, three = ledger.read(tmp_path)

    assert (one.seen.documents_D.tolist(), one.seen.tokens_D.tolist()) == ([2**64 - 1, 1], [3, 5])
    assert (two.seen.origin, three.called) == (Origin(source="ä", path="ä"), "step 3, adapt full")
    assert ledger.sources([three]) == [
        {"source": "a", "documents": 1, "tokens": 4, "step": 3, "verb": "adapt", "method": "full"}
    ]
    ledger.add(tmp_path, [], step=4, verb="extend", method="cpt", anew=True)
    assert not (tmp_path / ledger.FILE).exists()


@pytest.mark.parametrize(
    "spoilt",
    [
        lambda lines: lines[:-1],
        lambda lines: lines[1:],
        lambda lines: [lines[0].replace('"documents": 2', '"documents": 3'), *lines[1:]],
        lambda lines: [*lines[:2], lines[2].replace("5]", "6]")],
        lambda lines: [*lines[:2], '["xyz",5]'],
        lambda lines: [lines[0].replace('"source"', '"name"'), *lines[1:]],
        lambda lines: ["no JSON", *lines],
        lambda lines: ["[]", *lines],
    ],
)
def test_a_damaged_ledger_is_refused(tmp_path: Path, spoilt: Any):
    ledger.add(tmp_path, [seen("a", (2**64 - 1, 3), (1, 5))], step=1, verb="extend", method="cpt")
    lines = (tmp_path / ledger.FILE).read_text().splitlines()
    (tmp_path / ledger.FILE).write_text("\n".join(spoilt(lines)) + "\n")

    with pytest.raises(UserError, match=r"ledger\.jsonl cannot be read"):
        ledger.read(tmp_path)
