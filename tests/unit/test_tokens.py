"""Tokens in shards: all documents once, in an order that can be taken up again, from memory or from files."""

from __future__ import annotations

import random
import tracemalloc
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import pytest

from overhaul import tokens
from overhaul.documents import Row, text_row
from overhaul.errors import UserError
from overhaul.ledger import Origin
from overhaul.stream import Encoded, Pack, Repeat
from overhaul.tokens import Chosen, Documents, Tokens

NAMES = {"name": "numbers/train", "fingerprint": "1234"}


def rows(count: int) -> list[Row]:
    draw = random.Random(0)
    return [text_row(" ".join(str(draw.randrange(1000)) for _ in range(draw.randrange(1, 30)))) for _ in range(count)]


def numbers(some: Sequence[Row]) -> list[Encoded]:
    """A tokenizer that reads numbers; those below 100 are not trained on."""
    found = [np.array([int(word) for word in row["text"].split()]) for row in some]
    return [Encoded(ids, ids >= 100) for ids in found]


@pytest.fixture(autouse=True)
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokens, "SHARD_TOKENS", 200)
    monkeypatch.setattr(tokens, "ROWS_AT_ONCE", 7)
    monkeypatch.setattr(tokens, "OPEN_SHARDS", 3)


@pytest.fixture(params=["memory", "disk"])
def made(request: pytest.FixtureRequest, tmp_path: Path) -> Tokens:
    if request.param == "memory":
        return tokens.in_memory(rows(100), numbers, **NAMES)
    return tokens.on_disk(rows(100), numbers, tmp_path / "tokens", **NAMES)


def plain(documents: Iterator[Encoded]) -> list[tuple[list[int], list[bool]]]:
    return [(document.ids.tolist(), document.trained.tolist()) for document in documents]


@pytest.mark.parametrize("seed", [None, 3])
def test_what_came_last_is_known_by_its_number_and_its_hash(made: Tokens, seed: int | None):
    """Of documents in order, shuffled, and chosen."""
    encoded, hashes = numbers(rows(100)), [int(row.document, 16) for row in rows(100)]
    made = replace(made, origin=Origin(source="numbers", path="numbers.txt"))
    order = np.random.default_rng(1).permutation(100)[:50]

    for stream in (Documents(made, seed=seed), Chosen(made, lambda _: order, name="some")):
        assert stream.number == -1
        for document in stream:
            assert document.ids.tolist() == encoded[stream.number].ids.tolist()
            (found,) = made.seen(np.arange(100) == stream.number)
            assert (found.documents_D.tolist(), found.tokens_D.tolist()) == ([hashes[stream.number]], [1])


def test_windows_count_what_went_out_of_each_document_and_not_what_they_hold(made: Tokens):
    lengths_D = made.lengths()
    made = replace(made, origin=Origin(source="numbers", path="numbers.txt"))
    hashes = [int(row.document, 16) for row in rows(100)]
    pack = Pack(Repeat(Documents(made)), seq_len=10)
    for _ in range(7):
        next(pack)
    ends_D = np.minimum(np.cumsum(lengths_D), 70)
    wanted = {hashes[place]: int(count) for place, count in enumerate(np.diff(ends_D, prepend=0)) if count}

    def told(stream: Pack) -> dict[int, int]:
        (found,) = stream.seen()
        return dict(zip(found.documents_D.tolist(), found.tokens_D.tolist(), strict=True))

    assert told(pack) == wanted
    other = Pack(Repeat(Documents(made)), seq_len=10)
    other.load_state_dict(pack.state_dict())
    next(pack), next(other)
    assert told(other) == told(pack) != wanted
    pack.count_anew()
    assert pack.seen() == ()
    next(pack)
    assert sum(told(pack).values()) == 10
    assert Pack(Repeat(Documents(replace(made, origin=None))), seq_len=10).seen() == ()


def test_documents_in_order_are_those_that_were_encoded(made: Tokens):
    wanted = plain(iter(numbers(rows(100))))

    assert plain(Documents(made)) == wanted
    assert (len(made), made.num_tokens) == (100, sum(len(ids) for ids, _ in wanted))
    assert len(made.shards) > 5
    assert all(shard.num_tokens <= 200 for shard in made.shards)


def test_each_epoch_has_all_documents_in_an_order_of_its_own(made: Tokens):
    stream = Repeat(Documents(made, seed=3), times=2)
    both = plain(stream)
    first, second = both[:100], both[100:]

    assert sorted(first) == sorted(second) == sorted(plain(Documents(made)))
    assert first != second
    assert first == plain(Documents(made, seed=3)) != plain(Documents(made, seed=4))


@pytest.mark.parametrize("seed", [None, 3])
@pytest.mark.parametrize("cut", [0, 1, 37, 99, 100, 151])
def test_a_stream_goes_on_in_the_middle_of_a_shard(made: Tokens, seed: int | None, cut: int):
    stream, whole = (Repeat(Documents(made, seed=seed), times=2) for _ in range(2))
    for _ in range(cut):
        next(stream)
    other = Repeat(Documents(made, seed=seed), times=2)

    other.load_state_dict(stream.state_dict())

    assert plain(other) == plain(whole)[cut:]


def test_files_are_made_once_and_tell_their_tokens(tmp_path: Path):
    made = tokens.on_disk(rows(100), numbers, tmp_path / "tokens", **NAMES)
    again = tokens.on_disk(iter(()), numbers, tmp_path / "tokens", **NAMES)

    assert plain(Documents(again)) == plain(Documents(made))
    told = [file.name.split(".")[0] for file in sorted((tmp_path / "tokens").glob("*.ids.npy"))]
    assert told == [f"{number:05d}-{shard.num_tokens}" for number, shard in enumerate(made.shards)]


@pytest.mark.parametrize(("largest", "dtype"), [(65_535, np.uint16), (65_536, np.uint32)])
def test_ids_take_two_bytes_where_they_can(largest: int, dtype: type):
    made = tokens.in_memory([text_row(f"5 {largest}")], numbers, **NAMES)

    assert made.shards[0].opened().ids_N.dtype == dtype
    assert next(Documents(made)).ids.tolist() == [5, largest]


def test_what_is_all_trained_on_needs_no_word_of_it(tmp_path: Path):
    made = tokens.on_disk([text_row("100 200")], numbers, tmp_path / "tokens", **NAMES)

    assert not list((tmp_path / "tokens").glob("*.trained.npy"))
    assert next(Documents(made)).trained.tolist() == [True, True]


@pytest.mark.parametrize(
    ("file", "content"), [("tokens.json", "{"), ("00000-*.ids.npy", ""), ("00000-*.ends.npy", None)]
)
def test_damaged_files_are_refused(file: str, content: str | None, tmp_path: Path):
    tokens.on_disk(rows(20), numbers, tmp_path / "tokens", **NAMES)
    found = next((tmp_path / "tokens").glob(file))
    if content is None:
        np.save(found, np.array([1]))
    else:
        found.write_text(content)

    with pytest.raises(UserError, match=r"cannot be used.*\n.*rm -r"):
        tokens.on_disk(iter(()), numbers, tmp_path / "tokens", **NAMES)


def test_files_of_another_text_are_refused(tmp_path: Path):
    tokens.on_disk(rows(20), numbers, tmp_path / "tokens", **NAMES)

    with pytest.raises(UserError, match="it is of another text, tokenizer or version"):
        tokens.on_disk(rows(20), numbers, tmp_path / "tokens", name="other", fingerprint="5678")


def test_memory_does_not_grow_with_the_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Twice as many documents are written and read in the same memory, to within what each file's name takes."""
    monkeypatch.setattr(tokens, "SHARD_TOKENS", 50_000)

    def peak(count: int) -> int:
        endless = (text_row("123 456 789 " * 100) for _ in range(count))
        tracemalloc.start()
        made = tokens.on_disk(endless, numbers, tmp_path / f"{count}", **NAMES)
        assert sum(1 for _ in Documents(made, seed=0)) == count
        found = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return found

    few, many = peak(1000), peak(4000)

    assert many < 1.1 * few


def test_no_more_than_one_shard_is_open(tmp_path: Path):
    """A process may have a thousand files open, and a large corpus has more shards."""
    made = tokens.on_disk(rows(100), numbers, tmp_path / "tokens", **NAMES)
    stream, process = Documents(made, seed=0), psutil.Process()
    before = len(process.memory_maps(grouped=False))

    most = max(len(process.memory_maps(grouped=False)) - before for _ in stream)

    assert len(made.shards) > 5
    assert most <= 6


def test_what_another_process_makes_is_waited_for_and_found(tmp_path: Path):
    def make() -> Tokens:
        return tokens.on_disk(rows(100), numbers, tmp_path / "tokens", **NAMES)

    with ThreadPoolExecutor(4) as pool:
        made = list(pool.map(lambda _: make(), range(4)))

    assert [len(one) for one in made] == [100] * 4
    assert [file.name for file in tmp_path.iterdir() if "partial" in file.name] == []


def test_no_row_at_all_is_no_shard():
    assert tokens.in_memory([], numbers, **NAMES).shards == ()


def chosen(made: Tokens, seed: int = 0, name: str = "half") -> Repeat:
    """Half of the documents, others in each pass, across all shards."""
    return Repeat(
        Chosen(made, lambda epoch: np.random.default_rng((seed, epoch)).permutation(100)[:50], name=name), times=2
    )


def test_chosen_documents_come_in_the_order_of_the_choice(made: Tokens):
    wanted = plain(iter(numbers(rows(100))))
    order = np.random.default_rng(7).permutation(100)[:30]
    stream = Chosen(made, lambda _: order, name="some")

    assert stream.tokens() == sum(len(wanted[place][0]) for place in order)
    assert plain(stream) == [wanted[place] for place in order]
    assert made.lengths().tolist() == [len(ids) for ids, _ in wanted]


@pytest.mark.parametrize("cut", [0, 1, 37, 50, 73, 99])
def test_a_choice_goes_on_in_the_order_that_its_pass_began_with(made: Tokens, cut: int):
    stream, whole = chosen(made), chosen(made)
    for _ in range(cut):
        next(stream)
    other = chosen(made, seed=1)

    other.load_state_dict(stream.state_dict())

    # What comes in the next pass is chosen by whoever goes on.
    end = 50 if cut <= 50 else 100
    assert plain(other)[: end - cut] == plain(whole)[cut:end]


def test_another_choice_does_not_go_on(made: Tokens):
    with pytest.raises(UserError, match="was read as half, and is now chosen as best"):
        chosen(made, name="best").load_state_dict(chosen(made).state_dict())


def test_of_no_documents_there_are_no_lengths():
    assert Tokens("none", "0", ()).lengths().tolist() == []
