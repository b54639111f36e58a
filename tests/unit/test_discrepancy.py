"""The maximum mean discrepancy: sums give what the double loop over pairs gives, and equal sets are equal."""

from __future__ import annotations

import numpy as np
import pytest

from overhaul.discrepancy import Features, Sums, median_distance, mmd2, permuted_z


def normal(count: int, *, seed: int, shift: float = 0.0) -> np.ndarray:
    return np.random.default_rng(seed).normal(shift, 1, (count, 3))


def by_pairs(first_NF: np.ndarray, second_MF: np.ndarray) -> float:
    """Equation 3 of Gretton et al., as it is written."""

    def within(own: np.ndarray) -> float:
        pairs = [own[i] @ own[j] for i in range(len(own)) for j in range(len(own)) if i != j]
        return sum(pairs) / (len(own) * (len(own) - 1))

    between = [x @ y for x in first_NF for y in second_MF]
    return within(first_NF) + within(second_MF) - 2 * sum(between) / len(between)


def test_sums_give_what_pairs_give():
    features = Features(3, bandwidth=1.5, count=32)
    first_NF, second_MF = features(normal(7, seed=0)), features(normal(5, seed=1, shift=1))

    assert mmd2(Sums.of(first_NF), Sums.of(second_MF)) == pytest.approx(by_pairs(first_NF, second_MF), abs=1e-12)


def test_features_approximate_the_gaussian_kernel():
    vectors_ND = normal(6, seed=2)
    features_NF = Features(3, bandwidth=2.0, count=20_000)(vectors_ND)

    squares_NN = ((vectors_ND[:, None] - vectors_ND[None]) ** 2).sum(-1)
    np.testing.assert_allclose(features_NF @ features_NF.T, np.exp(-squares_NN / (2 * 2.0**2)), atol=0.05)
    np.testing.assert_allclose((features_NF**2).sum(1), 1)


@pytest.mark.parametrize("seed", range(5))
def test_halves_of_one_set_are_alike_and_shifted_sets_are_not(seed: int):
    vectors_ND, shifted_ND = normal(200, seed=seed), normal(100, seed=seed + 100, shift=1)
    features = Features(3, median_distance(vectors_ND), seed=seed)
    first_NF, second_NF = features(vectors_ND[:100]), features(vectors_ND[100:])

    assert abs(permuted_z(first_NF, second_NF)) < 3
    assert permuted_z(first_NF, features(shifted_ND)) > 10


def test_the_estimate_is_unbiased():
    features = Features(3, bandwidth=2.0)
    drawn = [
        mmd2(Sums.of(features(normal(10, seed=s))), Sums.of(features(normal(10, seed=s + 999)))) for s in range(400)
    ]

    assert abs(np.mean(drawn)) < 3 * np.std(drawn) / np.sqrt(len(drawn))
    assert min(drawn) < 0


def test_the_median_distance():
    assert median_distance(np.array([[0.0], [1.0], [3.0]])) == pytest.approx(2)
    assert median_distance(np.ones((3, 2))) == 1
