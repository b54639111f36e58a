"""Mixtures: exact shares, phases that change at their token, and what each source gave."""

from __future__ import annotations

from itertools import islice
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from overhaul.mixture import Mix, Phase
from overhaul.stream import Batch, Encoded, Pack, Repeat, Rows, Stream, Take

WINDOW = 64


def document(number: int, length: int) -> Encoded:
    """`length` tokens that all say which source they are of."""
    return Encoded(np.full(length, number, np.int64), np.ones(length, bool))


def source(number: int, *lengths: int) -> Rows:
    items = [document(number, length) for length in lengths]
    return Rows(items, name=str(number), fingerprint=f"{number}-{lengths}", tokens=sum(lengths))


def windows(number: int) -> Pack:
    """Of a source with documents of many lengths, without end."""
    lengths = np.random.default_rng(number).integers(5, 300, 50).tolist()
    return Pack(Repeat(source(number, *lengths)), seq_len=WINDOW)


def tokens_of(stream: Stream) -> dict[str, int]:
    return {drawn.name: drawn.tokens for drawn in stream.ledger()}


def origin(item: Any) -> int:
    ids = item.ids if isinstance(item, Encoded) else item["input_ids"]
    assert len(set(ids.tolist())) == 1
    return int(ids[0])


@given(
    shares=st.lists(st.floats(0.01, 1), min_size=2, max_size=4),
    lengths=st.lists(st.integers(1, 9), min_size=2, max_size=4),
)
def test_a_share_is_never_off_by_more_than_the_longest_item_per_source(shares: list[float], lengths: list[int]):
    shares, lengths = shares[: len(lengths)], lengths[: len(shares)]
    sources = {str(number): Repeat(source(number, length)) for number, length in enumerate(lengths)}
    mix = Mix(sources, [Phase({str(number): share for number, share in enumerate(shares)})])
    seen = np.zeros(len(shares))
    for item in islice(mix, 200):
        seen[origin(item)] += len(item.ids)
        wanted = np.array(shares) / sum(shares) * seen.sum()
        assert (np.abs(seen - wanted) <= len(shares) * max(lengths) + 1e-9).all()
    assert list(tokens_of(mix).values()) == seen.tolist()


def test_a_share_of_zero_is_the_plain_stream():
    alone = Mix({"a": source(1, 3, 4), "b": source(2, 9)}, [Phase({"a": 1, "b": 0})])

    assert [len(item.ids) for item in alone] == [3, 4]
    assert tokens_of(alone) == {"a": 7}


def test_who_goes_on_with_the_balance_of_another_owes_what_that_owed():
    """Many short runs have the shares of a long one; without it each would begin with what is rare."""

    def run(count: int, balance: list[int]) -> tuple[list[int], list[int]]:
        mix = Mix({"new": windows(0), "old": windows(1)}, [Phase({"new": 0.95, "old": 0.05})])
        mix.balance = balance or mix.balance
        return [origin(next(mix)) for _ in range(count)], mix.balance

    whole, _ = run(100, [])
    parts, balance = [], []
    for _ in range(10):
        part, balance = run(10, balance)
        parts += part

    assert parts == whole
    assert whole.count(1) == 5
    assert sum(run(10, [])[0].count(1) for _ in range(10)) == 10


def test_in_a_million_tokens_shares_of_windows_are_exact():
    """Whatever the lengths of the documents are: shares of documents would be far off."""
    mix = Mix({"old": windows(0), "new": windows(1)}, [Phase({"old": 0.05, "new": 0.95})])
    seen = [0, 0]
    for window in islice(mix, 1_000_000 // WINDOW):
        seen[origin(window)] += WINDOW

    assert seen[0] / sum(seen) == pytest.approx(0.05, abs=1e-4)
    assert tokens_of(mix) == {"old": seen[0], "new": seen[1]}


def test_the_number_of_tokens_does_not_depend_on_the_share():
    def total(share: float) -> int:
        mix = Mix({"new": windows(0), "old": windows(1)}, [Phase({"new": 1 - share, "old": share})])
        stream = Take(Batch(mix, batch_size=4), 50)
        return sum(batch["input_ids"].numel() for batch in stream)

    assert total(0.0) == total(0.05) == total(0.5) == 50 * 4 * WINDOW


def test_sources_are_taken_where_they_are():
    started = Rows([document(0, length) for length in (3, 4, 5)], name="a", fingerprint="a")
    next(started)

    assert [len(item.ids) for item in Mix({"a": started}, [Phase({"a": 1})])] == [4, 5]


def test_each_source_keeps_its_order():
    items = {name: [document(number, length) for length in range(3, 40)] for number, name in enumerate(("old", "new"))}
    rows = {name: Rows(some, name=name, fingerprint=name) for name, some in items.items()}

    mixed = list(Mix(dict(rows), [Phase({"old": 0.3, "new": 0.7})]))

    for number in (0, 1):
        lengths = [len(item.ids) for item in mixed if origin(item) == number]
        assert lengths == list(range(3, 3 + len(lengths)))


def test_phases_change_with_the_item_that_completes_their_tokens():
    phases = [Phase({"a": 1, "b": 1}, 20 * WINDOW), Phase({"b": 1}, 10 * WINDOW), Phase({"a": 3, "c": 1}, 40 * WINDOW)]
    mix = Mix({"a": windows(0), "b": windows(1), "c": windows(2)}, phases)

    origins = [origin(window) for window in mix]

    assert len(origins) == 70
    assert origins[:20].count(0) == origins[:20].count(1) == 10
    assert set(origins[20:30]) == {1}
    assert (origins[30:].count(0), origins[30:].count(2)) == (30, 10)
    assert tokens_of(mix) == {"a": 40 * WINDOW, "b": 20 * WINDOW, "c": 10 * WINDOW}


def test_before_a_branch_the_items_are_the_same():
    """Runs that change their mixture at different places see the same until the first of these."""

    def run(first: int) -> list[int]:
        phases = [Phase({"a": 2, "b": 1}, first * WINDOW), Phase({"b": 1})]
        return [origin(window) for window in islice(Mix({"a": windows(0), "b": windows(1)}, phases), 60)]

    early, late = run(20), run(45)

    assert early[:20] == late[:20]
    assert 0 not in early[20:]
    assert 0 in late[20:45]


def test_a_phase_without_an_end_is_the_last():
    mix = Mix({"a": windows(0), "b": windows(1)}, [Phase({"a": 1}, WINDOW), Phase({"b": 1})])

    assert [origin(window) for window in islice(mix, 50)] == [0] + 49 * [1]


def test_the_ledger_reaches_through_what_is_built_on_a_mixture():
    stream = Batch(Mix({"a": windows(0), "b": windows(1)}, [Phase({"a": 1, "b": 3})]), batch_size=8)
    next(stream)

    assert tokens_of(stream) == {"a": 2 * WINDOW, "b": 6 * WINDOW}
    assert Pack(source(0, 3), seq_len=2).ledger() == ()


def test_the_ledger_tells_what_was_asked_and_how_often_a_source_was_read():
    sources = {"a": Repeat(source(0, *[10] * 6)), "b": Repeat(source(1, *[10] * 20)), "c": windows(2)}
    mix = Mix(sources, [Phase({"a": 1, "b": 3}, 400), Phase({"b": 1, "c": 1})])
    for _ in range(40):
        next(mix)
    a, b = mix.ledger()[:2]
    assert (a.tokens, a.asked, a.passes) == (100, 100, pytest.approx(100 / 60))
    assert (b.tokens, b.asked, b.passes) == (300, 300, 1.5)

    next(mix)

    asked = [drawn.asked for drawn in mix.ledger()]
    assert sum(asked) == pytest.approx(sum(tokens_of(mix).values()))
    assert asked[0] == 100
    assert asked[1] - 300 == asked[2]


def test_the_label_tells_shares_and_phases():
    mix = Mix({"new": windows(0), "old": windows(1)}, [Phase({"new": 3, "old": 1}, 1000), Phase({"new": 1})])

    assert mix.label() == "mix(1,000 tokens of new 0.75, old 0.25; new 1)"


@pytest.mark.parametrize(
    ("phases", "says"),
    [
        ([], "a mixture has phases"),
        ([Phase({"a": 1}), Phase({"a": 1})], "only the last one may have no end"),
        ([Phase({"a": 0, "b": 0})], "not all 0"),
        ([Phase({"a": -1, "b": 2})], "0 or more"),
        ([Phase({"c": 1})], "no source 'c', but a, b"),
        ([Phase({"a": 1}, 0)], "1 token or more"),
    ],
)
def test_what_is_no_mixture(phases: list[Phase], says: str):
    with pytest.raises(ValueError, match=says):
        Mix({"a": source(0, 1), "b": source(1, 1)}, phases)


def test_a_phase_that_is_added_begins_where_the_last_one_ends():
    mix = Mix({"0": windows(0), "1": windows(1)}, [Phase({"0": 0.5, "1": 0.5}, 8 * WINDOW)])
    first = [origin(item) for item in islice(mix, 8)]
    mix.then(Phase({"0": 0.25, "1": 0.75}, 8 * WINDOW))
    second = [origin(item) for item in mix]

    assert (sum(first), sum(second)) == (4, 6)
    assert {drawn.name: drawn.asked for drawn in mix.ledger()} == {"0": 6 * WINDOW, "1": 10 * WINDOW}


def test_nothing_is_added_that_is_no_mixture():
    endless = Mix({"0": windows(0)}, [Phase({"0": 1.0})])
    with pytest.raises(ValueError, match="nothing comes behind a phase without an end"):
        endless.then(Phase({"0": 1.0}))
    with pytest.raises(ValueError, match="there is no source '2'"):
        Mix({"0": windows(0)}, [Phase({"0": 1.0}, WINDOW)]).then(Phase({"2": 1.0}))
