"""A linear layer in int8, as LLM.int8() has it (Dettmers et al., 2022), in the layout of bitsandbytes.

    y = x[:, F] W[:, F]^T                       F: outlier columns of this batch, in 16 bit (fp32 where that is faster)
      + c_x c_w / 127^2 * (x_q W_q^T) + b       the others, in int8, summed in int32

Up to `FEW_ROWS` rows, as in decoding, activations are not rounded at all: there the time goes into reading the weights,
so that int8 activations would save nothing. It is the number of rows that decides, never the clock.

Letters of shapes: N tokens, I inputs, O outputs, C columns.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F  # noqa: N812
from torch.utils.weak import WeakTensorKeyDictionary

from overhaul import int8
from overhaul.errors import UserError
from overhaul.int8 import Kind, Rows, Scale
from overhaul.layers import PackedLinear, to_linear
from overhaul.machine import product_dtype

FEW_ROWS = 8
"""From 9 rows on, int8 products are the faster ones on processors with integer instructions, and on those without."""
_LANES = 32
"""torch's kernel for few rows reads this many inputs at a time, and does not check that there are as many."""
_ALIGNMENT = 64
"""It also reads from aligned addresses only, which tensors in a mapped file need not have: elsewhere it crashes."""


class Int8Linear(PackedLinear):
    """A linear layer whose weight is int8; the tensors have bitsandbytes' names.

    Attributes:
        weight: (O, I) int8.
        SCB: (O,) fp32, the constant of each output: 127 steps. It stays fp32 whatever the model is cast to.
        weight_format: 0, row after row; bitsandbytes writes it.
        zero: (O,) int32, what is added to the integers; None without zero points.
        outlier_columns: (C,) int64, columns kept as they were: their integers are zero; None if there are none.
        outlier_weight: (O, C), those columns.
        bias: (O,) or None, the layer's own.
        kind: which arithmetic.
        few_rows: up to so many rows the activations are not rounded.
    """

    weight: Tensor
    SCB: Tensor
    weight_format: Tensor
    zero: Tensor | None
    outlier_columns: Tensor | None
    outlier_weight: Tensor | None

    def __init__(
        self, weight_OI: Tensor, scale: Scale, bias: nn.Parameter | None, kind: Kind, kept: tuple[Tensor, Tensor] | None
    ) -> None:
        super().__init__()
        self.out_features, self.in_features = weight_OI.shape
        self.kind, self.few_rows = kind, FEW_ROWS
        self._kept: tuple[tuple[Tensor, int, torch.dtype], tuple[Tensor, Tensor]] | None = None
        self.register_buffer("weight", weight_OI)
        self.register_buffer("SCB", scale.constant.flatten())
        self.register_buffer("weight_format", torch.zeros((), dtype=torch.uint8, device=weight_OI.device))
        self.register_buffer("zero", None if scale.zero is None else scale.zero.flatten().to(torch.int32))
        columns_C, kept_OC = kept or (None, None)
        self.register_buffer("outlier_columns", columns_C)
        self.register_buffer("outlier_weight", kept_OC)
        self.register_parameter("bias", bias)

    @classmethod
    def from_linear(cls, linear: nn.Linear, kind: Kind, columns_C: Tensor | None = None) -> Int8Linear:
        """Rounds the weight of `linear`, which is not changed; its bias is taken over, not copied.

        Args:
            linear: the layer.
            kind: which arithmetic.
            columns_C: columns to keep as they are, in order.
        """
        weight_OI, kept = linear.weight.detach(), None
        if columns_C is not None and len(columns_C):
            kept = columns_C, weight_OI[:, columns_C].clone()
            weight_OI = weight_OI.index_fill(1, columns_C, 0.0)
        q_OI, scale = int8.quantize_weight(weight_OI, kind)
        return cls(q_OI, scale, linear.bias, kind, kept).train(linear.training)

    @classmethod
    def empty(cls, linear: nn.Linear, kind: Kind, num_columns: int = 0) -> Int8Linear:
        """A layer of the shape of `linear` that waits for its tensors."""
        num_out, num_in = linear.out_features, linear.in_features
        zero_O = torch.zeros(num_out) if kind.zero_point else None
        columns = torch.empty(num_columns, dtype=torch.int64), linear.weight.new_empty(num_out, num_columns)
        q_OI = torch.empty(num_out, num_in, dtype=torch.int8)
        return cls(q_OI, Scale(torch.empty(num_out), zero_O), linear.bias, kind, columns if num_columns else None)

    @property
    def scale(self) -> Scale:
        """Of each output, (O, 1)."""
        return Scale(self.SCB[:, None], None if self.zero is None else self.zero[:, None].float())

    @property
    def num_weights(self) -> int:
        return self.weight.numel()

    def num_nonzero(self) -> int:
        stands_for_zero = 0 if self.zero is None else -self.zero[:, None]
        kept = 0 if self.outlier_weight is None else int(self.outlier_weight.count_nonzero())
        return int((self.weight != stands_for_zero).sum()) + kept

    def forward(self, x: Tensor) -> Tensor:
        """Maps `(..., I)` of any float type to `(..., O)`, of autocast's type where that is on, else that of `x`."""
        y: Any = _Int8Product.apply(x, self) if x.requires_grad and torch.is_grad_enabled() else self.product(x)
        bias_O = self._parameters["bias"]
        return y if bias_O is None else y + bias_O.to(y.dtype)

    def product(self, x: Tensor) -> Tensor:
        """x W^T without the bias."""
        compute = self._few if x.numel() <= self.few_rows * self.in_features else self._many
        if torch.is_autocast_enabled(x.device.type):
            dtype = product_dtype(x)
            with torch.autocast(x.device.type, enabled=False):
                y_NO = compute(x, dtype)
        else:
            y_NO = compute(x, x.dtype)
        return y_NO.view(*x.shape[:-1], self.out_features)

    def _few(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """Activations in 16 bit with int8 weights."""
        # A module's attributes are looked up slowly, and with one row that counts: `_buffers` is the dictionary behind.
        tensors, x_NI = self._buffers, x.reshape(-1, self.in_features)
        if tensors["zero"] is not None or self.in_features % _LANES or x.device.type != "cpu" or not len(x_NI):
            return F.linear(x_NI.to(dtype), self.dense().to(dtype))
        weight_OI, (step_O, factor_O) = tensors["weight"], self._steps(dtype)
        assert weight_OI is not None
        if weight_OI.data_ptr() % _ALIGNMENT:
            with torch.inference_mode(False):
                tensors["weight"] = weight_OI = weight_OI.clone()
        x16_NI = x_NI.to(torch.bfloat16).contiguous()
        if x16_NI.data_ptr() % _ALIGNMENT:
            x16_NI = x16_NI.clone()
        y_NO = torch.ops.aten._weight_int8pack_mm(x16_NI, weight_OI, factor_O)
        if dtype != torch.bfloat16:
            y_NO = torch.mul(y_NO, step_O).to(dtype)
        if (columns_C := tensors["outlier_columns"]) is not None and self.outlier_weight is not None:
            y_NO += x_NI[:, columns_C].to(dtype) @ self.outlier_weight.to(dtype).t()
        return y_NO

    def kept(self) -> tuple[Tensor, ...]:
        """What the layer has made of its tensors for its own use, beside its state."""
        return () if self._kept is None else self._kept[1]

    def _steps(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """The steps in fp32, and the factors in bf16 that the kernel for few rows multiplies its sums by; kept.

        Sums that are wanted in bf16 get their steps there. Others get them afterwards, in fp32: torch's kernel for
        fp32 is a plain loop, and this way only x and the sums are rounded.
        """
        constant_O = self._buffers["SCB"]
        assert constant_O is not None
        key = (constant_O, constant_O._version if not constant_O.is_inference() else 0, dtype)
        if self._kept is None or self._kept[0][0] is not key[0] or self._kept[0][1:] != key[1:]:
            step_O = constant_O * (1 / int8.LARGEST)
            factor_O = step_O.to(dtype) if dtype == torch.bfloat16 else torch.ones_like(step_O, dtype=torch.bfloat16)
            self._kept = key, (step_O, factor_O)
        return self._kept[1]

    def _many(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """The decomposition: int8 products, and columns with outliers in 16 bit."""
        x_NI = x.reshape(-1, self.in_features)
        rows = self._rows(x)
        y_NO = int8.product(rows, self.weight, self.scale).to(dtype)
        if len(rows.columns):
            part_OC = int8.numbers_of(self.weight[:, rows.columns], self.scale).to(dtype)
            y_NO.addmm_(x_NI[:, rows.columns].to(dtype), part_OC.t())
        if self.outlier_columns is not None and self.outlier_weight is not None:
            y_NO.addmm_(x_NI[:, self.outlier_columns].to(dtype), self.outlier_weight.to(dtype).t())
        return y_NO

    def _rows(self, x: Tensor) -> Rows:
        """The activations as integers; layers that read the same tensor (q, k, v; gate, up) share them."""
        if self.outlier_columns is not None:
            kept_out_NI = x.reshape(-1, self.in_features).index_fill(1, self.outlier_columns, 0.0)
            return int8.quantize_rows(kept_out_NI, self.kind)
        if x.is_inference():  # such tensors do not tell whether they were changed
            return int8.quantize_rows(x.reshape(-1, self.in_features), self.kind)
        key = (x._version, self.kind)
        found_key, found = _QUANTIZED.get(x, (None, None))
        if found is None or found_key != key:
            found = int8.quantize_rows(x.reshape(-1, self.in_features), self.kind)
            _QUANTIZED.clear()  # autograd may keep the tensor of every block alive until the backward pass
            _QUANTIZED[x] = key, found
        return found

    def dense(self) -> Tensor:
        weight_OI = int8.numbers_of(self.weight, self.scale)
        if self.outlier_columns is not None and self.outlier_weight is not None:
            weight_OI[:, self.outlier_columns] = self.outlier_weight.float()
        return weight_OI

    def merge(self) -> nn.Linear:
        """The dequantized layer, fp32."""
        return to_linear(self.dense(), self.bias, training=self.training)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}, {self.kind}"

    def _apply(self, fn: Any, recurse: bool = True) -> Int8Linear:
        """What moves and casts a module; the constants are moved only, for bf16 would make 0.4% errors of them."""
        constants_O = self.SCB
        super()._apply(fn, recurse)
        self.SCB = constants_O.to(self.weight.device)
        return self

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *more: Any) -> None:
        weight = state_dict.get(f"{prefix}weight")
        if weight is not None and weight.dtype != torch.int8:
            raise UserError(
                f"{prefix}weight is {weight.dtype}, and the layer is int8: the weight is not quantized",
                hint="load it into nn.Linear first, then Int8Linear.from_linear; or overhaul quantize int8",
            )
        super()._load_from_state_dict(state_dict, prefix, *more)


_QUANTIZED: Any = WeakTensorKeyDictionary()
"""Activations of the layers that ran last, for as long as their tensor lives; never those of two tensors."""


class _Int8Product(torch.autograd.Function):
    """The gradient of the input is that of the dequantized weight; the integers have none."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: Int8Linear) -> Tensor:
        ctx.layer, ctx.x_dtype = layer, x.dtype
        return layer.product(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return (grad @ ctx.layer.dense().to(grad.dtype)).to(ctx.x_dtype), None
