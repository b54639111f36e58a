"""Streams go on from where they were saved, mix exactly, and say what they are."""

from __future__ import annotations

from collections.abc import Callable
from itertools import islice
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from overhaul.mixture import Mix, Phase
from overhaul.stream import IGNORED, Batch, Encoded, Map, Pack, Repeat, Rows, Shuffle, Stream, Take


def document(number: int, length: int) -> Encoded:
    """`length` tokens that all say which document they are of; the first one is not trained on."""
    return Encoded(np.full(length, number, np.int64), np.arange(length) > 0)


def rows(count: int = 7, *, first: int = 0, name: str = "rows") -> Rows:
    items = [document(first + n, 3 + n % 4) for n in range(count)]
    return Rows(items, name=name, fingerprint=f"{name}-{count}", tokens=sum(len(item.ids) for item in items))


def twice(item: Encoded) -> Encoded:
    return Encoded(np.repeat(item.ids, 2), np.repeat(item.trained, 2))


COMPOSITIONS: dict[str, Callable[[], Stream]] = {
    "rows": rows,
    "shuffle": lambda: Shuffle(rows(), seed=3),
    "repeat": lambda: Repeat(rows(), times=3),
    "repeated shuffle": lambda: Repeat(Shuffle(rows(), seed=3)),
    "map": lambda: Map(rows(), twice, name="twice"),
    "pack": lambda: Pack(rows(), seq_len=5),
    "pack apart": lambda: Pack(Repeat(rows()), seq_len=5, document_mask=True),
    "take": lambda: Take(Repeat(rows()), 12),
    "mix": lambda: Mix({"a": Repeat(rows()), "b": Repeat(rows(5, first=100))}, [Phase({"a": 0.7, "b": 0.3})]),
    "phases": lambda: Mix(
        {"a": Repeat(rows()), "b": Repeat(rows(5, first=100)), "c": Repeat(rows(3, first=200))},
        [Phase({"a": 0.7, "b": 0.3}, 40), Phase({"b": 1}, 30), Phase({"a": 1, "c": 2}, 50)],
    ),
    "training": lambda: Batch(Pack(Repeat(Shuffle(rows(), seed=1)), seq_len=4), batch_size=2),
    "all of it": lambda: Batch(
        Pack(
            Take(
                Mix(
                    {"a": Repeat(Shuffle(rows(), seed=1)), "b": Repeat(Map(rows(3), twice, name="x"))},
                    [Phase({"a": 1, "b": 2})],
                ),
                40,
            ),
            seq_len=3,
        ),
        batch_size=3,
    ),
}


def plain(item: Any) -> Any:
    """Comparable content of an item."""
    if isinstance(item, dict):
        return {key: tensor.tolist() for key, tensor in item.items()}
    return item.ids.tolist(), item.trained.tolist()


@pytest.mark.parametrize("make", COMPOSITIONS.values(), ids=COMPOSITIONS.keys())
@given(before=st.integers(0, 20))
def test_a_saved_stream_goes_on_with_the_next_item(make: Callable[[], Stream], before: int):
    whole = [plain(item) for item in islice(make(), before + 6)]
    stream = make()
    for _ in islice(stream, before):
        pass

    other = make()
    for _ in islice(other, 2):  # a stream that has been read already
        pass
    other.load_state_dict(stream.state_dict())

    assert [plain(item) for item in islice(other, 6)] == whole[before:]


@pytest.mark.parametrize("make", COMPOSITIONS.values(), ids=COMPOSITIONS.keys())
def test_a_state_can_be_written_to_disk(make: Callable[[], Stream], tmp_path: Any):
    stream = make()
    next(stream)
    torch.save(stream.state_dict(), tmp_path / "state.pt")

    other = make()
    other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))

    assert plain(next(other)) == plain(next(stream))


def test_shuffle_has_every_row_once_and_another_order_each_epoch():
    stream = Repeat(Shuffle(rows(), seed=0))
    first, second = ([int(next(stream).ids[0]) for _ in range(7)] for _ in range(2))

    assert sorted(first) == sorted(second) == list(range(7))
    assert first != second
    assert first == [int(item.ids[0]) for item in Shuffle(rows(), seed=0)]


@pytest.mark.parametrize("times", [1, 2, 5])
def test_repeat_ends_after_so_many_passes(times: int):
    assert len(list(Repeat(rows(), times=times))) == 7 * times


@given(seq_len=st.integers(2, 12))
def test_packing_loses_nothing_but_a_last_short_window(seq_len: int):
    windows = list(Pack(rows(), seq_len=seq_len))

    tokens = np.concatenate([item.ids for item in rows()])
    trained = np.concatenate([item.trained for item in rows()])
    packed = np.concatenate([window["input_ids"].numpy() for window in windows])
    labels = np.concatenate([window["labels"].numpy() for window in windows])
    assert len(windows) == len(tokens) // seq_len
    assert (packed == tokens[: len(packed)]).all()
    assert (labels == np.where(trained, tokens, IGNORED)[: len(labels)]).all()


def test_with_a_document_mask_positions_begin_anew_with_each_document_and_with_each_window():
    """Documents of 3, 4, 5 and 6 tokens: the third is cut after its first token, the fourth after its fourth."""
    one, two = islice(Pack(rows(), seq_len=8, document_mask=True), 2)

    assert one["input_ids"].tolist() == [0, 0, 0, 1, 1, 1, 1, 2]
    assert one["position_ids"].tolist() == [0, 1, 2, 0, 1, 2, 3, 0]
    assert two["input_ids"].tolist() == [2, 2, 2, 2, 3, 3, 3, 3]
    assert two["position_ids"].tolist() == [0, 1, 2, 3, 0, 1, 2, 3]


def test_with_a_document_mask_no_first_token_is_trained_on():
    trained = [Encoded(item.ids, np.ones_like(item.trained)) for item in rows()]
    source = Rows(trained, name="trained", fingerprint="")

    one, two = islice(Pack(source, seq_len=8, document_mask=True), 2)

    assert one["labels"].tolist() == [IGNORED, 0, 0, IGNORED, 1, 1, 1, IGNORED]
    assert two["labels"].tolist() == [2, 2, 2, 2, IGNORED, 3, 3, 3]  # the cut document's is in the window before


def test_a_document_mask_changes_no_tokens_and_no_state_of_those_without():
    plain, apart = Pack(rows(), seq_len=5), Pack(rows(), seq_len=5, document_mask=True)

    assert [w["input_ids"].tolist() for w in plain] == [w["input_ids"].tolist() for w in apart]
    assert set(plain.own_state()) == {"ids", "labels"}
    assert set(next(Pack(rows(), seq_len=5))) == {"input_ids", "labels"}
    assert plain.label() == "pack(5)"
    assert apart.label() == "pack(5, document mask)"


def test_batches_are_stacked_windows_and_a_smaller_last_one_is_left_out():
    batches = list(Batch(Pack(rows(), seq_len=4), batch_size=2))
    windows = list(Pack(rows(), seq_len=4))

    assert len(batches) == len(windows) // 2
    assert (batches[1]["input_ids"] == torch.stack([w["input_ids"] for w in windows[2:4]])).all()
    assert next(Batch(COMPOSITIONS["pack apart"](), batch_size=2))["position_ids"].shape == (2, 5)


def test_the_description_is_a_tree_with_hashes_and_counts():
    tree = COMPOSITIONS["training"]().describe().tree().splitlines()

    assert [line.split("  [")[0] for line in tree] == [
        "batch(2)",
        "  pack(4)",
        "    repeat",
        "      shuffle(seed=1)",
        "        rows (7 rows, rows-7)",
    ]
    assert all("30 tokens" in line for line in tree)


def test_the_hash_is_stable_and_sensitive_to_every_setting():
    def fingerprint(make: Callable[[], Stream]) -> str:
        return make().describe().fingerprint

    made = [fingerprint(make) for make in COMPOSITIONS.values()]
    assert made == [fingerprint(make) for make in COMPOSITIONS.values()]
    assert len(set(made)) == len(made)
    assert fingerprint(lambda: Pack(rows(), seq_len=5)) != fingerprint(lambda: Pack(rows(), seq_len=6))
    assert fingerprint(lambda: Pack(rows(), seq_len=5)) != fingerprint(
        lambda: Pack(rows(), seq_len=5, document_mask=True)
    )
    assert fingerprint(lambda: Shuffle(rows(), seed=0)) != fingerprint(lambda: Shuffle(rows(), seed=1))
    assert fingerprint(rows) != fingerprint(lambda: rows(8))


def test_reading_does_not_change_the_description():
    stream = COMPOSITIONS["all of it"]()
    before = stream.describe()
    next(stream)

    assert stream.describe() == before
