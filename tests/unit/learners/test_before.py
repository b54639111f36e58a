"""What is kept of a model for later tasks: copies, which stay as they were, and what they weigh."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from overhaul.learners.before import Before
from overhaul.objective import Forward


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2, bias=False))


def test_nothing_is_held_to_what_is_not_kept():
    assert Before().pull(by_information=False) is None
    assert Before().kept_bytes() == {}


def test_copies_stay_as_they_were(model: nn.Module):
    before, was = Before(), model.state_dict()["0.weight"].clone()
    before.keep_model(model)
    before.keep_weights(model, {"0.weight"})
    with torch.no_grad():
        model.get_parameter("0.weight").add_(1)

    assert before.model is not None
    assert torch.equal(before.model.get_parameter("0.weight"), was)
    assert not any(p.requires_grad for p in before.model.parameters())
    assert before.weights.keys() == {"0.weight"}
    assert torch.equal(before.weights["0.weight"], was)
    assert before.kept_bytes() == {"weights before": 6 * 4, "old model": (6 + 2 + 4) * 4}


def test_the_pull_is_by_information_where_that_is_asked_for(model: nn.Module):
    before = Before()
    before.keep_weights(model, {"0.weight"})
    before.add_information({"0.weight": torch.full((2, 3), 3.0)}, keep=1.0)
    before.add_information({"0.weight": torch.full((2, 3), 2.0)}, keep=0.5)
    with torch.no_grad():
        model.get_parameter("0.weight").add_(1)

    def value(*, by_information: bool) -> float:
        pull = before.pull(by_information=by_information)
        assert pull is not None
        return float(pull.total(Forward(model, {}), {}).detach())

    assert value(by_information=False) == pytest.approx(6 / 2)
    assert value(by_information=True) == pytest.approx((0.5 * 3 + 2) * 6 / 2)
