"""Losses that unlearn: their gradients against gradient ascent and against the formulas, written down directly."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, kl_div, logsigmoid

from overhaul import artifact
from overhaul.distillation import Distill
from overhaul.interop import hf
from overhaul.objective import CrossEntropy, Forward, Objective, weighted_mean
from overhaul.stream import IGNORED, named, part
from overhaul.unlearning.terms import (
    REFERENCE,
    RETAINED,
    Beside,
    Misdirected,
    NegativePreference,
    SimpleNegativePreference,
    StatesKept,
    direction,
    log_probabilities,
)


@pytest.fixture
def model(tiny: Path) -> Any:
    return artifact.load(tiny, dtype=torch.float64).model.requires_grad_(True)


@pytest.fixture
def batch() -> dict[str, Tensor]:
    """Two texts of 12 tokens, of which the first four of one are not trained on, and two to retain."""
    dice = torch.Generator().manual_seed(0)
    ids_BT, others_BT = (torch.randint(5, 400, (2, 12), generator=dice) for _ in range(2))
    labels_BT = ids_BT.clone()
    labels_BT[1, :4] = IGNORED
    beside = {"input_ids": others_BT, "labels": others_BT.clone()}
    return {"input_ids": ids_BT, "labels": labels_BT, **named(RETAINED, beside)}


def by_hand(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """`(B,)`: log-probabilities from all logits."""
    log_BTV = model(input_ids=batch["input_ids"]).logits[:, :-1].log_softmax(dim=-1)
    labels_BT = batch["labels"][:, 1:]
    kept_BT = labels_BT != IGNORED
    picked_BT = log_BTV.gather(-1, labels_BT.clamp_min(0)[..., None])[..., 0]
    return (picked_BT * kept_BT).sum(dim=1)


def gradient(model: Any, loss: Tensor) -> Tensor:
    parameters = [p for p in model.parameters() if p.requires_grad]
    found = torch.autograd.grad(loss, parameters, allow_unused=True)
    return torch.cat([
        (torch.zeros_like(p) if g is None else g).flatten() for p, g in zip(parameters, found, strict=True)
    ])  # fmt: skip


def loss_of(objective: Objective, model: Any, batch: dict[str, Tensor]) -> Tensor:
    return weighted_mean(objective(Forward(model, batch), batch), objective.counts(batch))


def moved(model: Any, size: float = 0.02) -> Any:
    """A copy whose weights are a little elsewhere."""
    torch.manual_seed(1)
    other = copy.deepcopy(model)
    for parameter in other.parameters():
        parameter.data += size * torch.randn_like(parameter)
    return other


def test_log_probabilities_are_those_of_the_labels(model: Any, batch: dict[str, Tensor]):
    assert torch.allclose(log_probabilities(Forward(model, batch), batch), by_hand(model, batch), atol=1e-8)


@pytest.mark.parametrize("beta", [0.01, 0.1, 1.0, 5.0])
def test_where_the_model_is_as_it_was_npo_is_gradient_ascent_for_every_beta(
    model: Any, batch: dict[str, Tensor], beta: float
):
    told = {**batch, REFERENCE: by_hand(model, batch).detach()}
    ascent = by_hand(model, batch).sum()

    found = gradient(model, NegativePreference(beta).total(Forward(model, told), told))
    assert torch.allclose(found, gradient(model, ascent), atol=1e-8)


def test_npo_weighs_ascent_by_how_likely_a_text_still_is(model: Any, batch: dict[str, Tensor]):
    told, beta = {**batch, REFERENCE: by_hand(moved(model), batch).detach()}, 0.3
    log_B = by_hand(model, told)
    weights_B = 2 / (1 + torch.exp(beta * (told[REFERENCE] - log_B))).detach()
    # 2 p^beta / (p^beta + p_ref^beta), with p_ref^beta / p^beta pulled out.
    wanted = gradient(model, (weights_B * log_B).sum())

    assert not torch.allclose(weights_B, torch.ones(2).double(), atol=0.05)
    found = gradient(model, NegativePreference(beta).total(Forward(model, told), told))
    assert torch.allclose(found, wanted, atol=1e-8)


def test_towards_beta_of_nothing_npo_is_gradient_ascent(model: Any, batch: dict[str, Tensor]):
    told = {**batch, REFERENCE: by_hand(moved(model), batch).detach()}

    found = gradient(model, NegativePreference(1e-7).total(Forward(model, told), told))
    assert torch.allclose(found, gradient(model, by_hand(model, told).sum()), rtol=1e-5, atol=1e-6)


def test_npo_lets_go_of_a_text_that_has_become_unlikely(model: Any, batch: dict[str, Tensor]):
    far = {**batch, REFERENCE: by_hand(model, batch).detach() + 500}

    ascent = gradient(model, by_hand(model, far).sum()).norm()
    assert gradient(model, NegativePreference(0.1).total(Forward(model, far), far)).norm() < 1e-12 * ascent


def test_simnpo_is_its_formula_and_does_not_look_back(model: Any, batch: dict[str, Tensor]):
    beta, gamma = 0.7, 3.0
    lengths_B = (batch["labels"][:, 1:] != IGNORED).sum(dim=1)
    losses_B = -by_hand(model, batch) / lengths_B
    wanted = -2 / beta * logsigmoid(beta * (losses_B - gamma)).mean()

    term = SimpleNegativePreference(beta, gamma)
    assert torch.allclose(loss_of(term, model, batch), wanted.float(), atol=1e-5)


def test_gradient_ascent_is_cross_entropy_with_the_sign_turned(model: Any, batch: dict[str, Tensor]):
    ascent = loss_of(-1.0 * CrossEntropy(), model, batch)
    count = int((batch["labels"][:, 1:] != IGNORED).sum())

    assert torch.allclose(ascent, (by_hand(model, batch).sum() / count).float(), atol=1e-5)


def test_what_is_retained_is_read_beside_and_counted_apart(model: Any, batch: dict[str, Tensor]):
    kept = part(batch, RETAINED)
    both = -1.0 * CrossEntropy() + 0.5 * Beside(CrossEntropy())

    wanted = -loss_of(CrossEntropy(), model, batch) + 0.5 * loss_of(CrossEntropy(), model, kept)
    assert torch.allclose(loss_of(both, model, batch), wanted, atol=1e-6)
    assert both.counts(batch) == {"cross_entropy": 19, "retain_cross_entropy": 22}


def test_klr_is_the_divergence_from_the_model_before_on_the_texts_to_retain(model: Any, batch: dict[str, Tensor]):
    before = moved(model).requires_grad_(False)
    others_BT = batch[f"{RETAINED}/input_ids"]
    new, old = (one(input_ids=others_BT).logits[:, :-1].log_softmax(dim=-1) for one in (model, before))
    wanted = kl_div(new, old, log_target=True, reduction="sum") / 22

    assert torch.allclose(loss_of(Beside(Distill(before)), model, batch).double(), wanted, atol=1e-5)
    assert float(loss_of(Beside(Distill(copy.deepcopy(model))), model, batch).detach()) == pytest.approx(0, abs=1e-6)


def test_rmu_sends_states_of_one_block_away_and_holds_those_of_others(model: Any, batch: dict[str, Tensor]):
    before, layer = moved(model).requires_grad_(False), 1
    torch.manual_seed(0)
    target_D = 6.5 * direction(model).double()
    assert float(direction(model).norm()) == pytest.approx(1, abs=1e-6)

    def states(one: Any, ids_BT: Tensor) -> Tensor:
        return one(input_ids=ids_BT, output_hidden_states=True).hidden_states[layer]

    away = (states(model, batch["input_ids"]) - target_D).square().mean()
    others_BT = batch[f"{RETAINED}/input_ids"]
    held = (states(model, others_BT) - states(before, others_BT)).square().mean()
    objective = Misdirected(layer, target_D) + 1200 * Beside(StatesKept(layer, before))
    assert torch.allclose(loss_of(objective, model, batch).double(), away + 1200 * held, rtol=1e-5)


def test_adaptive_rmu_is_rmu_where_all_states_are_as_long(model: Any, batch: dict[str, Tensor]):
    before, layer = moved(model).requires_grad_(False), 1
    torch.manual_seed(0)
    target_D = direction(model).double()
    states_BTD, old_BTD = (
        one(input_ids=batch["input_ids"], output_hidden_states=True).hidden_states[layer] for one in (model, before)
    )
    wanted = (states_BTD - 5 * target_D * old_BTD.norm(dim=-1, keepdim=True)).square().mean()
    found = loss_of(Misdirected(layer, 5 * target_D, before), model, batch)
    assert torch.allclose(found.double(), wanted, rtol=1e-5)

    words_VD = before.get_input_embeddings().weight
    words_VD.copy_(3 * torch.nn.functional.normalize(words_VD, dim=-1))
    same = loss_of(Misdirected(0, 5 * target_D, before), model, batch)
    assert torch.allclose(same, loss_of(Misdirected(0, 15 * target_D), model, batch), rtol=1e-5)


def test_a_head_that_is_more_than_a_linear_map_gives_the_same(make_tiny: Any, batch: dict[str, Tensor]):
    model: Any = artifact.load(make_tiny(), dtype=torch.float64).model
    model.config.final_logit_softcapping = None
    found = log_probabilities(Forward(model, batch), batch)
    model.config.logit_scale = 2.0  # hf reads it; the model itself does not
    assert hf.head(model) is None
    assert torch.allclose(log_probabilities(Forward(model, batch), batch), found, atol=1e-8)
    assert cosine_similarity(found, by_hand(model, batch), dim=0) > 1 - 1e-12
