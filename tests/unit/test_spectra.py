from __future__ import annotations

import math
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from overhaul.spectra import (
    Cache,
    Matrix,
    Vectors,
    compared,
    critical_strength,
    entropy_rank,
    known_vectors,
    look,
    singular,
    singular_values,
    stable_rank,
)
from overhaul.stored import Stored

EPS = 0.5


def matrix_of(values: list[float], outputs: int, inputs: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """A matrix of these singular values, all its left vectors (O, O) and right ones (I, I), in fp64."""
    generator = torch.Generator().manual_seed(seed)
    left_OO, right_II = (
        torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64)).Q for n in (outputs, inputs)
    )
    R = len(values)
    weight_OI = (left_OO[:, :R] * torch.tensor(values, dtype=torch.float64)) @ right_II[:, :R].t()
    return weight_OI, left_OO, right_II


def as_stored(weight_OI: Tensor) -> Stored:
    weight = weight_OI.float()
    return Stored("m", Path("m"), {"layer": (weight.shape[0], weight.shape[1])}, lambda name: weight.clone())


def seen(base_OI: Tensor, tuned_OI: Tensor, tmp_path: Path, k: int = 10, vectors: Vectors = "left") -> Matrix:
    (matrix,) = look(as_stored(base_OI), as_stored(tuned_OI), k=k, vectors=vectors, cache=Cache(tmp_path))
    return matrix


SPREAD = [40.0 - i for i in range(40)]


@pytest.mark.parametrize(("share", "is_intruder"), [(0.999, False), (1.001, True)])
def test_a_new_direction_is_an_intruder_from_the_critical_strength_on(share, is_intruder, tmp_path):
    base_OI, left_OO, right_II = matrix_of(SPREAD, 50, 40)
    c = share * math.sqrt(3) * SPREAD[0]

    matrix = seen(base_OI, base_OI + c * torch.outer(left_OO[:, 45], right_II[:, 0]), tmp_path)

    assert critical_strength(EPS) == pytest.approx(math.sqrt(3))
    assert matrix.strength == pytest.approx(share * math.sqrt(3), rel=1e-5)
    found = matrix.intruders(EPS)
    assert len(found) == is_intruder
    if is_intruder:
        value = math.hypot(SPREAD[0], c)
        assert found[0].rank == 1
        assert found[0].value == pytest.approx(value, rel=1e-6)
        assert found[0].cosine == pytest.approx(SPREAD[0] / value, rel=1e-5)
        assert found[0].energy == pytest.approx(value**2 / (sum(s**2 for s in SPREAD) + c**2), rel=1e-5)
    # On the right the tuned matrix has the same vectors as its base.
    assert (
        seen(base_OI, base_OI + c * torch.outer(left_OO[:, 45], right_II[:, 0]), tmp_path, vectors="right").intruders(
            EPS
        )
        == []
    )


def test_null_vectors_of_a_singular_base_do_not_hide_an_intruder(tmp_path):
    values = [20.0 - i for i in range(20)]
    base_OI, left_OO, right_II = matrix_of(values, 40, 40)  # square: a thin decomposition returns all 40 vectors
    tuned_OI = base_OI + 200 * torch.outer(left_OO[:, 30], right_II[:, 30])

    everything = torch.linalg.svd(base_OI.float()).U.t() @ singular(tuned_OI.float(), 10).left_OK
    (found,) = seen(base_OI, tuned_OI, tmp_path).intruders(EPS)

    assert everything.square().sum(0)[0] == pytest.approx(1, abs=1e-4)  # the null space holds it
    assert found.cosine < 1e-4


@pytest.mark.parametrize("vectors", ["left", "right", "both"])
def test_what_is_equal_or_scaled_has_no_intruder(vectors, tmp_path):
    base_OI, _, _ = matrix_of(SPREAD, 40, 50)

    equal, doubled = (seen(base_OI, factor * base_OI, tmp_path, vectors=vectors) for factor in (1, 2))

    assert equal.intruders(0.99) == doubled.intruders(0.99) == []
    assert (equal.strength, equal.relative_change) == (0, 0)
    assert doubled.strength == pytest.approx(1, rel=1e-5)


@pytest.mark.parametrize("vectors", ["left", "right", "both"])
@pytest.mark.parametrize("shape", [(50, 40), (40, 50), (40, 40)])
def test_null_vectors_of_the_tuned_matrix_are_not_examined(shape, vectors, tmp_path):
    """They are arbitrary, and would be intruders in whatever is scaled or cut to a lower rank."""
    base_OI, left_OO, right_II = matrix_of(SPREAD[:6], *shape)
    cut_OI = base_OI - SPREAD[5] * torch.outer(left_OO[:, 5], right_II[:, 5])

    found = [seen(base_OI, tuned, tmp_path, vectors=vectors) for tuned in (2 * base_OI, cut_OI, 0 * base_OI)]

    assert [(one.examined, one.intruders(EPS)) for one in found] == [(6, []), (5, []), (0, [])]


@pytest.mark.parametrize("num", [2, 5])
def test_a_rotation_within_equal_values_is_nothing_new(num, tmp_path):
    values = [9.0] * num + [4.0 - 0.1 * i for i in range(20)]
    base_OI, left_OO, right_II = matrix_of(values, 50, 40)
    turn = torch.linalg.qr(torch.randn(num, num, generator=torch.Generator().manual_seed(1), dtype=torch.float64)).Q
    rest_OI = base_OI - 9 * left_OO[:, :num] @ right_II[:, :num].t()
    tuned_OI = (
        rest_OI + (left_OO[:, :num] @ turn * torch.linspace(9.5, 10, num).double()) @ (right_II[:, :num] @ turn).t()
    )

    matrix = seen(base_OI, tuned_OI, tmp_path)

    assert matrix.intruders(0.99) == []
    assert matrix.cosine_K[:num].min() < 0.99  # by single vectors it would look new
    assert matrix.projection_K[:num].min() > 0.999


@pytest.mark.parametrize("shape", [(60, 40), (40, 60), (40, 40)])
@pytest.mark.parametrize("vectors", ["left", "right", "both"])
def test_counts_are_those_of_the_released_rule(shape, vectors, tmp_path):
    """Count j <= k with max over all i of |<u0_i, ut_j>| < eps, by numpy's decomposition."""
    rng = np.random.default_rng(0)
    base, change = rng.standard_normal(shape), rng.standard_normal((shape[0], 3)) @ rng.standard_normal((3, shape[1]))
    tuned = base + 4 * change
    (left, _, right), (tuned_left, _, tuned_right) = (
        np.linalg.svd(one.astype(np.float32), full_matrices=False) for one in (base, tuned)
    )
    cosines = {"left": np.abs(left.T @ tuned_left).max(0), "right": np.abs(right @ tuned_right.T).max(0)}
    best = np.maximum(cosines["left"], cosines["right"]) if vectors == "both" else cosines[vectors]

    matrix = seen(torch.from_numpy(base), torch.from_numpy(tuned), tmp_path, vectors=vectors)

    np.testing.assert_allclose(matrix.cosine_K.numpy(), best[:10], atol=1e-4)
    for eps in (0.3, 0.5, 0.7, 0.9):
        for k in (1, 3, 10):
            assert len(matrix.intruders(eps, k)) == int((best[:k] < eps).sum())
    assert len(matrix.intruders(0.9)) > 0


@pytest.mark.parametrize("shape", [(60, 40), (40, 60)])
def test_the_decomposition_is_lapacks(shape):
    weight_OI = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    U, values, Vh = torch.linalg.svd(weight_OI, full_matrices=False)

    found = singular(weight_OI, 7)

    torch.testing.assert_close(found.values_R, values, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(singular_values(weight_OI), values, rtol=1e-5, atol=1e-5)
    for ours, theirs in ((found.left_OK, U[:, :7]), (found.right_IK, Vh[:7].t())):
        torch.testing.assert_close((ours * theirs).sum(0).abs(), torch.ones(7), rtol=0, atol=1e-5)


def test_effective_ranks_of_equal_values_are_their_number():
    values_R = torch.tensor([2.0] * 5 + [0.0] * 10)

    assert stable_rank(values_R) == pytest.approx(5)
    assert entropy_rank(values_R) == pytest.approx(5)
    assert (stable_rank(0 * values_R), entropy_rank(0 * values_R)) == (0, 0)


def test_a_base_of_zeros_knows_no_direction(tmp_path):
    matrix = seen(torch.zeros(8, 6), torch.eye(8, 6), tmp_path, k=3)

    assert [one.rank for one in matrix.intruders(EPS)] == [1, 2, 3]
    assert matrix.strength == math.inf


def test_decompositions_are_kept_by_the_hash_of_what_they_are_of(tmp_path, monkeypatch):
    base_OI, left_OO, right_II = matrix_of(SPREAD, 50, 40)
    tuned_OI = base_OI + 100 * torch.outer(left_OO[:, 45], right_II[:, 3])
    first = seen(base_OI, tuned_OI, tmp_path)
    files = set(tmp_path.iterdir())
    monkeypatch.setattr("overhaul.spectra.singular", lambda *_: pytest.fail("decomposed again"))

    again = seen(base_OI, tuned_OI, tmp_path)

    assert again.intruders(EPS) == first.intruders(EPS)
    assert set(tmp_path.iterdir()) == files
    for file in files:  # what is damaged is made anew
        file.write_bytes(b"x")
    monkeypatch.undo()
    assert seen(base_OI, tuned_OI, tmp_path).intruders(EPS) == first.intruders(EPS)


def test_another_tuned_model_finds_the_base_decomposed(tmp_path):
    base_OI, left_OO, _ = matrix_of(SPREAD, 50, 40)
    cache = Cache(tmp_path)
    vectors_DR, values_R = known_vectors(lambda: base_OI.float(), "left", cache)
    reads = []

    again_DR, _ = known_vectors(lambda: reads.append(1) or base_OI.float(), "left", cache)

    assert len(reads) == 1  # for its hash
    assert torch.equal(vectors_DR, again_DR)
    new_D1 = left_OO[:, 45:46].float()
    assert compared((vectors_DR, values_R), new_D1)[0] < 1e-5


class _Held(TorchDispatchMode):
    """The most bytes of tensors that were made inside and held at once."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, tuple | list) else (made,):
            if isinstance(tensor, Tensor):
                self._count(tensor.untyped_storage())
        return made

    def _count(self, storage: Any) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key not in self.known:
            self.known.add(key)
            self.now += size
            self.most = max(self.most, self.now)
            weakref.finalize(storage, self._free, key, size)

    def _free(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.now -= size


@pytest.mark.parametrize("shape", [(360, 120), (120, 360)])
def test_memory_is_that_of_less_than_four_matrices(shape, tmp_path):
    """Counted as tensors; LAPACK's own workspace, two squares of the shorter side, is not among them."""
    generator = torch.Generator().manual_seed(0)
    base_OI, change_OI = (torch.randn(shape, generator=generator) for _ in range(2))
    pair = as_stored(base_OI), as_stored(base_OI + change_OI)

    with _Held() as held:
        list(look(*pair, k=10, vectors="left", cache=Cache(tmp_path)))

    assert held.most < 4 * base_OI.nbytes
    assert held.most > base_OI.nbytes  # it was counted at all
