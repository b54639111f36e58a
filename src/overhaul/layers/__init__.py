"""Structured replacements of `nn.Linear`, one per file, and `swap`, the only code that replaces modules."""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

Layer = TypeVar("Layer", bound=nn.Module)


class LinearLike(nn.Module, ABC):
    """A linear map stored in another form: low-rank increments, masks, integers."""

    in_features: int
    out_features: int
    bias: nn.Parameter | None

    @abstractmethod
    def forward(self, x: Tensor) -> Tensor:
        """Maps `(..., in_features)` to `(..., out_features)`."""

    @abstractmethod
    def dense(self) -> Tensor:
        """The effective weight `(out_features, in_features)`, differentiable in the trainable tensors."""

    @abstractmethod
    def merge(self) -> nn.Linear:
        """A plain (or masked) linear layer computing the same map."""


class Packed(nn.Module, ABC):
    """A module whose weights lie on disk in a form of their own, which is neither pruned nor merged: integers, factors.

    `state_dict` is what lies on disk. Integers are buffers.

    Attributes:
        trains_adapters: whether gradients pass through it as through the layer it stands for.
        stores_integers: whether it is quantized.
    """

    trains_adapters: ClassVar[bool] = True
    stores_integers: ClassVar[bool] = True

    @property
    @abstractmethod
    def num_weights(self) -> int:
        """How many numbers of the dense model it stands for, beside its own parameters."""

    @abstractmethod
    def num_nonzero(self) -> int:
        """How many of them are not zero."""


class PackedLinear(Packed, LinearLike):
    """A linear map stored in a form of its own; `merge` gives the dense layer that it stands for.

    Attributes:
        weight: the integers, or what tells the device.
    """

    weight: Tensor


class Adapter(LinearLike, ABC):
    """A frozen linear map with an increment that is trained.

    Attributes:
        dropout: share of the increment's input that is dropped in training.
        enabled: False computes the frozen base alone, such as for a reference model.
    """

    def __init__(self, base: nn.Linear | PackedLinear, dropout: float = 0.0) -> None:
        super().__init__()
        self.in_features, self.out_features = base.in_features, base.out_features
        self.dropout, self.enabled = dropout, True
        self.train(base.training)


@contextlib.contextmanager
def adapters_off(model: nn.Module) -> Iterator[None]:
    """Inside, every adapter of `model` computes its frozen base: the reference model without a copy."""
    layers = [module for module in model.modules() if isinstance(module, Adapter) and module.enabled]
    for layer in layers:
        layer.enabled = False
    try:
        yield
    finally:
        for layer in layers:
            layer.enabled = True


def swap(model: nn.Module, names: Iterable[str], make: Callable[[Any], Layer]) -> dict[str, Layer]:
    """Replaces the submodules called `names` by `make(old)`, in place.

    Returns:
        The new modules by name. A name that the model does not have raises `AttributeError`.
    """
    made = {}
    for name in names:
        parent_name, _, child = name.rpartition(".")
        parent = model.get_submodule(parent_name)
        made[name] = make(model.get_submodule(name))
        setattr(parent, child, made[name])
    return made


def is_adapter(module: nn.Module) -> bool:
    """Whether it is a linear map in a form that is merged before it is written."""
    return isinstance(module, LinearLike) and not isinstance(module, Packed)


def to_linear(weight_OI: Tensor, bias_O: nn.Parameter | None, *, training: bool) -> nn.Linear:
    """A frozen plain layer with this weight; the bias is taken over, not copied."""
    num_out, num_in = weight_OI.shape
    linear = nn.Linear(num_in, num_out, bias=False, device="meta")
    linear.weight = nn.Parameter(weight_OI.detach(), requires_grad=False)
    linear.register_parameter("bias", bias_O)
    return linear.train(training)


def dequantize_all(model: nn.Module) -> nn.Module:
    """Replaces every packed linear layer by the dense one it stands for, in place: the model is a plain one then."""
    names = [name for name, module in model.named_modules() if isinstance(module, PackedLinear)]
    with torch.no_grad():
        swap(model, names, lambda layer: layer.merge())
    inner: Any = model
    if getattr(inner.config, "quantization_config", None) is not None:
        del inner.config.quantization_config
    return model


def merge_all(model: nn.Module) -> nn.Module:
    """Replaces every adapter by its merged linear layer, in place; packed layers stay as they are."""
    names = [name for name, module in model.named_modules() if is_adapter(module)]
    with torch.no_grad():
        swap(model, names, lambda layer: layer.merge())
    return model
