"""Where the banks of ConTraCon go: over the weights of attention, into normalisations (Roy et al., ICCV 2023)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

from torch import Tensor, nn

from overhaul.banks import Sockets
from overhaul.errors import UserError
from overhaul.interop.attention import FUSED, SEPARATE
from overhaul.interop.classifier import head_of
from overhaul.kinds import is_classifier
from overhaul.layers import swap
from overhaul.layers.reweighted import Form, Reweighted
from overhaul.sockets.reprogramming import is_norm

Init = Literal["drawn", "parent", "unchanged"]


class Reweighting(Sockets):
    """Kernels over the frozen weights of attention, and normalisations and pooling of a task's own.

    Args:
        form: of the layers, as in `Reweighted`; `none` leaves the frozen weights as they are.
        kernel: numbers of a side, odd.
        dilation: distance of the weights under neighbouring numbers of a kernel.
        norms: whether normalisations, and the attention that pools tokens, are a task's own.
        init: what a task's kernels begin as: `drawn` at random, its `parent`'s, or those that leave the frozen weights
            `unchanged`.
    """

    method = "contracon"

    def __init__(
        self,
        *,
        form: Form | Literal["none"] = "both",
        kernel: int = 15,
        dilation: int = 1,
        norms: bool = True,
        init: Init = "drawn",
    ) -> None:
        self.form: Form | Literal["none"] = form
        self.kernel, self.dilation, self.norms, self.init = kernel, dilation, norms, init

    def settings(self) -> dict[str, Any]:
        return {"form": self.form, "kernel": self.kernel, "dilation": self.dilation, "norms": self.norms}

    def fit(self, model: nn.Module) -> None:
        if self.form == "none":
            return
        made: dict[str, Reweighted] = {}
        for name, heads in projections(model).items():
            linear: Any = model.get_submodule(name)
            how: Any = {"heads": heads, "kernel": self.kernel, "dilation": self.dilation, "form": self.form}
            try:
                made[name] = Reweighted(linear, **how)
            except ValueError as error:
                raise UserError(f"{name}: {error}", hint="another --kernel or --dilation") from error
        # Not before all are made: a model that is refused is left as it was.
        for name, layer in made.items():
            swap(model, [name], lambda _, layer=layer: layer)

    def remove(self, model: nn.Module) -> None:
        swap(model, [name for name, _ in _reweighted(model)], lambda layer: layer.linear)

    def names(self, model: nn.Module) -> tuple[str, ...]:
        found = [f"{name}.{own}" for name, layer in _reweighted(model) for own in layer.unchanged()]
        if self.norms:
            found += [f"{name}.{own}" for name, module in task_own(model) for own in module.state_dict()]
        return tuple(found)

    def begin(self, model: nn.Module) -> dict[str, Tensor]:
        if self.init == "parent":
            return {}
        found: dict[str, Tensor] = {}
        for name, layer in _reweighted(model):
            made = layer.drawn() if self.init == "drawn" else layer.unchanged()
            found |= {f"{name}.{own}": tensor for own, tensor in made.items()}
        return found

    def merge(self, model: nn.Module) -> None:
        swap(model, [name for name, _ in _reweighted(model)], lambda layer: layer.merge())


def projections(model: nn.Module) -> dict[str, int]:
    """The query, key and value layers of all attentions by name, each with the heads that its rows belong to.

    Raises:
        UserError: there are none, or they are fused, or packed or masked.
    """
    found: dict[str, int] = {}
    for name, module in model.named_modules():
        own = dict(module.named_children())
        triple = next((triple for triple in SEPARATE if own.keys() >= set(triple)), ())
        if not triple:
            continue
        for role, child in zip("qkv", triple, strict=True):
            where = f"{name}.{child}"
            if type(own[child]) is not nn.Linear:
                raise UserError(
                    f"{where} is a {type(own[child]).__name__}, whose weight has another form",
                    allowed="plain linear layers",
                    hint="the model before it was pruned, quantized or adapted",
                )
            found[where] = _heads(model, is_query=role == "q")
    if not found:
        _refuse_others(model)
    return found


def _heads(model: nn.Module, *, is_query: bool) -> int:
    inner: Any = model
    heads: int = inner.config.num_attention_heads
    return heads if is_query else getattr(inner.config, "num_key_value_heads", None) or heads


def _refuse_others(model: nn.Module) -> None:
    for name, module in model.named_modules():
        parts = (*dict(module.named_children()), *(own for own, _ in module.named_parameters(recurse=False)))
        if one := next((part for part in parts if part in FUSED), None):
            raise UserError(
                f"{name}.{one} holds query, key and value in one matrix",
                allowed="attention with three linear layers",
                hint="such a model with the matrix split",
            )
    raise UserError(
        f"{type(model).__name__} has no attention with query, key and value layers",
        allowed="transformers; for convolutional networks there is learn clr",
    )


def task_own(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Normalisations, the last one too, and linear layers of one output that are not the head: the pooling's scores."""
    head = head_of(model)[0] if is_classifier(model) else None
    for name, module in model.named_modules():
        is_pool = type(module) is nn.Linear and module.out_features == 1 and name != head
        if is_pool or is_norm(module):
            yield name, module


def _reweighted(model: nn.Module) -> list[tuple[str, Reweighted]]:
    return [(name, module) for name, module in model.named_modules() if isinstance(module, Reweighted)]
