"""The simplest packed format, for tests of what reads any: int8 rows with a scale each, `quant_method: rows`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from overhaul import artifact
from overhaul.layers import PackedLinear, swap, to_linear
from overhaul.select import block_linears

QUANT_METHOD = "rows"


class RowsLinear(PackedLinear):
    """`weight_OI = levels_OI * scale_O`."""

    levels: Tensor
    scale: Tensor

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.in_features, self.out_features, self.bias = in_features, out_features, None
        self.register_buffer("levels", torch.empty(out_features, in_features, dtype=torch.int8))
        self.register_buffer("scale", torch.empty(out_features))

    @classmethod
    def from_linear(cls, linear: nn.Linear) -> RowsLinear:
        layer = cls(linear.in_features, linear.out_features)
        weight_OI = linear.weight.detach().float()
        layer.scale = weight_OI.abs().amax(1) / 127
        layer.levels = (weight_OI / layer.scale[:, None]).round().to(torch.int8)
        return layer

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.dense().to(x.dtype))

    def dense(self) -> Tensor:
        return self.levels.float() * self.scale[:, None].float()

    def merge(self) -> nn.Linear:
        return to_linear(self.dense(), None, training=self.training)

    @property
    def num_weights(self) -> int:
        return self.levels.numel()

    def num_nonzero(self) -> int:
        return int(self.levels.count_nonzero())


def refuse(settings: Mapping[str, Any]) -> None:
    assert settings["quant_method"] == QUANT_METHOD


def layers(model: nn.Module, settings: Mapping[str, Any], *_shapes: object) -> None:
    assert settings["bits"] == 8
    swap(model, block_linears(model), lambda old: RowsLinear(old.in_features, old.out_features))


def settings(model: nn.Module) -> dict[str, Any]:
    return {"quant_method": QUANT_METHOD, "bits": 8}


def write_rows(source: Path, directory: Path) -> None:
    """The model in `source`, its blocks' linear layers as int8 rows."""
    made = artifact.load(source)
    model = cast(Any, made.model)
    swap(model, block_linears(model), RowsLinear.from_linear)
    model.config.quantization_config = settings(model)
    directory.mkdir(parents=True)
    artifact.write_model(replace(made, model=model), directory)
