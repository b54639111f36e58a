"""Where the banks of channel-wise reprogramming go: behind convolutions, into normalisations (Ge et al., ICCV 2023)."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

from overhaul.banks import Sockets
from overhaul.errors import UserError
from overhaul.layers import swap
from overhaul.layers.reprogrammed import Form, Reprogrammed

Behind = Literal["spatial", "all", "scaled", "none"]
NORMS = (nn.BatchNorm2d, nn.LayerNorm, nn.GroupNorm)


def is_norm(module: nn.Module) -> bool:
    """Whether a module is a normalisation; those of language models are known by their name."""
    return isinstance(module, NORMS) or type(module).__name__.endswith("RMSNorm")


class Reprogramming(Sockets):
    """A kernel for each channel behind frozen convolutions, and normalisations of a task's own.

    Args:
        behind: `spatial` convolutions, of more than one pixel; `all`; `scaled`: behind those of one pixel a factor for
            each channel, and kernels behind the others; `none`.
        form: of the layers, as in `Reprogrammed`.
        kernel: pixels of a side, odd.
        norms: whether the affine parameters and the running statistics of normalisations are a task's own.
    """

    method = "clr"

    def __init__(self, *, behind: Behind = "spatial", form: Form = "behind", kernel: int = 3, norms: bool = True):
        self.behind, self.kernel, self.norms = behind, kernel, norms
        self.form: Form = form

    def settings(self) -> dict[str, Any]:
        return {"behind": self.behind, "form": self.form, "kernel": self.kernel, "norms": self.norms}

    def fit(self, model: nn.Module) -> None:
        wanted = {} if self.behind == "none" else self._sides(model)
        for name, side in wanted.items():
            swap(model, [name], lambda old, side=side: Reprogrammed(old, kernel=side, form=self.form))

    def _sides(self, model: nn.Module) -> dict[str, int]:
        """Of each convolution that gets a layer, by name, the pixels of a side of its kernels."""
        convolutions = {name: module for name, module in _everywhere(model) if isinstance(module, nn.Conv2d)}
        if not convolutions:
            raise UserError(
                f"{type(model).__name__} has no convolutions, behind which this method goes",
                allowed="convolutional networks; for transformers there is learn contracon",
            )
        found: dict[str, int] = {}
        seen: dict[int, str] = {}
        for name, module in convolutions.items():
            if id(module) in seen:
                raise UserError(f"{name} and {seen[id(module)]} are one convolution, used twice", hint="another model")
            if torch.nn.utils.parametrize.is_parametrized(module) or hasattr(module, "weight_g"):
                raise UserError(f"{name} has a weight that is computed, as by weight norm", hint="a plain convolution")
            seen[id(module)] = name
            if tuple(module.kernel_size) != (1, 1) or self.behind == "all":
                found[name] = self.kernel
            elif self.behind == "scaled":
                found[name] = 1
        if not found:
            raise UserError(f"all convolutions of {type(model).__name__} are of one pixel", hint="behind all")
        return found

    def remove(self, model: nn.Module) -> None:
        names = [name for name, module in model.named_modules() if isinstance(module, Reprogrammed)]
        swap(model, names, lambda layer: layer.convolution)

    def names(self, model: nn.Module) -> tuple[str, ...]:
        found = []
        for name, module in model.named_modules():
            if isinstance(module, Reprogrammed):
                found += [f"{name}.{own}" for own in module.begin()]
            elif self.norms and isinstance(module, NORMS):
                found += [f"{name}.{own}" for own in module.state_dict()]
        return tuple(found)

    def begin(self, model: nn.Module) -> dict[str, Tensor]:
        return {
            f"{name}.{own}": tensor
            for name, module in model.named_modules()
            if isinstance(module, Reprogrammed)
            for own, tensor in module.begin().items()
        }


def _everywhere(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """All modules by all their names; one that is used in two places comes up twice."""
    return list(model.named_modules(remove_duplicate=False))
