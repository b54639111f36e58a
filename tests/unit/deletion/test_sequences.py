"""Which sequences are trained, and what deletions leave of them: by hand, by brute force, by many draws."""

from __future__ import annotations

import itertools
import math
from statistics import fmean

import numpy as np
import pytest

from overhaul.deletion.sequences import (
    conditional,
    cyclic,
    diversity,
    drawn,
    expected_deletions,
    matched,
    prefixes,
    score,
)
from overhaul.deletion.survivors import Survivors


@pytest.mark.parametrize("num_slices", [1, 2, 3, 4, 5])
def test_cyclic_sequences_are_distinct_up_to_all_there_are(num_slices: int):
    most = math.factorial(num_slices)
    for budget in range(1, most + 1):
        orders = cyclic(num_slices, budget)
        assert len(set(orders)) == budget
        assert all(sorted(order) == [*range(num_slices)] for order in orders)
        firsts = [sum(order[0] == place for order in orders) for place in range(num_slices)]
        assert max(firsts) - min(firsts) <= 1, "each slice is first as often as the others, or once more"


def test_rotations():
    assert cyclic(4, 4) == ((0, 1, 2, 3), (1, 2, 3, 0), (2, 3, 0, 1), (3, 0, 1, 2))
    assert cyclic(3, 4) == ((0, 1, 2), (0, 2, 1), (1, 2, 0), (2, 0, 1))
    assert set(cyclic(3, 6)) == set(itertools.permutations(range(3)))


def test_rotations_differ_in_every_position():
    assert diversity(cyclic(4, 4)) == 4.0
    assert diversity(((0, 1, 2),)) == 0.0
    assert diversity(((0, 1, 2), (0, 2, 1))) == 2.0


def test_what_begins_alike_is_trained_once():
    assert prefixes(((0, 1, 2), (0, 2, 1))) == ((0,), (0, 1), (0, 1, 2), (0, 2), (0, 2, 1))
    assert len(prefixes(cyclic(4, 24))) == 4 + 4 * 3 + 4 * 3 * 2 + 24


def test_the_score_of_a_sequence_by_hand():
    assert score((0, 1), [0.1, 0.2], exponent=2) == pytest.approx(1 * 0.9**2 + 2 * 0.7**2)


PRIORS = [[0.5, 0.3, 0.2], [0.9, 0.05, 0.05], [0.01, 0.02, 0.03], [1 / 3] * 3]


@pytest.mark.parametrize("prior", PRIORS)
@pytest.mark.parametrize("exponent", [1.0, 5.0])
def test_matching_is_the_best_assignment_of_second_slices(prior: list[float], exponent: float):
    """Brute force: of all sets of three sequences with different first and second slices, none scores more."""
    total = _total(matched(prior, 3, exponent=exponent), prior, exponent)
    every = itertools.permutations(range(3))
    latin = [
        orders
        for orders in itertools.combinations(every, 3)
        if all(len({order[at] for order in orders}) == 3 for at in range(2))
    ]
    assert len(latin) == 2, "the two Latin squares"
    assert total == pytest.approx(max(_total(orders, prior, exponent) for orders in latin))


@pytest.mark.parametrize("prior", [[0.6, 0.2, 0.1, 0.05, 0.05], [0.4, 0.3, 0.2, 0.1], [0.97, 0.01, 0.01, 0.01]])
def test_matching_scores_no_less_than_rotations_and_chance(prior: list[float]):
    size, exponent = len(prior), 5.0
    best = _total(matched(prior, size, exponent=exponent), prior, exponent)
    assert best >= _total(cyclic(size, size), prior, exponent) - 1e-12
    assert best >= fmean(_total(drawn(size, size, seed=seed), prior, exponent) for seed in range(200))


def test_matching_begins_with_what_is_deleted_rarely():
    assert [order[0] for order in matched([0.5, 0.1, 0.2, 0.0], 2)] == [3, 1]


def test_drawn_sequences_are_distinct_and_follow_the_prior():
    orders = conditional([0.9, 0.05, 0.05], 6, seed=1)
    assert set(orders) == set(itertools.permutations(range(3)))
    firsts = [conditional([0.9, 0.05, 0.05], 1, seed=seed)[0][0] for seed in range(300)]
    assert fmean(first == 0 for first in firsts) == pytest.approx(0.1 / 2.0, abs=0.04)


def test_what_there_is_not_is_refused():
    with pytest.raises(ValueError, match=r"7 sequences of 3 slices; there are 1 to 6"):
        cyclic(3, 7)
    with pytest.raises(ValueError, match=r"4 sequences of 3 slices; with a prior there are 1 to 3"):
        matched([0.1, 0.1, 0.1], 4)
    for prior in ([-0.1, 0.5], [0.7, 0.7], []):
        with pytest.raises(ValueError, match="none is below 0"):
            matched(prior, 1)


def test_a_deletion_leaves_what_was_trained_before_it():
    left = Survivors([((0, 1, 2), (1, 2, 0), (2, 0, 1))])
    left.delete(0, 1)
    assert left.serving(0) == (2, 0)
    assert left.stages(0) == {(0,), (2,), (2, 0)}
    left.delete(0, 2)
    assert left.serving(0) == (0,)
    assert left.gone() == ()
    left.delete(0, 0)
    assert left.serving(0) == ()
    assert left.gone() == (0,)
    assert left.is_gone


def test_a_shard_loses_nothing_by_deletions_in_another():
    left = Survivors([((0, 1),), ((0, 1),)], hit=[(0, 0)])
    assert left.serving(1) == (0, 1)
    assert left.gone() == (0,)
    assert not left.is_gone


@pytest.mark.parametrize(("num_shards", "num_slices"), [(1, 1), (1, 2), (1, 3), (2, 1), (2, 2)])
def test_expected_deletions_by_every_order_of_requests(num_shards: int, num_slices: int):
    """Only the first request for a slice matters, so the time is that of a coupon collector over their orders."""
    for budget in range(1, num_slices + 1):
        orders = [cyclic(num_slices, budget)] * num_shards
        cells = [(shard, place) for shard in range(num_shards) for place in range(num_slices)]
        times = []
        for requests in itertools.permutations(cells):
            left, time = Survivors(orders), 0.0
            for known, cell in enumerate(requests):
                time += len(cells) / (len(cells) - known)  # until a slice that was not hit before is
                left.delete(*cell)
                if left.is_gone:
                    break
            times.append(time)
        assert fmean(times) == pytest.approx(expected_deletions(num_shards, num_slices, budget))


@pytest.mark.parametrize(("num_shards", "num_slices"), [(5, 4), (5, 6)])
def test_expected_deletions_by_many_draws(num_shards: int, num_slices: int):
    dice = np.random.default_rng(0)
    for budget in range(1, num_slices + 1):
        orders, times = cyclic(num_slices, budget), []
        for _ in range(4000):
            left = Survivors([orders] * num_shards)
            requests = iter(dice.integers([num_shards, num_slices], size=(600, 2)).tolist())
            times.append(0)
            while not left.is_gone:
                left.delete(*next(requests))
                times[-1] += 1
        assert fmean(times) == pytest.approx(expected_deletions(num_shards, num_slices, budget), rel=0.02)


def _total(orders: tuple[tuple[int, ...], ...], prior: list[float], exponent: float) -> float:
    return sum(score(order, prior, exponent=exponent) for order in orders)
