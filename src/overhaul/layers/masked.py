"""A linear layer that knows which of its weights were pruned."""

from __future__ import annotations

from typing import cast

import numpy as np
import torch
from torch import Tensor, nn

from overhaul.layers import swap, to_linear


class MaskedLinear(nn.Linear):
    """A linear layer whose zeros are a fact, not a guess: a kept weight may be 0, a pruned one must be.

    The mask is a buffer that is not part of the state dict, so that the weights stay a stock checkpoint; an
    `Artifact` stores it beside them. It is held eight weights a byte: as booleans it would take half the memory of
    the bf16 weights. The weight is zero wherever the mask is False; `enforce` restores that after an update.
    """

    packed: Tensor  # uint8, the bits of `pack_bits`

    @classmethod
    def from_linear(cls, linear: nn.Linear, mask_OI: Tensor) -> MaskedLinear:
        """Takes over the parameters of `linear` (no copy) and zeroes what `mask_OI` does not keep."""
        layer = cls(linear.in_features, linear.out_features, bias=False, device="meta")
        layer.weight, layer.bias = linear.weight, cast(nn.Parameter, linear.bias)
        layer.register_buffer("packed", pack_bits(mask_OI.to(linear.weight.device)), persistent=False)
        layer.train(linear.training)
        layer.enforce()
        return layer

    @property
    def mask(self) -> Tensor:
        """(out, in) bool, True = kept."""
        return unpack_bits(self.packed, (self.out_features, self.in_features))

    @torch.no_grad()
    def enforce(self) -> None:
        """Sets every pruned weight to exactly +0."""
        self.weight.masked_fill_(~self.mask, 0.0)

    @property
    def num_pruned(self) -> int:
        """How many weights the mask removes."""
        mask_OI = self.mask
        return mask_OI.numel() - int(mask_OI.sum())


def without_masks(model: nn.Module) -> nn.Module:
    """Replaces every `MaskedLinear` by a plain frozen layer with the same weight, in place."""
    names = [name for name, module in model.named_modules() if isinstance(module, MaskedLinear)]
    swap(model, names, lambda masked: to_linear(masked.weight, masked.bias, training=masked.training))
    return model


def pack_bits(mask: Tensor) -> Tensor:
    """Eight booleans a byte, the first in the highest bit, row after row: uint8."""
    return torch.from_numpy(np.packbits(mask.cpu().numpy())).to(mask.device)


def unpack_bits(packed: Tensor, shape: tuple[int, int]) -> Tensor:
    """The booleans that `pack_bits` packed."""
    bits = np.unpackbits(packed.cpu().numpy(), count=shape[0] * shape[1])
    return torch.from_numpy(bits.view(bool).reshape(shape)).to(packed.device)
