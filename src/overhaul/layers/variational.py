"""Layers whose weights have a distribution: independent normals, drawn anew in each pass of training.

Nguyen, Li, Bui and Turner (ICLR 2018, arXiv:1710.10628), after Blundell et al. (2015): the mean is the parameter that
the layer had, under its name, and beside it stands the logarithm of the standard deviation.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from overhaul.layers import swap


def sampled(mean: Tensor, log_std: Tensor) -> Tensor:
    """A draw by reparameterisation, `mean + std * noise`, with torch's own generator."""
    return mean + log_std.exp() * torch.randn_like(mean)


class VariationalLinear(nn.Linear):
    """A linear layer that draws its weight and bias in each pass of training, and uses their means in evaluation.

    Attributes:
        log_std: by the name of the parameter, in its shape.
    """

    log_std: nn.ParameterDict

    @classmethod
    def from_linear(cls, linear: nn.Linear, log_std: Mapping[str, Tensor]) -> VariationalLinear:
        """Takes over the parameters of `linear` (no copy) as means."""
        layer = cls(linear.in_features, linear.out_features, bias=False, device="meta")
        layer.log_std = nn.ParameterDict(log_std)
        return _with_parameters_of(layer, linear)

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, *_drawn(self))

    def plain(self) -> nn.Linear:
        """The layer of the means; parameters are taken over, not copied."""
        linear = nn.Linear(self.in_features, self.out_features, bias=False, device="meta")
        return _with_parameters_of(linear, self)


class VariationalConv2d(nn.Conv2d):
    """A convolution that draws its weight and bias in each pass of training, and uses their means in evaluation.

    Attributes:
        log_std: by the name of the parameter, in its shape.
    """

    log_std: nn.ParameterDict

    @classmethod
    def from_conv(cls, conv: nn.Conv2d, log_std: Mapping[str, Tensor]) -> VariationalConv2d:
        """Takes over the parameters of `conv` (no copy) as means."""
        layer = _like(cls, conv)
        layer.log_std = nn.ParameterDict(log_std)
        return _with_parameters_of(layer, conv)

    def forward(self, input: Tensor) -> Tensor:
        return self._conv_forward(input, *_drawn(self))

    def plain(self) -> nn.Conv2d:
        """The layer of the means; parameters are taken over, not copied."""
        return _with_parameters_of(_like(nn.Conv2d, self), self)


Variational = VariationalLinear | VariationalConv2d
Distribution = tuple[Tensor, Tensor]
"""Mean and logarithm of the standard deviation, of one shape."""


def trained_as_means(model: nn.Module) -> dict[str, nn.Parameter]:
    """Weights and biases of plain linear layers and of convolutions of images, by their names in the model."""
    layers = [(name, module) for name, module in model.named_modules() if type(module) in (nn.Linear, nn.Conv2d)]
    return {f"{name}.{own}".lstrip("."): p for name, layer in layers for own, p in layer.named_parameters()}


def make_variational(model: nn.Module, log_std: Mapping[str, Tensor]) -> nn.Module:
    """Gives weights a distribution, in place: the values that they have become the means.

    Args:
        model: with plain layers.
        log_std: for each of `trained_as_means`, in its shape; copied.
    """

    def of(layer: nn.Linear | nn.Conv2d, name: str) -> Variational:
        own = {parameter: log_std[f"{name}.{parameter}"].clone() for parameter, _ in layer.named_parameters()}
        linear = isinstance(layer, nn.Linear)
        return VariationalLinear.from_linear(layer, own) if linear else VariationalConv2d.from_conv(layer, own)

    for name in dict.fromkeys(name.rpartition(".")[0] for name in trained_as_means(model)):
        swap(model, [name], lambda layer, name=name: of(layer, name))
    return model


def distributions(model: nn.Module) -> dict[str, Distribution]:
    """Those of a model's variational layers, by the names of the means, with gradient."""
    layers = [(name, module) for name, module in model.named_modules() if isinstance(module, Variational)]
    return {
        f"{name}.{own}": (getattr(layer, own), log_std)
        for name, layer in layers
        for own, log_std in layer.log_std.items()
    }


def make_plain(model: nn.Module) -> nn.Module:
    """Leaves the means in place of the distributions, in the layers that there were before."""
    names = [name for name, module in model.named_modules() if isinstance(module, Variational)]
    swap(model, names, lambda layer: layer.plain())
    return model


def _drawn(layer: Variational) -> tuple[Tensor, Tensor | None]:
    """Weight and bias of this pass."""
    if not layer.training:
        return layer.weight, layer.bias
    bias = layer.bias if layer.bias is None else sampled(layer.bias, layer.log_std["bias"])
    return sampled(layer.weight, layer.log_std["weight"]), bias


def _like(kind: type[Any], conv: nn.Conv2d) -> Any:
    """A convolution of the same shape, without weights."""
    shape = conv.in_channels, conv.out_channels, conv.kernel_size, conv.stride, conv.padding, conv.dilation, conv.groups
    return kind(*shape, bias=False, padding_mode=conv.padding_mode, device="meta")


def _with_parameters_of(layer: nn.Linear | nn.Conv2d, given: nn.Linear | nn.Conv2d) -> Any:
    """The layer with the parameters of another one; they are taken over, not copied."""
    layer.weight = given.weight
    layer.register_parameter("bias", cast(nn.Parameter | None, given.bias))
    return layer.train(given.training)
