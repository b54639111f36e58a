"""Where the banks of channel-wise reprogramming go in a language model: behind linear layers. Ours, not the paper's."""

from __future__ import annotations

from functools import partial
from typing import Any, Literal

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from overhaul.banks import Sockets
from overhaul.errors import UserError
from overhaul.interop import hf
from overhaul.layers import swap
from overhaul.layers.channel_mapped import ChannelMapped, Reading
from overhaul.sockets.reprogramming import is_norm

Behind = Literal["all", "none"]
"""All linear layers but the output embedding; none, so that the norms alone are a task's own."""


class Channels(Sockets):
    """A factor, or a kernel over time, for each output of frozen linear layers, and norms of a task's own.

    With kernels over time a text is always read whole: `generate` keeps no keys and values, which would lack what the
    kernels look back at.

    Args:
        behind: which linear layers.
        kernel: tokens that a kernel spans; 1 scales each channel.
        norms: whether the norms are a task's own.
    """

    method = "clr"

    def __init__(self, *, behind: Behind = "all", kernel: int = 1, norms: bool = True) -> None:
        self.behind: Behind = behind
        self.kernel, self.norms = kernel, norms
        self._reading, self._hook = Reading(), None

    def settings(self) -> dict[str, Any]:
        return {"behind": self.behind, "kernel": self.kernel, "norms": self.norms}

    def fit(self, model: nn.Module) -> None:
        if self.behind == "none":
            return
        names = linears(model)
        swap(model, names, lambda old: ChannelMapped(old, self._reading, kernel=self.kernel))
        if self.kernel > 1:
            self._hook: RemovableHandle | None = hf.body(model).register_forward_pre_hook(self._look, with_kwargs=True)
            inner: Any = model
            inner.generate = partial(inner.generate, use_cache=False)

    def _look(self, _module: nn.Module, _args: tuple[Any, ...], given: dict[str, Any]) -> None:
        """Before the model reads a batch: where it was filled up."""
        cache = given.get("past_key_values")
        if cache is not None and cache.get_seq_length() > 0:
            raise UserError(
                f"kernels over {self.kernel} tokens look back at more than cached keys and values",
                hint="use_cache=False: the text as a whole",
            )
        mask = given.get("attention_mask")
        self._reading.mask_BT = mask if isinstance(mask, Tensor) and mask.ndim == 2 else None

    def remove(self, model: nn.Module) -> None:
        swap(model, [name for name, _ in _mapped(model)], lambda layer: layer.linear)
        if self._hook is not None:
            self._hook.remove()
            self._hook = None
            del model.generate

    def names(self, model: nn.Module) -> tuple[str, ...]:
        found = [f"{name}.{own}" for name, layer in _mapped(model) for own in layer.begin()]
        if self.norms:
            norms = ((name, module) for name, module in model.named_modules() if is_norm(module))
            found += [f"{name}.{own}" for name, module in norms for own in module.state_dict()]
        return tuple(found)

    def begin(self, model: nn.Module) -> dict[str, Tensor]:
        return {f"{name}.{own}": tensor for name, layer in _mapped(model) for own, tensor in layer.begin().items()}

    def merge(self, model: nn.Module) -> None:
        if self.kernel > 1 and self.behind != "none":
            raise UserError(
                f"banks with kernels over {self.kernel} tokens cannot be put into the weights: what a channel was at "
                "earlier tokens is in no linear layer",
                allowed="banks of --kernel 1",
                hint="the model with its banks, as generate reads it",
            )
        swap(model, [name for name, _ in _mapped(model)], lambda layer: layer.merge())


def linears(model: nn.Module) -> list[str]:
    """All linear layers of a language model by name, but for the output embedding.

    Raises:
        UserError: there are none, or one is packed, masked or adapted.
    """
    inner: Any = model
    head, found = inner.get_output_embeddings(), []
    for name, module in model.named_modules():
        if module is head or not hasattr(module, "in_features"):
            continue
        if type(module) is not nn.Linear:
            raise UserError(
                f"{name} is a {type(module).__name__}, whose weight has another form",
                allowed="plain linear layers",
                hint="the model before it was pruned, quantized or adapted",
            )
        found.append(name)
    if not found:
        raise UserError(
            f"{type(model).__name__} has no linear layers but its head, behind which this method goes",
            allowed="models whose blocks are made of torch's linear layers",
        )
    return found


def _mapped(model: nn.Module) -> list[tuple[str, ChannelMapped]]:
    return [(name, module) for name, module in model.named_modules() if isinstance(module, ChannelMapped)]
