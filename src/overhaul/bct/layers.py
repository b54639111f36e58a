"""Linear layers and embeddings stored in blocks.

`weight` holds the integers, one a byte or two, `scale` the shifts or float scales; both are buffers. Letters of shapes:
O outputs, I inputs, V tokens of the vocabulary, D width, Y and X blocks down and across.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from overhaul.bct import blocks
from overhaul.bct.blocks import SCALE_DTYPES, Blocks, snap
from overhaul.bct.product import float_product, integer_product
from overhaul.bct.scheme import ScaleKind, Scheme, block_of
from overhaul.layers import Packed, PackedLinear, to_linear
from overhaul.machine import product_dtype


class BlockMatrix(Packed):
    """A matrix in blocks.

    Attributes:
        bits: 8 or 4.
        block: rows and columns of a block.
    """

    # Rounding has no gradient, and embeddings and norms are not what adapters are merged into.
    trains_adapters: ClassVar[bool] = False
    weight: Tensor
    scale: Tensor

    def __init__(self, shape: tuple[int, int], block: str, bits: int, scale: ScaleKind) -> None:
        super().__init__()
        self.shape, self.bits, self.block = shape, bits, block_of(block, shape)
        num_rows, num_columns = shape
        across = num_columns if bits == 8 else -(-num_columns // 2)
        grid = (-(-num_rows // self.block[0]), -(-num_columns // self.block[1]))
        self.register_buffer("weight", torch.zeros(num_rows, across, dtype=torch.int8 if bits == 8 else torch.uint8))
        self.register_buffer("scale", torch.zeros(grid, dtype=SCALE_DTYPES[scale]))

    def fill(self, encoded: Blocks) -> None:
        """Takes over the integers and scales of a matrix that was encoded in these blocks."""
        self.weight = encoded.values if self.bits == 8 else blocks.pack(encoded.values)
        self.scale = encoded.scale

    def rows(self, which: Tensor | None = None) -> Tensor:
        """The matrix in fp32, or those of its rows that `which` (N,) names."""
        weight, scale, block = self.weight, self.scale, self.block
        if which is not None:
            weight, scale, block = weight[which], scale[which // block[0]], (1, block[1])
        values = weight if self.bits == 8 else blocks.unpack(weight, self.shape[1])
        return blocks.decode(values, scale, block)

    def dense(self) -> Tensor:
        """The matrix in fp32."""
        return self.rows()

    @property
    @abstractmethod
    def num_weights(self) -> int: ...

    def num_nonzero(self) -> int:
        values = self.weight if self.bits == 8 else blocks.unpack(self.weight, self.shape[1])
        return int(values.count_nonzero())

    def _apply(self, fn: Any, recurse: bool = True) -> BlockMatrix:
        """What moves and casts a module; float scales are moved only, for a cast would round them again."""
        scale = self.scale
        super()._apply(fn, recurse)
        self.scale = scale.to(self.weight.device)
        return self

    def extra_repr(self) -> str:
        return f"{self.shape[0]} x {self.shape[1]}, {self.bits} bits, blocks of {self.block[0]}x{self.block[1]}"


class BlockLinear(BlockMatrix, PackedLinear):
    """A linear layer stored in blocks.

    With a scheme that computes products in integers it rounds what flows in and out to 8 bits; without, it is the layer
    whose weight is x~.
    """

    def __init__(self, num_in: int, num_out: int, bias_O: nn.Parameter | None, bits: int, scheme: Scheme) -> None:
        super().__init__((num_out, num_in), scheme.block, bits, scheme.scale)
        self.in_features, self.out_features, self.scheme = num_in, num_out, scheme
        self.register_parameter("bias", bias_O)

    @property
    def num_weights(self) -> int:
        return self.in_features * self.out_features

    def forward(self, x: Tensor) -> Tensor:
        if not self.scheme.has("matmul"):
            dtype = product_dtype(x)
            return F.linear(x.to(dtype), self.rows().to(dtype), None if self.bias is None else self.bias.to(dtype))
        columns = self.scheme.activation_block
        y = self._product(snap(x, columns))
        # A bias is as small as a norm's weight: 8 bits on the grid of the results.
        return snap(y if self.bias is None else y + snap(self.bias, columns), columns)

    def _product(self, x: Tensor) -> Tensor:
        if self.scheme.accumulate == "float":
            return float_product(x, self.rows())
        x_NI = x.reshape(-1, x.shape[-1])
        shift_OX = self.scale.repeat_interleave(self.block[0], 0)[: self.out_features]
        y_NO = integer_product(x_NI, self.rows(), self.scheme.activation_block, self.block[1], shift_OX)
        return y_NO.view(*x.shape[:-1], -1)

    def merge(self) -> nn.Linear:
        bias_O = cast(nn.Parameter, self.bias)
        return to_linear(self.rows(), bias_O, training=self.training)


class RoundedLinear(nn.Linear):
    """A float layer between tensors in blocks: its weight stays as it is, what flows in and out has 8 bits."""

    scheme: Scheme

    @classmethod
    def from_linear(cls, linear: nn.Linear, scheme: Scheme) -> RoundedLinear:
        """Takes over the parameters of `linear`, no copy."""
        layer = cls(linear.in_features, linear.out_features, bias=False, device="meta")
        layer.weight, layer.bias, layer.scheme = linear.weight, cast(nn.Parameter, linear.bias), scheme
        return layer.train(linear.training)

    def forward(self, x: Tensor) -> Tensor:
        """Maps `(..., I)` to `(..., O)` on the grid."""
        columns = self.scheme.activation_block
        y = float_product(snap(x, columns), self.weight)
        return snap(y if self.bias is None else y + self.bias, columns)


class BlockEmbedding(BlockMatrix):
    """An embedding stored in blocks; looking up a token decodes its row only."""

    def __init__(self, num_tokens: int, width: int, bits: int, scheme: Scheme, dtype: torch.dtype) -> None:
        super().__init__((num_tokens, width), scheme.embedding_block, bits, scheme.scale)
        self.num_embeddings, self.embedding_dim = num_tokens, width
        self.scheme, self.dtype = scheme, torch.float32 if scheme.computes else dtype

    @property
    def num_weights(self) -> int:
        return self.num_embeddings * self.embedding_dim

    def forward(self, ids: Tensor) -> Tensor:
        """`(...)` tokens to `(..., D)`."""
        return self.rows(ids.flatten()).view(*ids.shape, -1).to(self.dtype)


class TiedHead(PackedLinear):
    """An output embedding that reads the input embedding, which stores the weight: no tensor of its own."""

    trains_adapters: ClassVar[bool] = False

    def __init__(self, embedding: BlockEmbedding) -> None:
        super().__init__()
        # In a tuple, so that the embedding is not registered, counted and stored a second time.
        self._embedding = (embedding,)
        self.in_features, self.out_features, self.bias = embedding.embedding_dim, embedding.num_embeddings, None

    @property
    def num_weights(self) -> int:
        return 0

    def num_nonzero(self) -> int:
        return 0

    def forward(self, x: Tensor) -> Tensor:
        return head_product(x, self.dense())

    def dense(self) -> Tensor:
        return self._embedding[0].rows()

    def merge(self) -> nn.Linear:
        return to_linear(self.dense(), None, training=self.training)


class BlockHead(BlockLinear):
    """An output embedding of its own: logits are the end of the model and stay as they are summed."""

    def forward(self, x: Tensor) -> Tensor:
        y = head_product(x, self.rows())
        return y if self.bias is None else y + self.bias


def head_product(x: Tensor, weight_VD: Tensor) -> Tensor:
    """Logits `(..., V)` of hidden states `(..., D)`, in the type of products with these."""
    dtype = product_dtype(x)
    return F.linear(x.to(dtype), weight_VD.to(dtype))
