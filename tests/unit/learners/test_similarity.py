"""How near a model is to a task: by hand, and blind to how features are called."""

from __future__ import annotations

import torch

from overhaul.learners.similarity import separability


def test_classes_that_lie_apart_are_told_and_others_are_not():
    labels = torch.arange(400) % 4
    noise = torch.randn(400, 8, generator=torch.Generator().manual_seed(0))
    apart = noise + 20 * torch.nn.functional.one_hot(labels, 8)

    assert separability(apart, labels) == 1.0
    assert 0.15 < separability(noise, labels) < 0.35
    assert separability(apart, labels + 7) == 1.0, "whatever the classes are called"


def test_by_hand():
    features = torch.tensor([[0.0], [2.0], [10.0], [4.0], [8.0], [20.0]])
    labels = torch.tensor([1, 1, 5, 1, 1, 5])

    assert separability(features, labels) == 2 / 3, (
        "means 1 and 10; of 4, 8 and 20 the second is nearer to the wrong one"
    )
