"""SLTrain (Han et al., 2024): a linear layer that is a product of two thin matrices plus a sparse one.

    W = (alpha / R) B A + S            section 3; S has values at K fixed positions, drawn once, and zeros elsewhere

Only A, B and the values are held and trained. W is made when it is needed, once in the forward and once in the backward
pass, and never kept: of all layers together one matrix (O, I) is there at a time.

Shapes: N tokens, I input features, O output features, R rank, K positions of the sparse part.
"""

from __future__ import annotations

import hashlib
import math
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F  # noqa: N812

from overhaul.errors import UserError
from overhaul.layers import PackedLinear, to_linear
from overhaul.machine import product_dtype

Support = Literal["random", "largest", "none"]
"""Where the sparse part of a converted layer has its values."""

FEW_ROWS = 8
"""Up to so many rows, as in decoding, W is not made: the factors are applied one after the other."""


class SLTrainLinear(PackedLinear):
    """y = x ((alpha / R) B A + S)^T + b, with all of A, B and the values of S trainable.

    Attributes:
        factor_A: (R, I).
        factor_B: (O, R).
        values: (K,).
        support: (K,) int32 where the positions fit, else int64: where in the flattened weight the values are, sorted.
        bias: (O,) or None.
        alpha: the product is scaled by alpha / R.
    """

    stores_integers = False
    support: Tensor

    def __init__(
        self, A_RI: Tensor, B_OR: Tensor, values_K: Tensor, support_K: Tensor, bias: nn.Parameter | None, alpha: float
    ) -> None:
        super().__init__()
        self.out_features, self.in_features = B_OR.shape[0], A_RI.shape[1]
        self.alpha = alpha
        self.factor_A, self.factor_B = nn.Parameter(A_RI), nn.Parameter(B_OR)
        # Without a sparse part there is nothing to train in it, and optimizers trip over empty tensors.
        self.values = nn.Parameter(values_K, requires_grad=len(values_K) > 0)
        self.register_buffer("support", support_K)
        self.register_parameter("bias", bias)

    @classmethod
    def from_scratch(
        cls,
        num_in: int,
        num_out: int,
        *,
        rank: int,
        density: float,
        alpha: float,
        bias: bool = False,
        generator: torch.Generator | None = None,
        device: torch.device | str = "cpu",
    ) -> SLTrainLinear:
        """A layer as the paper begins with it: B zero, everything else uniform. No matrix (O, I) is made.

        Args:
            num_in: I.
            num_out: O.
            rank: R.
            density: K is this share of O I, rounded down.
            alpha: the product is scaled by alpha / R.
            bias: whether there is one.
            generator: of the CPU; draws support and numbers, the same on every device.
            device: where it will be; on `meta` nothing is drawn.
        """
        if torch.device(device).type == "meta":
            return cls.empty(num_in, num_out, rank, int(density * num_in * num_out), alpha, bias=bias, device=device)
        support_K = draw_support(num_out, num_in, int(density * num_in * num_out), generator)
        A_RI, values_K, bias_O = torch.empty(rank, num_in), torch.empty(len(support_K)), torch.empty(num_out)
        for tensor, width in ((A_RI, num_in), (values_K, num_in), (bias_O, num_out)):
            tensor.uniform_(-1 / math.sqrt(width), 1 / math.sqrt(width), generator=generator)
        made = cls(A_RI, torch.zeros(num_out, rank), values_K, support_K, nn.Parameter(bias_O) if bias else None, alpha)
        return made.to(device)

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        *,
        rank: int,
        density: float,
        alpha: float,
        support: Support = "random",
        generator: torch.Generator | None = None,
    ) -> SLTrainLinear:
        """The best product of rank R, and what it leaves of the weight where the support is; the bias is taken over.

        Args:
            linear: the layer; it is not changed.
            rank: R.
            density: share of the weights that the support covers.
            alpha: the product is scaled by alpha / R.
            support: at random as in the paper, where most is left, or nowhere.
            generator: of the CPU; draws a random support.
        """
        weight_OI = linear.weight.detach().float()
        rank = min(rank, *weight_OI.shape)
        U_OM, singular_M, V_MI = torch.linalg.svd(weight_OI, full_matrices=False)
        root_R = (singular_M[:rank] * rank / alpha).sqrt()
        A_RI, B_OR = root_R[:, None] * V_MI[:rank], U_OM[:, :rank] * root_R
        rest = torch.addmm(weight_OI, B_OR, A_RI, alpha=-alpha / rank).flatten()
        count = 0 if support == "none" else int(density * weight_OI.numel())
        if support == "largest":
            support_K = rest.abs().topk(count).indices.sort().values.to(index_dtype(rest.numel()))
        else:
            support_K = draw_support(linear.out_features, linear.in_features, count, generator).to(rest.device)
        made = cls(A_RI, B_OR, rest.index_select(0, support_K), support_K, linear.bias, alpha)
        return made.train(linear.training)

    @classmethod
    def empty(
        cls,
        num_in: int,
        num_out: int,
        rank: int,
        count: int,
        alpha: float,
        *,
        bias: bool,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> SLTrainLinear:
        """A layer of these sizes that waits for its tensors."""
        how: dict[str, Any] = {"device": device, "dtype": dtype}
        return cls(
            torch.empty(rank, num_in, **how),
            torch.empty(num_out, rank, **how),
            torch.empty(count, **how),
            torch.empty(count, device=device, dtype=index_dtype(num_in * num_out)),
            nn.Parameter(torch.empty(num_out, **how)) if bias else None,
            alpha,
        )

    @property
    def rank(self) -> int:
        """R."""
        return self.factor_A.shape[0]

    @property
    def scale(self) -> float:
        """alpha / R."""
        return self.alpha / self.rank

    @property
    def weight(self) -> Tensor:  # pyright: ignore[reportIncompatibleVariableOverride] - there is no whole weight
        """What tells the device and the type."""
        return self.factor_A

    @property
    def num_weights(self) -> int:
        return 0  # all it holds are parameters

    def num_nonzero(self) -> int:
        return 0

    def extra_repr(self) -> str:
        """Shown by `print(model)`."""
        sizes = f"rank={self.rank}, alpha={self.alpha}, values={len(self.values)}"
        return f"{self.in_features}, {self.out_features}, {sizes}"

    def forward(self, x: Tensor) -> Tensor:
        """Maps `(..., I)` to `(..., O)`; products run in autocast's type where that is on, else in that of `x`."""
        parts = self.factor_A, self.factor_B, self.values, self.support
        if not torch.is_grad_enabled() and x.numel() <= FEW_ROWS * self.in_features:
            return self._few(x, product_dtype(x))
        y: Any = _SparseLowRankProduct.apply(x, *parts, self.bias, self.scale, product_dtype(x))
        return y

    def _few(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """Without making W, which would take longer than the product with it."""
        x_NI = x.reshape(-1, self.in_features).to(dtype)
        low_NR = F.linear(x_NI, (self.scale * self.factor_A).to(dtype))
        y_NO = F.linear(low_NR, self.factor_B.to(dtype), None if self.bias is None else self.bias.to(dtype))
        # One number after the other is added to an output: in fp32, or bf16 would round every time.
        y_NO = y_NO.to(torch.promote_types(dtype, torch.float32))
        rows_K, columns_K = self.support // self.in_features, self.support % self.in_features
        y_NO.index_add_(1, rows_K, (x_NI.index_select(1, columns_K) * self.values.to(dtype)).to(y_NO.dtype))
        return y_NO.to(dtype).view(*x.shape[:-1], self.out_features)

    def dense(self) -> Tensor:
        """(alpha / R) B A + S, fp32 or wider, differentiable in its parts."""
        dtype = torch.promote_types(self.factor_A.dtype, torch.float32)
        with torch.autocast(self.factor_A.device.type, enabled=False):
            return composed(self.factor_A, self.factor_B, self.values, self.support, self.scale, dtype)

    def merge(self) -> nn.Linear:
        """A plain layer of the factors' type, computed in fp32 and rounded once."""
        weight_OI = self.dense().detach().to(self.factor_A.dtype)
        return to_linear(weight_OI, self._parameters["bias"], training=self.training)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *rest: Any) -> None:
        """Refuses a support that the layer does not have room for: a wrong position would add to a wrong weight."""
        stored = state_dict.get(f"{prefix}support")
        if stored is not None and not _is_support(stored, self.in_features * self.out_features):
            raise UserError(
                f"{prefix}support is not a sorted list of positions in a weight of "
                f"{self.out_features} x {self.in_features}",
                hint="a sound copy of the model",
            )
        super()._load_from_state_dict(state_dict, prefix, *rest)


def composed(
    A_RI: Tensor, B_OR: Tensor, values_K: Tensor, support_K: Tensor, scale: float, dtype: torch.dtype
) -> Tensor:
    """scale B A + S in `dtype`, differentiable in the parts."""
    product_OI = B_OR.to(dtype) @ (scale * A_RI).to(dtype)
    return product_OI.view(-1).index_add(0, support_K, values_K.to(dtype)).view_as(product_OI)


def draw_support(num_out: int, num_in: int, count: int, generator: torch.Generator | None = None) -> Tensor:
    """`count` different positions in a flattened (O, I) weight, every set of them as likely as any other, sorted.

    Memory and time go with `count`, not with O I, unless more than half is drawn.
    """
    total = num_out * num_in
    if 2 * count > total:
        found = torch.randperm(total, generator=generator)
    else:
        found = torch.empty(0, dtype=torch.int64)
        while len(found) < count:
            more = torch.randint(total, (count + count // 8 + 16,), generator=generator)
            found = torch.cat([found, more]).unique()
        # These are sorted, so that the first ones would not be any.
        found = found[torch.randperm(len(found), generator=generator)]
    return found[:count].sort().values.to(index_dtype(total))


def index_dtype(total: int) -> torch.dtype:
    """The smaller integer type that holds every position in `total` weights."""
    return torch.int32 if total <= 2**31 else torch.int64


def generator_of(seed: int, name: str) -> torch.Generator:
    """Draws the same for a layer of that name on every process and device, whatever other layers there are."""
    digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def _is_support(stored: Tensor, total: int) -> bool:
    if stored.is_floating_point() or stored.ndim != 1:
        return False
    if stored.is_meta or not len(stored):
        return True
    return bool(stored[0] >= 0) and bool(stored[-1] < total) and bool((stored[1:] > stored[:-1]).all())


class _SparseLowRankProduct(torch.autograd.Function):
    """Keeps x and the parts for the backward pass, and nothing of size (O, I) or (N, O)."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        A_RI: Tensor,
        B_OR: Tensor,
        values_K: Tensor,
        support_K: Tensor,
        bias_O: Tensor | None,
        scale: float,
        dtype: torch.dtype,
    ) -> Tensor:
        x_NI = x.reshape(-1, x.shape[-1]).to(dtype)
        weight_OI = _composed_in_place(A_RI, B_OR, values_K, support_K, scale, dtype)
        y_NO = F.linear(x_NI, weight_OI, None if bias_O is None else bias_O.to(dtype))
        ctx.save_for_backward(x_NI, A_RI, B_OR, values_K, support_K)
        ctx.scale, ctx.x_dtype, ctx.bias_dtype = scale, x.dtype, None if bias_O is None else bias_O.dtype
        return y_NO.view(*x.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x_NI, A_RI, B_OR, values_K, support_K = ctx.saved_tensors
        need_x, need_A, need_B, need_values, _, need_bias, _, _ = ctx.needs_input_grad
        dtype = x_NI.dtype
        grad_NO = grad.reshape(-1, grad.shape[-1]).to(dtype)
        grad_x = grad_A = grad_B = grad_values = None
        if need_x:
            grad_NI = grad_NO @ _composed_in_place(A_RI, B_OR, values_K, support_K, ctx.scale, dtype)
            grad_x = grad_NI.view(*grad.shape[:-1], -1).to(ctx.x_dtype)
        if need_A or need_B or need_values:
            # Summed over the tokens in fp32 inside the product and rounded once, also where `dtype` is bf16.
            grad_OI = grad_NO.t() @ x_NI
            if need_values:
                grad_values = grad_OI.view(-1).index_select(0, support_K).to(values_K.dtype)
            if need_A:
                grad_A = (B_OR.to(dtype).t() @ grad_OI).to(A_RI.dtype).mul_(ctx.scale)
            if need_B:
                grad_B = (grad_OI @ A_RI.to(dtype).t()).to(B_OR.dtype).mul_(ctx.scale)
        grad_bias = grad_NO.sum(0, dtype=ctx.bias_dtype) if need_bias else None
        return grad_x, grad_A, grad_B, grad_values, None, grad_bias, None, None


def _composed_in_place(
    A_RI: Tensor, B_OR: Tensor, values_K: Tensor, support_K: Tensor, scale: float, dtype: torch.dtype
) -> Tensor:
    """`composed` with one matrix (O, I) instead of two, for where no graph is kept."""
    product_OI = B_OR.to(dtype) @ (scale * A_RI).to(dtype)
    product_OI.view(-1).index_add_(0, support_K, values_K.to(dtype))
    return product_OI
