"""What tuning did to the singular vectors of a matrix: which of the tuned ones the base does not know.

    for matrix in look(stored(base), stored(tuned), k=10, vectors="left"):
        matrix.name, matrix.intruders(eps=0.5), matrix.stable_rank

Shapes: a weight is (O, I), R = min(O, I) singular vectors of the base, K of the tuned one.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from overhaul import disk
from overhaul.fetch import cache_directory
from overhaul.stored import Stored

Side = Literal["left", "right"]
Vectors = Literal["left", "right", "both"]

NULL = 1e-6
"""Base vectors with a singular value of at most this share of the largest span nothing that the base can do."""
SAME = 1e-4
"""Base vectors whose singular values differ by no more than this share may be turned within their subspace at will."""
_PARTS = 8
"""Of a matrix, one after the other in double precision: all at once would take twice its memory."""
_FORMAT = 2
"""Goes up when what is in a cached file, or the arithmetic that makes it, changes."""


@dataclass(frozen=True, slots=True)
class Triplets:
    """The first K singular triplets, vectors in columns, fp32, largest first; `values_R` are all of the values."""

    left_OK: Tensor
    values_R: Tensor
    right_IK: Tensor

    def side(self, side: Side) -> Tensor:
        """The vectors of one side."""
        return self.left_OK if side == "left" else self.right_IK


def sides(vectors: Vectors) -> tuple[Side, ...]:
    """The sides that are compared."""
    return ("left", "right") if vectors == "both" else (vectors,)


def singular(weight_OI: Tensor, count: int | None = None) -> Triplets:
    """A singular value decomposition by the Gram matrix of the shorter side.

    In double precision this resolves values down to about 1e-7 of the largest, below which fp32 weights have nothing
    to say, in a fraction of the time of LAPACK's. Vectors of the longer side that belong to no value are zero.
    """
    long_LS = weight_OI if weight_OI.shape[0] >= weight_OI.shape[1] else weight_OI.t()
    squares_S, short_SS = torch.linalg.eigh(_gram(long_LS))
    values_S = squares_S.flip(0).clamp_min(0).sqrt()
    short_SK = short_SS.flip(1)[:, : count or len(values_S)]
    del short_SS
    inverse_K = torch.where(values_S > NULL * values_S[0], 1 / values_S, 0.0)[: short_SK.shape[1]]
    long_LK = torch.empty(len(long_LS), short_SK.shape[1])
    for rows, made in zip(_parts(long_LS), _parts(long_LK), strict=True):
        made.copy_((rows.double() @ short_SK).mul_(inverse_K))
    long_LK.div_(long_LK.norm(dim=0).clamp_min(torch.finfo(torch.float32).tiny))
    pair = (long_LK, short_SK.float())
    left_OK, right_IK = pair if long_LS is weight_OI else pair[::-1]
    return Triplets(left_OK, values_S.float(), right_IK)


def singular_values(weight_OI: Tensor) -> Tensor:
    """All singular values (R), largest first, as `singular` has them."""
    long_LS = weight_OI if weight_OI.shape[0] >= weight_OI.shape[1] else weight_OI.t()
    return torch.linalg.eigvalsh(_gram(long_LS)).flip(0).clamp_min(0).sqrt().float()


def _parts(long_LS: Tensor) -> tuple[Tensor, ...]:
    return long_LS.split(math.ceil(len(long_LS) / _PARTS))


def _gram(long_LS: Tensor) -> Tensor:
    width = long_LS.shape[1]
    gram_SS = torch.zeros(width, width, dtype=torch.float64, device=long_LS.device)
    for rows in _parts(long_LS):
        wide = rows.double()
        gram_SS.addmm_(wide.t(), wide)
    return gram_SS


def similarity(base_DR: Tensor, tuned_DK: Tensor) -> Tensor:
    """|cosine| (R, K) of each base vector with each tuned one: the sign of a singular vector means nothing."""
    return (base_DR.t() @ tuned_DK).abs()


def projection(similar_RK: Tensor, values_R: Tensor) -> Tensor:
    """The largest share (K) of each tuned vector that lies in a subspace of base vectors of one singular value.

    Where the base's values are distinct this is the largest cosine. A pair of equal values spans a plane in which the
    two vectors could be any: a tuned vector in that plane is nothing new.
    """
    rising_R = values_R.flip(0).double().contiguous()
    # Where the vectors begin and end whose values are those of vector i.
    begin_R = len(rising_R) - torch.searchsorted(rising_R, values_R.double() * (1 + SAME), right=True)
    end_R = len(rising_R) - torch.searchsorted(rising_R, values_R.double() * (1 - SAME))
    sums_QK = F.pad(similar_RK.double().square().cumsum(0), (0, 0, 1, 0))
    return (sums_QK[end_R] - sums_QK[begin_R]).amax(0).clamp(0, 1).sqrt().float()


def known(values_R: Tensor) -> int:
    """How many base vectors count: those that belong to a value that is not zero."""
    return int((values_R > NULL * values_R[0]).sum()) if len(values_R) else 0


def stable_rank(values_R: Tensor) -> float:
    """||dW||_F^2 / ||dW||_2^2; 0 for no change."""
    return float(values_R.square().sum() / values_R[0].square()) if values_R[0] > 0 else 0.0


def entropy_rank(values_R: Tensor) -> float:
    """exp(H(p)), p = sigma / sum sigma; 0 for no change."""
    p_R = values_R / values_R.sum() if values_R[0] > 0 else values_R
    return math.exp(float(torch.special.entr(p_R).sum())) if values_R[0] > 0 else 0.0


def clamping(examined: Sequence[int], k: int) -> tuple[str, ...]:
    """What is to be said where matrices have fewer singular vectors than `k`."""
    short = [count for count in examined if count < k]
    if not short:
        return ()
    return (f"k {k} is more than {len(short)} matrices have: there all are examined, {min(short)} at the fewest",)


def critical_strength(eps: float) -> float:
    """sigma_1(dW) / s_1(W0) above which a change of rank one along the first base direction makes an intruder."""
    return math.sqrt(1 / eps**2 - 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Intruder:
    """A tuned singular vector that is unlike every base vector.

    Attributes:
        rank: its place among the singular vectors, 1 for the largest value.
        value: its singular value.
        cosine: with the base vector it is most like.
        projection: the share of it in a subspace of base vectors of one value.
        energy: its share of the squared norm of the tuned weight.
    """

    rank: int
    value: float
    cosine: float
    projection: float
    energy: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Matrix:
    """One tuned weight beside its base.

    Attributes:
        name: of the layer.
        shape: (O, I).
        values_K: the largest singular values of the tuned weight.
        cosine_K, projection_K: of its vectors with the base's; with both sides the larger one.
        similar_KK: |cosine| of the first K base vectors with the tuned ones.
        change_R: all singular values of the change.
        base_value, base_norm, tuned_norm: largest singular value and Frobenius norms.
        base_sha256, tuned_sha256: of the two weights.
    """

    name: str
    shape: tuple[int, int]
    values_K: Tensor
    cosine_K: Tensor
    projection_K: Tensor
    similar_KK: Tensor
    change_R: Tensor
    base_value: float
    base_norm: float
    tuned_norm: float
    base_sha256: str
    tuned_sha256: str

    def intruders(self, eps: float, k: int | None = None) -> list[Intruder]:
        """Those among the first k vectors."""
        places = (self.projection_K[:k] < eps).nonzero().flatten().tolist()
        return [
            Intruder(
                rank=place + 1,
                value=float(self.values_K[place]),
                cosine=float(self.cosine_K[place]),
                projection=float(self.projection_K[place]),
                energy=float(self.values_K[place] ** 2) / self.tuned_norm**2,
            )
            for place in places
        ]

    @property
    def examined(self) -> int:
        """How many tuned vectors were looked at."""
        return len(self.projection_K)

    @property
    def strength(self) -> float:
        """sigma_1(dW) / s_1(W0); infinite where the base is zero."""
        return _share(float(self.change_R[0]), self.base_value)

    @property
    def relative_change(self) -> float:
        """||dW|| / ||W0||; infinite where the base is zero."""
        return _share(float(self.change_R.norm()), self.base_norm)


def _share(change: float, base: float) -> float:
    return 0.0 if not change else change / base if base else math.inf


class Cache:
    """Decompositions on disk by the hash of what they are of: a base is decomposed once for all that is made from it.

    Args:
        directory: where; default is below the user's cache. It may be deleted at any time.
    """

    def __init__(self, directory: Path | None = None) -> None:
        self.directory = directory or cache_directory() / "spectra"

    def kept(self, key: tuple[object, ...], make: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        """What is on disk under a key, or is made now and kept."""
        name = hashlib.sha256(repr((_FORMAT, *key)).encode()).hexdigest()
        path = self.directory / f"{name}.safetensors"
        with contextlib.suppress(FileNotFoundError, SafetensorError):
            return load_file(path)
        made = {name: tensor.contiguous() for name, tensor in make().items()}
        with disk.refusals(path):
            self.directory.mkdir(parents=True, exist_ok=True)
            aside = path.with_name(f".{name}.partial-{os.getpid()}")
            save_file(made, aside)
            aside.replace(path)
        return made


def look(base: Stored, tuned: Stored, *, k: int, vectors: Vectors, cache: Cache | None = None) -> Iterator[Matrix]:
    """Every matrix of a tuned model beside that of its base; no more than two are in memory at once.

    Args:
        base: what it was made from; layers of the same names and shapes.
        tuned: the tuned model.
        k: tuned vectors examined, at most as many as a matrix has that belong to a value that is not zero.
        vectors: which singular vectors; with `both` an intruder is one on both sides.
        cache: where decompositions are kept.
    """
    cache = cache or Cache()
    for name, shape in base.shapes.items():
        hashes = tuple(_sha256(one.read(name)) for one in (base, tuned))
        count = min(k, *shape)

        def make(name: str = name, count: int = count, base_sha256: str = hashes[0]) -> dict[str, Tensor]:
            return _compare(base, tuned, name, count, vectors, cache, base_sha256)

        same = hashes[0] == hashes[1]
        found = _unchanged(base.read(name), count) if same else cache.kept((*hashes, shape, count, vectors), make)
        base_value, base_norm, tuned_norm = found.pop("scalars").tolist()
        yield Matrix(
            name=name, shape=shape, base_value=base_value, base_norm=base_norm, tuned_norm=tuned_norm,
            base_sha256=hashes[0], tuned_sha256=hashes[1], **found,
        )  # fmt: skip


def _compare(
    base: Stored, tuned: Stored, name: str, count: int, vectors: Vectors, cache: Cache, base_sha256: str
) -> dict[str, Tensor]:
    """The tensors of a `Matrix`; in an order in which no weight is held longer than it is needed."""
    weight_OI = tuned.read(name)
    tuned_norm = float(weight_OI.norm())
    triplets = singular(weight_OI, count)
    count = min(count, known(triplets.values_R))  # a vector of no value is any direction, and none of the matrix
    weight_OI = weight_OI.sub(base.read(name))
    change_R = singular_values(weight_OI)
    del weight_OI
    seen = [
        compared(known_vectors(lambda: base.read(name), side, cache, base_sha256), triplets.side(side)[:, :count])
        for side in sides(vectors)
    ]
    return {
        "values_K": triplets.values_R[:count].clone(),
        "cosine_K": torch.stack([one[0] for one in seen]).amax(0),
        "projection_K": torch.stack([one[1] for one in seen]).amax(0),
        "similar_KK": torch.stack([one[2] for one in seen]).amax(0),
        "change_R": change_R,
        "scalars": torch.tensor([*seen[0][3:], tuned_norm], dtype=torch.float64),
    }


def known_vectors(
    read: Callable[[], Tensor], side: Side, cache: Cache, sha256: str | None = None
) -> tuple[Tensor, Tensor]:
    """The singular vectors (D, R) of a base weight on one side that belong to a value, and all values."""

    def make() -> dict[str, Tensor]:
        triplets = singular(read())
        return {"vectors_DR": triplets.side(side)[:, : known(triplets.values_R)], "values_R": triplets.values_R}

    kept = cache.kept((sha256 or _sha256(read()), side), make)
    return kept["vectors_DR"], kept["values_R"]


def compared(base: tuple[Tensor, Tensor], own_DK: Tensor) -> tuple[Tensor, Tensor, Tensor, float, float]:
    """Of tuned vectors with those of `known_vectors`: best cosines, projections, the first cosines (K, K); and the
    base's largest value and norm."""
    base_DR, values_R = base
    count = own_DK.shape[1]
    if not base_DR.shape[1]:  # a base of zeros knows no direction
        return torch.zeros(count), torch.zeros(count), torch.zeros(count, count), 0.0, 0.0
    similar_RK = similarity(base_DR, own_DK)
    first_KK = F.pad(similar_RK[:count], (0, 0, 0, max(0, count - len(similar_RK))))
    projection_K = projection(similar_RK, values_R[: len(similar_RK)])
    return similar_RK.amax(0), projection_K, first_KK, float(values_R[0]), float(values_R.norm())


def _unchanged(weight_OI: Tensor, count: int) -> dict[str, Tensor]:
    """What `_compare` says of equal weights, without decomposing them."""
    norm = float(weight_OI.norm())
    return {
        "values_K": torch.full((count,), math.nan),
        "cosine_K": torch.ones(count),
        "projection_K": torch.ones(count),
        "similar_KK": torch.eye(count),
        "change_R": torch.zeros(min(weight_OI.shape)),
        "scalars": torch.tensor([math.nan, norm, norm], dtype=torch.float64),
    }


def _sha256(weight_OI: Tensor) -> str:
    return hashlib.sha256(weight_OI.contiguous().numpy().data).hexdigest()
