"""Models whose linear layers are a product of thin matrices plus a sparse one: made from a configuration, by converting
a dense model, and as they lie on disk.

On disk a layer is `NAME.factor_A`, `NAME.factor_B`, `NAME.values`, `NAME.support`, and perhaps `NAME.bias`;
`config.json` says `format: sltrain` and alpha under `quantization_config`, by which transformers knows to refuse it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from torch import nn

from overhaul.errors import UserError
from overhaul.layers import Packed, swap
from overhaul.layers.masked import MaskedLinear
from overhaul.layers.sparse_low_rank import SLTrainLinear, Support, generator_of
from overhaul.progress import Bar, say
from overhaul.select import block_linears

FORMAT, VERSION = "sltrain", 1


class Form(NamedTuple):
    """Rank and alpha of a product, and the share of positions that have a value of their own."""

    rank: int
    alpha: float
    density: float


def from_config(
    config: Any,
    *,
    rank: int,
    density: float,
    alpha: float,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> nn.Module:
    """A model with fresh weights, fp32, whose blocks never held a dense matrix.

    Args:
        config: a transformers configuration.
        rank: of the products.
        density: share of a weight's positions that have a value of their own.
        alpha: the products are scaled by alpha / rank.
        seed: of supports and factors; embeddings, norms and head are drawn by torch's own generator.
        device: where it will be; `meta` makes shapes only.

    Raises:
        UserError: a layer would not become smaller.
    """
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    linears = block_linears(model)
    check_sizes(linears, rank, density)
    for name, linear in linears.items():
        made = SLTrainLinear.from_scratch(
            linear.in_features, linear.out_features, rank=rank, density=density, alpha=alpha,
            bias=linear.bias is not None, generator=generator_of(seed, name), device=device,
        )  # fmt: skip
        swap(model, [name], lambda _, made=made: made)
    if torch.device(device).type != "meta":
        for module in model.modules():
            own = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
            if any(tensor.is_meta for tensor in own):
                module.to_empty(device=device, recurse=False)
                model._init_weights(module)
        model.tie_weights()
    model.config.quantization_config = written_settings(alpha)
    return model


def convert(
    model: nn.Module, *, rank: int, density: float, alpha: float, support: Support = "random", seed: int = 0
) -> dict[str, SLTrainLinear]:
    """Replaces every linear layer of the blocks by its best approximation of that form, in place.

    Returns:
        The new layers by name. How much of the weights is lost is said.

    Raises:
        UserError: as `check_dense`, and a layer would not become smaller.
    """
    check_dense(model)
    linears, layers, errors = block_linears(model), {}, {}
    check_sizes(linears, rank, 0.0 if support == "none" else density)
    with torch.no_grad(), Bar("converting", len(linears)) as bar:
        for name, linear in linears.items():
            made = SLTrainLinear.from_linear(
                linear, rank=rank, density=density, alpha=alpha, support=support, generator=generator_of(seed, name)
            )
            weight_OI = linear.weight.float()
            errors[name] = float((made.dense() - weight_OI).norm() / weight_OI.norm().clamp_min(1e-30))
            layers |= swap(model, [name], lambda _, made=made: made)
            bar.step()
    worst = max(errors, key=lambda name: errors[name])
    mean = sum(errors.values()) / len(errors)
    say(f"{len(layers)} layers converted: the weights are off by {mean:.0%} of their norm, {worst} by "
        f"{errors[worst]:.0%}; training wins back what that costs")  # fmt: skip
    inner: Any = model
    inner.config.quantization_config = written_settings(alpha)
    return layers


def factored_layers(model: nn.Module) -> dict[str, SLTrainLinear]:
    """The layers of that form by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, SLTrainLinear)}


def form_of(layer: SLTrainLinear) -> Form:
    """What a layer is made of."""
    return Form(layer.rank, layer.alpha, len(layer.values) / (layer.out_features * layer.in_features))


def form_on_disk(path: Path) -> Form | None:
    """What the first layer is made of that a directory keeps as factors; None where it keeps none."""
    config = path / "config.json"
    settings = json.loads(config.read_text()).get("quantization_config") if config.is_file() else None
    if not settings or settings.get("format") != FORMAT:
        return None
    refuse(settings)
    for file in sorted(path.glob("*.safetensors")):
        with safe_open(file, framework="pt") as opened:
            for name in _names(dict.fromkeys(opened.keys())):
                (rank, num_in), (num_out, _), (count,) = (
                    opened.get_slice(f"{name}.{part}").get_shape() for part in ("factor_A", "factor_B", "values")
                )
                return Form(rank, float(settings["alpha"]), count / (num_out * num_in))
    return None


def check_dense(model: nn.Module) -> None:
    """Raises `UserError` for what cannot be converted: packed or pruned weights, or none at all."""
    linears = block_linears(model)
    if any(isinstance(module, Packed) for module in model.modules()):
        raise UserError(
            "the model holds packed weights, which cannot be converted", hint="the dense model it was made from"
        )
    pruned = [name for name, layer in linears.items() if isinstance(layer, MaskedLinear) and layer.num_pruned]
    if pruned:
        raise UserError(
            f"{pruned[0]} is pruned: factors would fill its zeros",
            allowed="a dense model; adapt perp trains a pruned one and keeps the zeros",
            hint="the model it was pruned from",
        )
    if not linears:
        raise UserError("the blocks of the model hold no linear layer to convert")


def check_sizes(linears: Mapping[str, nn.Linear], rank: int, density: float) -> None:
    """Raises `UserError` naming the first layer that would not become smaller, and the ranks that would do for all."""
    for name, linear in linears.items():
        num_out, num_in = linear.out_features, linear.in_features
        num_weights = num_out * num_in
        if density and not int(density * num_weights):
            raise UserError(
                f"--density {density:g} leaves no value in {name}, {num_out} x {num_in}",
                allowed=f"from {1 / min(x.out_features * x.in_features for x in linears.values()):.2g}",
            )
        if (num_out + num_in) * rank + int(density * num_weights) >= num_weights:
            raise UserError(
                f"--rank {rank} saves nothing in {name}, {num_out} x {num_in}",
                allowed=f"up to {largest_rank(linears.values(), density)} for this model at density {density:g}",
                hint=f"--rank {max(largest_rank(linears.values(), density) // 2, 1)}",
            )


def largest_rank(linears: Any, density: float) -> int:
    """The largest rank with which every layer becomes smaller: R (O + I) < O I - K."""
    sizes = [(linear.out_features, linear.in_features) for linear in linears]
    return min((o * i - int(density * o * i) - 1) // (o + i) for o, i in sizes)


# The format on disk, as `packed` asks for it.


def refuse(settings: Mapping[str, Any]) -> None:
    """Raises `UserError` for a newer version, or settings that are none."""
    if settings.get("version") != VERSION:
        raise UserError(
            f"version {settings.get('version')!r} of the format {FORMAT} is not known here",
            allowed=f"version {VERSION}",
            hint="a newer overhaul",
        )
    alpha = settings.get("alpha")
    if not isinstance(alpha, int | float) or not alpha > 0:
        raise UserError(f"quantization_config in config.json: alpha is {alpha!r}", hint="a sound copy of the model")


def layers(model: nn.Module, settings: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Replaces the linear layers whose factors are in the files by empty ones, in place.

    Raises:
        UserError: such a layer is none of the model's linear layers, or its factors do not belong together.
    """
    found = dict(model.named_modules())
    for name in _names(shapes):
        linear = found.get(name)
        if type(linear) is not nn.Linear:
            raise UserError(f"{name}.factor_A is stored, but {name} is no linear layer of {type(model).__name__}")
        rank, (count,) = shapes[f"{name}.factor_A"][0], shapes.get(f"{name}.values", (0,))
        made = SLTrainLinear.empty(
            linear.in_features, linear.out_features, rank, count, float(settings["alpha"]),
            bias=linear.bias is not None, dtype=linear.weight.dtype,
        )  # fmt: skip
        swap(model, [name], lambda _, made=made: made)


def _names(shapes: Mapping[str, Any]) -> Sequence[str]:
    """The layers whose factors are stored."""
    return [tensor.removesuffix(".factor_A") for tensor in shapes if tensor.endswith(".factor_A")]


def settings(model: nn.Module) -> dict[str, Any]:
    """What `quantization_config` says of a model with such layers."""
    inner: Any = model
    return dict(inner.config.quantization_config)


def written_settings(alpha: float) -> dict[str, Any]:
    """What `quantization_config` will say of a model that was just made."""
    return {"format": FORMAT, "version": VERSION, "alpha": alpha}
