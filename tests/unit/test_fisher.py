"""The diagonal of the Fisher information, against loops and closed forms."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import ResNetConfig, ResNetForImageClassification

from overhaul.fisher import Labels, diagonal, joined


class Logistic(nn.Module):
    """`logits = W x + b`."""

    def __init__(self, width: int, classes: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, classes)

    def forward(self, pixel_values: Tensor) -> Any:
        return SimpleNamespace(logits=self.linear(pixel_values))


def examples(count: int = 10, width: int = 4, classes: int = 3) -> list[dict[str, Tensor]]:
    torch.manual_seed(1)
    x, y = torch.randn(count, width), torch.arange(count) % classes
    return [{"pixel_values": x[at : at + 4], "labels": y[at : at + 4]} for at in range(0, count, 4)]


def by_loop(model: nn.Module, batches: list[dict[str, Tensor]], labels: Labels) -> dict[str, Tensor]:
    """One backward pass for each example and label."""
    found = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    count = 0
    for batch in batches:
        for x, y in zip(batch["pixel_values"], batch["labels"], strict=True):
            count += 1
            p_C = model(x[None]).logits[0].softmax(-1).detach()
            chosen = {"empirical": {int(y): 1.0}, "weighted": {int(y): float(p_C[y])}}.get(
                labels, {c: float(p) for c, p in enumerate(p_C)}
            )
            for label, weight in chosen.items():
                model.zero_grad()
                model(x[None]).logits[0].log_softmax(-1)[label].backward()
                for name, p in model.named_parameters():
                    assert p.grad is not None
                    found[name] += weight * p.grad.square()
    return {name: total / count for name, total in found.items()}


@pytest.mark.parametrize("labels", ["weighted", "empirical", "exact"])
@pytest.mark.parametrize("at_once", [3, 32])
def test_it_is_the_mean_of_squared_gradients_one_by_one(labels: Labels, at_once: int):
    torch.manual_seed(0)
    model, batches = Logistic(4, 3).eval(), examples()

    found = diagonal(model, batches, labels=labels, at_once=at_once)

    torch.testing.assert_close(found, by_loop(model, batches, labels))


def test_of_a_convolutional_network_too():
    torch.manual_seed(0)
    config = ResNetConfig(
        num_channels=1, embedding_size=4, hidden_sizes=[4, 8], depths=[1, 1], layer_type="basic", num_labels=3
    )
    model = ResNetForImageClassification(config).eval()
    batches = [{"pixel_values": torch.randn(5, 1, 8, 8), "labels": torch.arange(5) % 3}]

    found = diagonal(model, batches, labels="exact")

    torch.testing.assert_close(found, by_loop(model, batches, "exact"), rtol=1e-3, atol=1e-7)


def test_exact_is_that_of_logistic_regression():
    """`F = E[p (1 - p) x^2]` of each weight's class."""
    torch.manual_seed(0)
    model, batches = Logistic(4, 3).eval(), examples()
    x = torch.cat([batch["pixel_values"] for batch in batches])
    p_NC = model(x).logits.softmax(-1).detach()

    found = diagonal(model, batches, labels="exact")

    torch.testing.assert_close(found["linear.weight"], (p_NC * (1 - p_NC)).T @ x.square() / len(x))


def test_labels_drawn_from_the_model_come_to_the_exact_one():
    torch.manual_seed(0)
    model, batches = Logistic(4, 3).eval(), examples(400)

    drawn = [diagonal(model, batches, labels="sampled", seed=seed)["linear.weight"] for seed in range(20)]

    exact = diagonal(model, batches, labels="exact")["linear.weight"]
    assert float((torch.stack(drawn).mean(0) - exact).norm() / exact.norm()) < 0.05
    assert torch.equal(drawn[0], diagonal(model, batches, labels="sampled", seed=0)["linear.weight"])


def test_frozen_parameters_have_none_and_without_examples_there_is_nothing():
    model = Logistic(4, 3).eval()
    model.linear.bias.requires_grad_(False)

    assert set(diagonal(model, examples())) == {"linear.weight"}
    with pytest.raises(ValueError, match="no example"):
        diagonal(model, [])


def test_online_it_decays_and_a_head_that_has_grown_has_none_of_its_new_rows():
    old, new = {"w": torch.full((2, 3), 4.0)}, {"w": torch.ones(3, 3), "b": torch.ones(2)}

    found = joined(old, new, keep=0.5)

    assert found["w"].tolist() == [[3, 3, 3], [3, 3, 3], [1, 1, 1]]
    assert torch.equal(found["b"], new["b"])
    assert joined(None, new, keep=0.5) == new
