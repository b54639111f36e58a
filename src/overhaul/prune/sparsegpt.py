"""SparseGPT: remove weights, correct the others (Frantar and Alistarh 2023, arXiv:2301.00774).

Letters of shapes: O output features, I input features, K columns of a block, M columns of an N:M group.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, ClassVar, Self

from pydantic import Field, model_validator

from overhaul.errors import UserError
from overhaul.method import Positive, Rate, Transform
from overhaul.sparsity import Target, already_kept, check_model, keep_all_but, keep_mask_pattern, prune_layer

if TYPE_CHECKING:
    from torch import Tensor, nn

    from overhaul.stream import Stream
    from overhaul.walk import Block

MAX_DAMPING = 1.0
"""Beyond the mean of the diagonal the Hessian says little, and a failure has another cause."""

log = logging.getLogger(__name__)


def inverse_factor(hessian_II: Tensor, damping: float) -> Tensor:
    """The upper triangular U with `(H + damping * mean(diag H) * I)^-1 = U^T U`.

    An input that never fires has 1 on the diagonal instead of 0: its weights have no effect and no say.
    With P the reversal of order, PHP = L L^T gives U = P L^-1 P: one factorization and one triangular solve,
    where inverting first takes two factorizations and a full inverse.

    Returns:
        U (I, I) fp32. If the factorization fails, the damping is raised tenfold and logged.
        Raises `ValueError` when it fails at every damping up to `MAX_DAMPING`.
    """
    import torch

    hessian_II = hessian_II.clone()
    diagonal_I = hessian_II.diagonal()
    diagonal_I[diagonal_I == 0] = 1.0
    mean = float(diagonal_I.mean())
    added = 0.0
    while True:
        diagonal_I += damping * mean - added
        added = damping * mean
        lower_II, failure = torch.linalg.cholesky_ex(hessian_II.flip(0, 1))
        if not failure:
            eye_II = torch.eye(len(hessian_II), device=hessian_II.device)
            return torch.linalg.solve_triangular(lower_II, eye_II, upper=False).flip(0, 1).contiguous()
        if damping * 10 > MAX_DAMPING:
            raise ValueError(f"the Hessian has no Cholesky factor even with damping {damping:g}")
        damping *= 10
        log.warning("the Hessian has no Cholesky factor: damping raised to %g", damping)


def sparsegpt_prune(
    weight_OI: Tensor,
    upper_II: Tensor,
    target: Target,
    *,
    block_size: int = 128,
    already_OI: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Removes weights column by column and spreads each error over the columns to its right (algorithm 1).

    Args:
        weight_OI: the dense weights; not changed.
        upper_II: `inverse_factor` of the layer's Hessian.
        target: the share or pattern to reach.
        block_size: columns whose mask is chosen, and whose errors are collected, together.
        already_OI: an earlier mask; what it removed stays removed and counts towards the target.

    Returns:
        The corrected weights (O, I) fp32, zero where removed, and the mask (O, I), True = kept.
    """
    import torch

    # Transposed, a column is contiguous: the inner loop is bound by memory.
    num_outputs, num_inputs = weight_OI.shape
    weight_IO = torch.empty(num_inputs, num_outputs, device=weight_OI.device).copy_(weight_OI.detach().T)
    mask_IO = torch.ones_like(weight_IO, dtype=torch.bool)
    if already_OI is not None:
        mask_IO.copy_(already_OI.T)
    num_removed, total = 0, int(target.share * weight_OI.numel())
    for start in range(0, num_inputs, block_size):
        block, rest = slice(start, start + block_size), slice(start + block_size, num_inputs)
        # Counted from the first column on, so that the roundings of the blocks do not add up; what an earlier mask
        # removes further on is left to it, so that the total is exact wherever that lies.
        later = 0 if already_OI is None else int((~mask_IO[rest]).sum())
        quota = min(int(target.share * (min(block.stop, num_inputs) * num_outputs)), total - later) - num_removed
        error_KO = _prune_columns(weight_IO[block], mask_IO[block], upper_II[block, block], target, quota)
        num_removed += error_KO.numel() - int(mask_IO[block].sum())
        weight_IO[rest].addmm_(upper_II[block, rest].T, error_KO, alpha=-1)
    return weight_IO.T.contiguous(), mask_IO.T.contiguous()


def _prune_columns(weight_KO: Tensor, mask_KO: Tensor, upper_KK: Tensor, target: Target, quota: int) -> Tensor:
    """One block of columns: narrows the mask and corrects the weights in place, returns the errors (K, O).

    `error_j = (w_j - q_j) / U_jj` and `w_k -= U_jk error_j` for k > j. A column takes the errors of all those
    before it when its turn comes: one product that reads them, where updating ahead would read and write.
    """
    pattern = target.n_of_m
    diagonal_K = upper_KK.diagonal()[:, None]
    if pattern is None:
        score_KO = (weight_KO / diagonal_K).square_().masked_fill_(~mask_KO, float("-inf"))
        mask_KO &= keep_all_but(score_KO, max(quota, 0))
    error_KO = weight_KO.new_zeros(weight_KO.shape)
    for j in range(len(weight_KO)):
        if pattern is not None and j % pattern.group == 0:
            group = slice(j, j + pattern.group)
            now_MO = weight_KO[group].addmm(upper_KK[:j, group].T, error_KO[:j], alpha=-1)
            score_MO = (now_MO / diagonal_K[group]).square_().masked_fill_(~mask_KO[group], float("-inf"))
            mask_KO[group] &= keep_mask_pattern(score_MO.T, *pattern).T
        weight_O = weight_KO[j].addmv_(error_KO[:j].T, upper_KK[:j, j], alpha=-1)
        error_KO[j] = weight_O.masked_fill(mask_KO[j], 0).div_(diagonal_K[j])
        weight_O *= mask_KO[j]
    return error_KO


def output_error(change_OI: Tensor, weight_OI: Tensor, hessian_II: Tensor) -> float:
    """Norm of the change of a layer's output over the norm of its output: root of `tr(DHD^T) / tr(WHW^T)`."""
    norms = [float(((matrix_OI @ hessian_II) * matrix_OI).sum()) for matrix_OI in (change_OI, weight_OI)]
    return (max(norms[0], 0.0) / norms[1]) ** 0.5 if norms[1] > 0 else 0.0


class SparseGPT(Target, Transform):
    """Remove weights by second-order saliency and correct those that stay: better than Wanda, and slower."""

    needs_data: ClassVar[bool] = True
    samples: Positive = Field(128, description="Calibration windows.")
    seq_len: Positive = Field(2048, description="Tokens per window; fewer where the model reads fewer.")
    damping: Rate = Field(
        0.01,
        description="Added to the Hessian's diagonal, as a share of its mean; raised if it does not suffice.",
    )
    block_size: Positive = Field(128, description="Columns whose mask is chosen together.")

    @model_validator(mode="after")
    def _groups_fit_blocks(self) -> Self:
        if self.n_of_m and self.block_size % self.n_of_m.group:
            raise ValueError(f"block_size {self.block_size} is not divisible by the groups of pattern {self.pattern}")
        return self

    def apply(self, model: nn.Module, calib: Stream | None) -> nn.Module:
        """Masks and corrects every linear layer of the decoder blocks, each fed by the pruned ones before."""
        import torch

        from overhaul.walk import walk

        check_model(model, self)
        for block in walk(model, calib, "prune sparsegpt"):
            with torch.no_grad():
                self._prune(model, block)
        return model

    def _prune(self, model: nn.Module, block: Block) -> None:
        hessians = block.statistics("hessian")
        factors: dict[int, Tensor] = {}  # by identity: layers that read the same input share their Hessian
        for name, linear in block.linears.items():
            hessian_II = hessians[name]
            if id(hessian_II) not in factors:
                factors = {id(hessian_II): self._factor(name, hessian_II)}
            dense_OI = linear.weight.float()
            weight_OI = dense_OI.masked_fill(hessian_II.diagonal() == 0, 0)  # inputs that never fire
            weight_OI, mask_OI = sparsegpt_prune(
                weight_OI,
                factors[id(hessian_II)],
                self,
                block_size=self.block_size,
                already_OI=already_kept(linear),
            )
            error = output_error(weight_OI - dense_OI, dense_OI, hessian_II)
            linear.weight.copy_(weight_OI)
            prune_layer(model, name, mask_OI, error=error)

    def _factor(self, name: str, hessian_II: Tensor) -> Tensor:
        try:
            return inverse_factor(hessian_II, self.damping)
        except ValueError as error:
            raise UserError(
                f"{name}: {error}", hint="more calibration data (--samples), or a higher --damping"
            ) from error
