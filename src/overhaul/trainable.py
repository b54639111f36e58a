"""Which parts of a model are trained: groups of parameters and adapters, marked, and how they end."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor, nn

from overhaul.errors import UserError
from overhaul.layers import LinearLike, merge_all, swap
from overhaul.layers.lora import LoRALinear, refuse_pruned
from overhaul.layers.masked import MaskedLinear
from overhaul.layers.sparse_lora import LoRAPruneLinear, MaskLoRALinear, ScaleLoRALinear
from overhaul.progress import say


class Choice(Protocol):
    """The settings that say what is trained."""

    train: tuple[Any, ...]
    rank: int
    alpha: float
    noise: float


@dataclass(frozen=True, slots=True)
class Selected:
    """Parameters to train, and what turns the trained model into a plain one."""

    parameters: list[nn.Parameter]
    finish: Callable[[nn.Module], nn.Module]


def prepare(model: nn.Module, choice: Choice) -> Selected:
    """Freezes everything, then marks the chosen groups; adapters replace the masked linear layers in place.

    Args:
        model: a model, or one block of it.
        choice: the groups: biases, norms, head, full, and the adapters.

    Raises:
        UserError: a group that the model does not have.
    """
    model.requires_grad_(False)
    chosen: dict[int, nn.Parameter] = {}
    for group in choice.train:
        found = _GROUPS[group](model, choice)
        chosen |= {id(parameter): parameter for parameter in found}
    for parameter in chosen.values():
        parameter.requires_grad_(True)
    return Selected(list(chosen.values()), _finish(model, choice))


def norm_parameters(model: nn.Module, _choice: Choice) -> list[nn.Parameter]:
    """Weights and biases of every LayerNorm or RMSNorm."""
    norms = [module for module in model.modules() if "norm" in type(module).__name__.lower()]
    found = [parameter for module in norms for parameter in module.parameters(recurse=False)]
    if not found:
        raise UserError(f"{type(model).__name__} has no normalisation layers with weights", hint="--train mask_lora")
    return found


def biases(model: nn.Module, _choice: Choice) -> list[nn.Parameter]:
    """Every parameter called `bias`."""
    found = [parameter for name, parameter in model.named_parameters() if name.rsplit(".", 1)[-1] == "bias"]
    if not found:
        raise UserError(
            f"--train biases: {type(model).__name__} has no bias anywhere, as is usual for Llama-like models",
            allowed="norms, head, mask_lora, lora_prune, scale_lora, full",
            hint="--train norms; or a model with attention_bias / mlp_bias in its config, which stores biases",
        )
    return found


def everything(model: nn.Module, _choice: Choice) -> list[nn.Parameter]:
    """All parameters; the caller keeps the zeros."""
    return list(model.parameters())


def head_adapter(model: nn.Module, choice: Choice) -> list[nn.Parameter]:
    """LoRA on the output embedding, which is dense."""
    outer: Any = model
    layer = LoRALinear.from_linear(outer.get_output_embeddings(), choice.rank, choice.alpha)
    outer.set_output_embeddings(layer)
    return [layer.lora_A, layer.lora_B]


def has_norms(model: nn.Module) -> bool:
    """Whether there is a LayerNorm or RMSNorm in it."""
    return any("norm" in type(module).__name__.lower() for module in model.modules())


def _adapter(make: Callable[[Any, Choice], LinearLike]) -> Callable[[nn.Module, Choice], list[nn.Parameter]]:
    def adapters(model: nn.Module, choice: Choice) -> list[nn.Parameter]:
        names = [name for name, module in model.named_modules() if isinstance(module, MaskedLinear)]
        if not names:
            raise UserError(
                "the model has no masks: it is dense, or was pruned by another tool",
                hint="adapt perp --train norms, which needs none; prune first; or adapt lora",
            )
        layers: Any = swap(model, names, lambda old: make(old, choice))
        return [tensor for layer in layers.values() for tensor in (layer.lora_A, layer.lora_B)]

    return adapters


def _refused(model: nn.Module, _choice: Choice) -> list[nn.Parameter]:
    refuse_pruned(model, [name for name, module in model.named_modules() if isinstance(module, nn.Linear)])
    raise UserError("--train lora is for a dense model in `adapt lora`", hint="overhaul adapt lora MODEL")


_GROUPS: dict[str, Callable[[nn.Module, Choice], list[nn.Parameter]]] = {
    "biases": biases,
    "norms": norm_parameters,
    "head": head_adapter,
    "full": everything,
    "lora": _refused,
    "lora_prune": _adapter(lambda old, choice: LoRAPruneLinear.from_linear(old, choice.rank, choice.alpha)),
    "mask_lora": _adapter(lambda old, choice: MaskLoRALinear.from_linear(old, choice.rank, choice.alpha)),
    "scale_lora": _adapter(lambda old, choice: ScaleLoRALinear.from_linear(old, choice.rank, noise=choice.noise)),
}


def _finish(model: nn.Module, choice: Choice) -> Callable[[nn.Module], nn.Module]:
    """Merges the adapters; a head that was tied to the input embedding becomes a matrix of its own."""

    def finish(trained: nn.Module) -> nn.Module:
        for name, layer in trained.named_modules():
            if isinstance(layer, LoRAPruneLinear):
                say(
                    f"lora_prune: the mask now removes {_masked_share(layer):.0%} of the increment of {name} and its "
                    "like; the loss jumps at this merge, mask_lora's does not"
                )
                break
        merge_all(trained)
        if "head" in choice.train:
            outer: Any = trained
            outer.config.tie_word_embeddings = False
        return trained

    return finish


def _masked_share(layer: LoRAPruneLinear) -> float:
    """Share of the increment's norm that the mask removes."""
    increment_OI: Tensor = layer.dense() - layer.weight.float()
    removed_OI = increment_OI.masked_fill(layer.mask, 0.0)
    return float(removed_OI.norm() / increment_OI.norm().clamp_min(1e-30))
