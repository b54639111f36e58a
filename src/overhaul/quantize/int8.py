"""LLM.int8(): 8-bit matrix products with outlier columns in 16 bit (Dettmers et al., 2022, arXiv:2208.07339)."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field, model_validator

from overhaul.errors import UserError, did_you_mean
from overhaul.method import NonNegative, Positive, Transform

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor, nn

    from overhaul.data import Data
    from overhaul.int8 import Kind
    from overhaul.stream import Stream

HEAD = "lm_head"
"""In `skip`: the output embedding, whatever the model calls it."""


class Int8(Transform):
    """Store linear layers as int8 and multiply in int8, outlier columns in 16 bit: half the memory, no training."""

    paper: ClassVar[str] = (
        "Tim Dettmers, Mike Lewis, Younes Belkada, Luke Zettlemoyer: LLM.int8(): 8-bit Matrix Multiplication for "
        "Transformers at Scale, 2022, arXiv:2208.07339"
    )
    needs_data: ClassVar[bool] = True
    writes_stock: ClassVar[bool] = False

    threshold: NonNegative = Field(
        6.0, description="Input columns with a magnitude from here on are multiplied in 16 bit; 0 for none."
    )
    granularity: Literal["vector", "row", "tensor"] = Field(
        "vector",
        description="What shares a constant: each token and each output; each token and all weights; all and all.",
    )
    zero_point: bool = Field(False, description="Asymmetric integers, from the smallest to the largest number.")
    keep_outlier_columns: bool = Field(
        False, description="Keep the weight columns that meet outliers in the calibration text as they are."
    )
    skip: tuple[str, ...] = Field(
        (HEAD,), description="Layers left as they are, by the ends of their names; tied ones always are."
    )
    samples: Positive = Field(16, description="Calibration windows, read only to find the columns to keep.")
    seq_len: Positive = Field(512, description="Tokens per calibration window; fewer where the model reads fewer.")

    @model_validator(mode="after")
    def _columns_need_a_threshold(self) -> Int8:
        if self.keep_outlier_columns and not self.threshold:
            raise ValueError("keep_outlier_columns keeps what reaches the threshold, and threshold 0 means no outliers")
        return self

    @property
    def kind(self) -> Kind:
        """The arithmetic of every layer."""
        from overhaul.int8 import Kind

        return Kind(threshold=self.threshold, granularity=self.granularity, zero_point=self.zero_point)

    def reads_data(self) -> bool:
        return self.keep_outlier_columns

    def check(self, model: nn.Module, data: Data | None) -> None:
        """Refuses what `apply` would refuse.

        Raises:
            UserError: a name in `skip` fits no layer, a weight is not finite, or the model is quantized already.
        """
        chosen(model, self.skip)

    def apply(self, model: nn.Module, calib: Stream | None) -> nn.Module:
        """Replaces layer after layer, so that never more than one is there in both forms.

        Raises:
            UserError: as `check`.
        """
        from overhaul.interop.bitsandbytes import settings
        from overhaul.walk import walk

        names = chosen(model, self.skip)
        _say_speed(model, names)
        waiting = dict.fromkeys(names)
        if self.keep_outlier_columns:
            for block in walk(model, calib, "quantize int8"):
                absmax = block.statistics("absmax")
                for name in [name for name in block.linears if name in waiting]:
                    del waiting[name]
                    self._quantize(model, name, (absmax[name] >= self.threshold).nonzero().flatten())
        for name in waiting:
            self._quantize(model, name, None)
        inner: Any = model
        inner.config.quantization_config = settings(model)
        return model

    def _quantize(self, model: nn.Module, name: str, columns_C: Tensor | None) -> None:
        """Replaces one layer and notes its zeros and its error for the report."""
        from overhaul.journal import note_layer
        from overhaul.layers import swap
        from overhaul.layers.int8 import Int8Linear
        from overhaul.machine import release_memory

        linear: Any = model.get_submodule(name)
        layer = Int8Linear.from_linear(linear, self.kind, columns_C)
        swap(model, [name], lambda _: layer)
        before_OI = linear.weight.detach().float()
        change = (layer.dense() - before_OI).norm() / before_OI.norm().clamp_min(1e-30)
        note_layer(name, sparsity=1 - layer.num_nonzero() / layer.num_weights, error=float(change))
        del linear, before_OI
        release_memory()  # else the dense weights that are gone still count for a while


def chosen(model: nn.Module, skip: Sequence[str]) -> list[str]:
    """The names of the linear layers to be quantized: all but those in `skip` and those whose weight is shared.

    Raises:
        UserError: a name fits no layer, there is nothing left, or a weight is not finite.
    """
    from torch import nn

    from overhaul.layers import Packed

    if any(isinstance(module, Packed) for module in model.modules()):
        raise UserError("the model is quantized already", hint="the model it was quantized from")
    outer: Any = model
    head = outer.get_output_embeddings()
    linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    ends = sorted({name.rsplit(".", 1)[-1] for name in linears})
    for given in skip:
        if given != HEAD and not any(_ends_in(name, given) for name in linears):
            raise UserError(
                f"--skip {given}: no linear layer is called so",
                allowed=", ".join(dict.fromkeys([*ends, HEAD])),
                hint=did_you_mean(given, ends),
            )
    owners = Counter(id(parameter) for module in model.modules() for parameter in module.parameters(recurse=False))
    names = [
        name
        for name, linear in linears.items()
        if owners[id(linear.weight)] == 1
        and not (HEAD in skip and linear is head)
        and not any(_ends_in(name, given) for given in skip)
    ]
    if not names:
        raise UserError(f"--skip {' '.join(skip)} leaves nothing to quantize", allowed=", ".join(ends))
    for name in names:
        if not linears[name].weight.isfinite().all():
            raise UserError(f"{name}.weight contains NaN or infinity", hint="check the model's files")
    return names


def _ends_in(name: str, end: str) -> bool:
    return name == end or name.endswith(f".{end}")


def _say_speed(model: nn.Module, names: Sequence[str]) -> None:
    """Says how int8 products compare with fp32 ones here, where they take longer."""
    from overhaul.int8_products import slowdown
    from overhaul.progress import say

    weights = [model.get_parameter(f"{name}.weight") for name in names]
    largest = max(weights, key=lambda weight: weight.numel())
    kernel, ratio = slowdown(largest.shape[0], largest.shape[1], largest.device)
    if ratio > 1:
        say(f"int8 products take {ratio:.1f} times as long as fp32 ones on this machine (the fastest is {kernel}); the "
            "memory is saved all the same")  # fmt: skip
