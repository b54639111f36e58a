"""Doubt: entropies against torch's, heads of other widths, texts."""

from __future__ import annotations

import math

import pytest
import torch
from torch.distributions import Categorical
from torch.nn.functional import cross_entropy

from overhaul.identify import Telling, doubt_of_text, entropies, kept, over_views


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


# Texts.


def test_a_text_is_doubted_as_much_as_its_next_tokens_are_on_average():
    logits_TV, ids_T = torch.randn(6, 9), torch.randint(9, (6,))

    by_entropy = doubt_of_text(logits_TV, (), ids_T, Telling())
    by_loss = doubt_of_text(logits_TV, (), ids_T, Telling(by="loss", temperature=2.0))
    assert by_entropy == pytest.approx(float(Categorical(logits=logits_TV).entropy().mean()) / math.log(9), abs=1e-6)
    assert by_loss == pytest.approx(float(cross_entropy(logits_TV[:-1] / 2, ids_T[1:])), abs=1e-6)
    assert doubt_of_text(logits_TV[:1], (), ids_T[:1], Telling(by="loss")) == pytest.approx(
        float(entropies(logits_TV[:1])), abs=1e-6
    )


def test_a_view_counts_where_it_has_tokens():
    plain_TV, view_KV, ids_T = torch.randn(5, 7), torch.randn(3, 7), torch.randint(7, (5,))
    places_K = torch.tensor([0, 2, 3])
    mean_TV = plain_TV.clone()
    mean_TV[places_K] = (2 * plain_TV[places_K] + view_KV) / 3

    found = doubt_of_text(plain_TV, [(places_K, view_KV)], ids_T, Telling(plain_views=2))
    assert found == pytest.approx(doubt_of_text(mean_TV, (), ids_T, Telling()), abs=1e-6)


def test_views_are_without_other_tokens_each_and_never_without_the_first():
    views = [kept(400, 0.25, view) for view in range(20)]

    assert all(int(view[0]) == 0 for view in views)
    assert 0.7 < sum(map(len, views)) / (20 * 400) < 0.8
    assert not torch.equal(views[0], views[1])
    assert torch.equal(kept(400, 0.25, 3), views[3])
    assert torch.equal(kept(9, 0.0, 1), torch.arange(9))
    assert kept(1, 0.99, 0).tolist() == [0]
