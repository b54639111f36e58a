"""The diagonal of a classifier's Fisher information: how much each weight matters to what it says of examples."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from overhaul.interop.classifier import INPUTS, classified

Labels = Literal["weighted", "empirical", "exact", "sampled"]
"""Over which labels: those given, each by its probability (Mammoth's); those given; all, each by its probability; one
drawn from the model's own distribution."""


def diagonal(
    model: nn.Module,
    batches: Iterable[Mapping[str, Tensor]],
    *,
    labels: Labels = "weighted",
    seed: int = 0,
    at_once: int = 32,
) -> dict[str, Tensor]:
    """The mean over examples of squared gradients of `log p(y | x)`, one example at a time.

    `exact` is the expectation over labels, the Fisher information itself; `empirical` squares the gradient at the label
    that is given, whatever the model thinks of it; `weighted` multiplies that by the label's probability.

    Args:
        model: a classifier, in evaluation mode: batch statistics of one example are none.
        batches: of `{"pixel_values": (B, C, H, W), "labels": (B,)}` or the like, on any device.
        labels: over which labels.
        seed: of `sampled`.
        at_once: examples whose gradients are held at one time.

    Returns:
        By the name of each trainable parameter a tensor of its shape, float32, not negative.

    Raises:
        ValueError: there is no example.
    """
    trained = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    device = next(model.parameters()).device
    dice = torch.Generator().manual_seed(seed)
    found = {name: torch.zeros_like(p, dtype=torch.float32) for name, p in trained.items()}
    count = 0

    def log_probabilities(parameters: dict[str, Tensor], inputs: dict[str, Tensor]) -> Tensor:
        one = {name: tensor[None] for name, tensor in inputs.items()}
        return functional_call(model, parameters, kwargs=one).logits[0].float().log_softmax(dim=-1)

    def of_label(parameters: dict[str, Tensor], inputs: dict[str, Tensor], label: Tensor) -> Tensor:
        return log_probabilities(parameters, inputs).gather(0, label[None])[0]  # vmap has no plain indexing

    gradients: Any = vmap(grad(of_label), in_dims=(None, 0, 0), randomness="different")
    for batch in batches:
        inputs = {name: batch[name].to(device) for name in INPUTS if name in batch}
        if "input_ids" in inputs:
            # vmap does not go through the masks of attention.
            gradients, at_once = partial(_of_one_text, model), 1
        given_B = batch["labels"].to(device)
        for start in range(0, len(given_B), at_once):
            part = {name: tensor[start : start + at_once] for name, tensor in inputs.items()}
            given = given_B[start : start + at_once]
            with torch.no_grad():
                probabilities_BC = classified(model, part).logits.float().softmax(dim=-1)
            for label_B, weight_B in _weighted(labels, given, probabilities_BC, dice):
                # The fused kernels of attention know no gradients of single examples.
                with sdpa_kernel(SDPBackend.MATH):
                    found_B = gradients(trained, part, label_B)
                for name, gradient in found_B.items():
                    weighed = weight_B.view(-1, *[1] * (gradient.ndim - 1)) * gradient.float().square()
                    found[name] += weighed.sum(dim=0)
            count += len(given)
    if not count:
        raise ValueError("no example to take the Fisher information from")
    return {name: total / count for name, total in found.items()}


def _of_one_text(
    model: nn.Module, trained: Mapping[str, Tensor], text: Mapping[str, Tensor], label_B: Tensor
) -> dict[str, Tensor]:
    """Gradients of `log p(label | text)`, each with a leading axis of 1."""
    log_C = classified(model, text).logits[0].float().log_softmax(dim=-1)
    own = dict(model.named_parameters())
    found = torch.autograd.grad(log_C[label_B[0]], [own[name] for name in trained], materialize_grads=True)
    return {name: gradient[None] for name, gradient in zip(trained, found, strict=True)}


def _weighted(
    labels: Labels, given_B: Tensor, probabilities_BC: Tensor, dice: torch.Generator
) -> Iterable[tuple[Tensor, Tensor]]:
    """Labels of each example with the weight of their squared gradient."""
    ones_B = torch.ones(len(given_B), device=given_B.device)
    match labels:
        case "empirical":
            yield given_B, ones_B
        case "weighted":
            yield given_B, probabilities_BC.gather(1, given_B[:, None])[:, 0]
        case "sampled":
            yield torch.multinomial(probabilities_BC.cpu(), 1, generator=dice)[:, 0].to(given_B.device), ones_B
        case "exact":
            for place in range(probabilities_BC.shape[1]):
                yield torch.full_like(given_B, place), probabilities_BC[:, place]


def joined(old: Mapping[str, Tensor] | None, new: Mapping[str, Tensor], *, keep: float) -> dict[str, Tensor]:
    """`keep * old + new` (online EWC, Schwarz et al., 2018); a parameter that has grown counts as 0 where it is new."""
    if old is None:
        return dict(new)
    return {
        name: keep * grown(old[name], tensor.shape) + tensor if name in old else tensor for name, tensor in new.items()
    }


def grown(information: Tensor, shape: torch.Size) -> Tensor:
    """That of a parameter which has become larger: 0 where it is new."""
    wide = information.new_zeros(shape)
    wide[tuple(slice(size) for size in information.shape)] = information
    return wide
