"""In which orders the slices of a shard are learnt, so that deletions leave as much as they can (S3T, ICLR 2025).

A sequence is a permutation of the slices `0 .. L-1`. A deletion in a slice leaves of a sequence what was trained before
it: nothing, where the slice stands first. Sequences that begin alike share what they train.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import numpy as np

Order = tuple[int, ...]


def cyclic(num_slices: int, budget: int) -> tuple[Order, ...]:
    """Distinct sequences for deletions that hit all slices alike: rotations, so that each slice is first as rarely.

    More than L are rotations of what is behind the first slice, and so on, spread evenly over those that begin alike.

    Args:
        num_slices: L.
        budget: sequences, 1 to L!.

    Raises:
        ValueError: there are not as many.
    """
    _check(num_slices, budget)
    return tuple(_spread((), tuple(range(num_slices)), budget))


def _spread(prefix: Order, rest: Order, count: int) -> list[Order]:
    rotations = [rest[at:] + rest[:at] for at in range(len(rest))]
    if count <= len(rest):
        return [prefix + rotation for rotation in rotations[:count]]
    each, over = divmod(count, len(rest))
    # Those that get one more lie as far apart as they can.
    more = {place * len(rest) // over for place in range(over)}
    return [
        order
        for place, (first, *behind) in enumerate(rotations)
        for order in _spread((*prefix, first), tuple(behind), each + (place in more))
    ]


def matched(prior: Sequence[float], budget: int, *, exponent: float = 100.0) -> tuple[Order, ...]:
    """Sequences for slices that are not hit alike: position by position the best assignment (BMS).

    They begin with the slices that are hit most rarely. Each further position is one maximum assignment of slices to
    sequences by `score`.

    Args:
        prior: of each slice the probability that a deletion hits it.
        budget: sequences, 1 to L; so many have different first slices.
        exponent: of `score`.

    Raises:
        ValueError: there are more, or the probabilities are none.
    """
    from scipy.optimize import linear_sum_assignment  # every command that loads a model imports this module

    _check_prior(prior)
    slices = range(len(prior))
    if not 1 <= budget <= len(slices):
        raise ValueError(f"{budget} sequences of {len(slices)} slices; with a prior there are 1 to {len(slices)}")
    orders: list[Order] = [(first,) for first in sorted(slices, key=lambda place: (prior[place], place))[:budget]]
    for _ in range(len(slices) - 1):
        profit_BL = np.full((budget, len(slices)), -np.inf)
        for row, order in enumerate(orders):
            for place in set(slices) - {*order}:
                profit_BL[row, place] = score((*order, place), prior, exponent=exponent)
        rows, places = linear_sum_assignment(profit_BL, maximize=True)
        for row, place in zip(rows, places, strict=True):
            orders[row] = (*orders[row], int(place))
    return tuple(orders)


def score(order: Order, prior: Sequence[float], *, exponent: float = 100.0) -> float:
    """How long a sequence is expected to stay useful: `sum_n n (1 - sum_{j <= n} p_j)^t` over its positions.

    Args:
        order: a sequence or the beginning of one.
        prior: of each slice the probability that a deletion hits it.
        exponent: t, deletions.
    """
    hit = itertools.accumulate(prior[place] for place in order)
    return sum(n * max(0.0, 1 - p) ** exponent for n, p in enumerate(hit, 1))


def conditional(prior: Sequence[float], budget: int, *, seed: int = 0) -> tuple[Order, ...]:
    """Distinct sequences drawn slice by slice with weights `1 - p`, a baseline.

    Args:
        prior: of each slice the probability that a deletion hits it.
        budget: sequences, 1 to L!.
        seed: of the draws.

    Raises:
        ValueError: there are not as many, or the probabilities are none.
    """
    _check_prior(prior)
    _check(len(prior), budget)
    dice = np.random.default_rng(seed)
    # A slice that is hit for certain may still stand last.
    weights_L = np.maximum(1 - np.asarray(prior, float), 1e-9)

    chances_L = weights_L / weights_L.sum()
    found: dict[Order, None] = {}
    while len(found) < budget:
        found[tuple(map(int, dice.choice(len(prior), len(prior), replace=False, p=chances_L)))] = None
    return tuple(found)


def drawn(num_slices: int, budget: int, *, seed: int = 0) -> tuple[Order, ...]:
    """Distinct sequences at random, a baseline.

    Args:
        num_slices: L.
        budget: sequences, 1 to L!.
        seed: of the draws.

    Raises:
        ValueError: there are not as many.
    """
    return conditional([0.0] * num_slices, budget, seed=seed)


def prefixes(orders: Sequence[Order]) -> tuple[Order, ...]:
    """What is trained for some sequences: every beginning once, each behind those that it goes on from."""
    return tuple(dict.fromkeys(order[:length] for order in orders for length in range(1, len(order) + 1)))


def diversity(orders: Sequence[Order]) -> float:
    """The mean number of positions in which two sequences differ; 0 of one sequence alone."""
    pairs = list(itertools.combinations(orders, 2))
    return sum(sum(a != b for a, b in zip(*pair, strict=True)) for pair in pairs) / len(pairs) if pairs else 0.0


def expected_deletions(num_shards: int, num_slices: int, budget: int) -> float:
    """Requests until nothing is left of any shard: `m L H(m min(B, L))`, H being harmonic numbers.

    Of requests that hit all m L slices alike, and sequences whose first slices differ where they can. A sequence is
    gone when its first slice is hit, so this is the time until all of the m min(B, L) slices that are first were hit.
    """
    firsts = num_shards * min(budget, num_slices)
    return num_shards * num_slices * sum(1 / n for n in range(1, firsts + 1))


def _check(num_slices: int, budget: int) -> None:
    most = math.factorial(num_slices)
    if not 1 <= budget <= most:
        raise ValueError(f"{budget} sequences of {num_slices} slices; there are 1 to {most:,}")


def _check_prior(prior: Sequence[float]) -> None:
    if not prior or min(prior) < 0 or sum(prior) > 1 + 1e-9:
        raise ValueError(f"probabilities of slices {list(prior)}; none is below 0, and their sum is at most 1")
