"""Doubt: entropies against torch's, and heads of other widths."""

from __future__ import annotations

import math

import torch
from torch.distributions import Categorical

from overhaul.identify import entropies, over_views


def test_entropies_are_those_of_torch_as_a_share_of_the_largest():
    logits = torch.randn(7, 5)

    assert torch.allclose(entropies(logits), Categorical(logits=logits).entropy() / math.log(5), atol=1e-6)
    assert torch.allclose(entropies(logits, 3.0), Categorical(logits=logits / 3).entropy() / math.log(5), atol=1e-6)


def test_a_uniform_prediction_is_a_whole_doubt_of_however_many_classes():
    assert torch.allclose(entropies(torch.zeros(2, 3)), torch.ones(2))
    assert torch.allclose(entropies(torch.zeros(2, 30)), torch.ones(2))
    assert torch.equal(entropies(torch.zeros(2, 1)), torch.ones(2))
    assert float(entropies(torch.tensor([[100.0, 0.0]]))) < 1e-6


def test_views_that_are_no_different_say_what_one_says():
    plain = torch.randn(7, 5)

    assert torch.equal(over_views(plain, ()), plain)
    assert torch.equal(over_views(plain, [plain] * 10, 6), plain)


def test_logits_are_averaged_not_probabilities():
    plain, others = torch.randn(7, 5), [torch.randn(7, 5) for _ in range(3)]
    by_hand = (2 * plain + sum(others)) / 5
    mixed = (2 * plain.softmax(1) + sum(one.softmax(1) for one in others)) / 5

    made = over_views(plain, others, 2)
    assert torch.allclose(made, by_hand, atol=1e-6)
    assert not torch.allclose(made.softmax(1), mixed, atol=1e-2)
