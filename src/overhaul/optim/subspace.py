"""The directions in which a matrix is largest: by its SVD, by a few products with random vectors, or from before.

Shapes: O rows and I columns of a matrix, A and B the same after turning, R the rank, S the rank and some more.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Subspace = Literal["svd", "randomized", "warm"]
OVERSAMPLED, ROUNDS = 8, 2
"""Directions beyond the rank, and multiplications by G^T G, of the randomized search (Halko et al., 2011)."""


def leading(matrix_OI: Tensor, rank: int, how: Subspace, *, right: bool, before: Tensor | None = None) -> Tensor:
    """The `rank` leading singular vectors of one side, as orthonormal rows: `(R, I)` for the right, else `(R, O)`.

    Args:
        matrix_OI: what is decomposed, fp32 or fp64.
        rank: how many.
        how: `svd` is exact. `randomized` begins anywhere, the same in every process. `warm` turns `before` by one
            round, which follows a subspace that changes slowly; without `before` it is `randomized`.
        right: of which side.
        before: the basis to begin from.
    """
    if how == "svd":
        u_OS, _, v_SI = torch.linalg.svd(matrix_OI, full_matrices=False)
        found_RB = v_SI[:rank] if right else u_OS[:, :rank].t()
    else:
        matrix_AB = matrix_OI if right else matrix_OI.t()
        found_RB = _randomized(matrix_AB, rank) if how == "randomized" or before is None else _turned(matrix_AB, before)
    return found_RB.clone(memory_format=torch.contiguous_format)  # a view would keep, and save, all of it


def _randomized(matrix_AB: Tensor, rank: int) -> Tensor:
    wide = min(rank + OVERSAMPLED, *matrix_AB.shape)
    # A generator of its own, on the processor: a resumed run and every process draw the same.
    source = torch.Generator().manual_seed(wide)
    start_AS = torch.randn(matrix_AB.shape[0], wide, generator=source, dtype=matrix_AB.dtype).to(matrix_AB.device)
    basis_BS = _orthonormal(matrix_AB.t() @ start_AS)
    for _ in range(ROUNDS):
        basis_BS = _orthonormal(matrix_AB.t() @ _orthonormal(matrix_AB @ basis_BS))
    v_SS = torch.linalg.svd(matrix_AB @ basis_BS, full_matrices=False).Vh
    return v_SS[:rank] @ basis_BS.t()


def _turned(matrix_AB: Tensor, before_RB: Tensor) -> Tensor:
    return _orthonormal(matrix_AB.t() @ (matrix_AB @ before_RB.t())).t()


def _orthonormal(columns_BS: Tensor) -> Tensor:
    """The Q of QR, each column on the side of what it was made from, so that a basis does not flip."""
    q_BS, r_SS = torch.linalg.qr(columns_BS)
    return q_BS * torch.where(r_SS.diagonal() < 0, -1.0, 1.0)
