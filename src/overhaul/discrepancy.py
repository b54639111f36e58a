"""The maximum mean discrepancy of two sets of vectors (Gretton et al., 2012), under a kernel of random features.

Letters of shapes: N and M vectors, D their width, F features.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, slots=True)
class Features:
    """Random Fourier features of the Gaussian kernel (Rahimi and Recht, 2007), drawn again from their seed.

    Attributes:
        width: D.
        bandwidth: of the Gaussian.
        count: F, cosines and sines together.
        seed: what the frequencies are drawn from.
    """

    width: int
    bandwidth: float
    count: int = 512
    seed: int = 0

    def __call__(self, vectors_ND: np.ndarray) -> np.ndarray:
        """`(N, F)`; their inner products approximate `exp(-|x - y|^2 / (2 bandwidth^2))` and are a kernel themselves.

        Every row has norm 1, as the kernel of a vector with itself has.
        """
        frequencies_DF = np.random.default_rng(self.seed).normal(size=(self.width, self.count // 2)) / self.bandwidth
        angles_NF = vectors_ND.astype(np.float64) @ frequencies_DF
        return np.concatenate([np.cos(angles_NF), np.sin(angles_NF)], axis=1) / np.sqrt(self.count // 2)


def median_distance(vectors_ND: np.ndarray) -> float:
    """The median distance between two of the vectors: the usual bandwidth; 1 where they are all the same."""
    squares_N = (vectors_ND**2).sum(1)
    squares_NN = squares_N[:, None] + squares_N[None] - 2 * vectors_ND @ vectors_ND.T
    distances = np.sqrt(np.clip(squares_NN[np.triu_indices(len(vectors_ND), 1)], 0, None))
    return float(np.median(distances)) or 1.0


@dataclass(frozen=True, slots=True)
class Sums:
    """All that the discrepancy needs to know of a set: nothing of it says what a single vector was.

    Attributes:
        sum_F: of the features.
        squares: sum of the features' squared norms.
        count: N.
    """

    sum_F: np.ndarray
    squares: float
    count: int

    @classmethod
    def of(cls, features_NF: np.ndarray) -> Sums:
        """Those of a set."""
        return cls(features_NF.sum(0), float((features_NF**2).sum()), len(features_NF))


def mmd2(first: Sums, second: Sums) -> float:
    """The unbiased estimate of the squared discrepancy, which is negative now and then where two sets are alike.

    MMD^2 = mean k(x, x') + mean k(y, y') - 2 mean k(x, y), over pairs of different vectors (equation 3 there).
    """

    def within(own: Sums) -> float:
        return float(own.sum_F @ own.sum_F - own.squares) / (own.count * (own.count - 1))

    between = float(first.sum_F @ second.sum_F) / (first.count * second.count)
    return within(first) + within(second) - 2 * between


def permuted_z(first_NF: np.ndarray, second_MF: np.ndarray, *, draws: int = 200, seed: int = 0) -> float:
    """How many standard deviations the discrepancy is from its mean when vectors are dealt to the sets at random."""
    both, split = np.concatenate([first_NF, second_MF]), len(first_NF)
    random = np.random.default_rng(seed)
    dealt = []
    for _ in range(draws):
        order = random.permutation(len(both))
        dealt.append(mmd2(Sums.of(both[order[:split]]), Sums.of(both[order[split:]])))
    return float((mmd2(Sums.of(first_NF), Sums.of(second_MF)) - np.mean(dealt)) / np.std(dealt))
