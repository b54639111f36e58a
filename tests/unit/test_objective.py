"""The algebra: names, weights, sums and counts; one forward pass however many terms look at it."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from images import write_cnn
from overhaul import artifact
from overhaul.kinds import Kind
from overhaul.objective import (
    Balanced,
    Batch,
    ClassCrossEntropy,
    CrossEntropy,
    Forward,
    Mean,
    Objective,
    Term,
    weighted_mean,
)


class Entries(Term):
    """The sum of a batch's tensor `x`; its count is the number of entries."""

    name = "entries"

    def total(self, forward: Forward, batch: Batch) -> Tensor:
        return batch["x"].sum()

    def count(self, batch: Batch) -> int:
        return batch["x"].numel()


class Rows(Entries):
    """The same sum, counted by rows."""

    name = "rows"

    def count(self, batch: Batch) -> int:
        return len(batch["x"])


BATCH = {"x": torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])}


def value(objective: Objective, *batches: Batch) -> float:
    """The loss over micro-batches, as the loop computes it."""
    counts = [objective.counts(batch) for batch in batches]
    whole = {name: sum(count[name] for count in counts) for name in counts[0]}
    losses = [weighted_mean(objective(Forward(nn.Identity(), batch), batch), whole) for batch in batches]
    return float(sum(losses))


def test_a_term_is_an_objective_with_weight_one():
    assert Entries()(Forward(nn.Identity(), BATCH), BATCH) == {"entries": Mean(BATCH["x"].sum(), 6, 1.0)}
    assert value(Entries(), BATCH) == 3.5


def test_weights_multiply_and_sums_add_up():
    both = Entries() + 0.5 * Rows()

    assert value(both, BATCH) == 3.5 + 0.5 * 10.5
    assert value(2.0 * both, BATCH) == 2 * value(both, BATCH)
    assert value(0.0 * Entries() + Rows(), BATCH) == 10.5


def test_terms_keep_their_names_and_a_second_one_gets_a_number():
    three = Entries() + Rows() + 3.0 * Entries()

    assert list(three.named()) == ["entries", "rows", "entries#2"]
    assert [weight for weight, _ in three.named().values()] == [1.0, 1.0, 3.0]
    assert three.counts(BATCH) == {"entries": 6, "rows": 2, "entries#2": 6}


def test_uneven_micro_batches_give_the_mean_over_all_entries():
    small, large = {"x": torch.ones(1, 1)}, {"x": torch.full((3, 2), 8.0)}

    assert value(Entries(), small, large) == pytest.approx((1 + 48) / 7)
    assert value(Entries(), small, large) != pytest.approx((value(Entries(), small) + value(Entries(), large)) / 2)


def test_nothing_counted_is_a_loss_of_zero():
    assert value(Entries(), {"x": torch.zeros(0, 3)}) == 0.0


def test_balanced_terms_count_alike_from_the_second_step_on():
    objective = 2.0 * Balanced(Entries(), Rows())

    assert value(objective, BATCH) == 2 * 3.5

    objective.stepped({"entries": 6.0, "rows": 4.0})
    assert {name: weight for name, (weight, _) in objective.named().items()} == {"entries": 2.0, "rows": 3.0}

    objective.stepped({"entries": 6.0, "rows": 0.0})
    assert value(objective, BATCH) == 2 * 3.5


def test_a_twin_of_the_model_has_the_same_objective():
    objective = Entries() + Balanced(Entries(), Rows())

    assert copy.deepcopy({"objective": objective})["objective"] is objective


@pytest.fixture(scope="module")
def model(tiny: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(tiny)


def test_cross_entropy_is_that_of_transformers(model: Any, batch: dict[str, Tensor]):
    objective = CrossEntropy()

    ours = weighted_mean(objective(Forward(model, batch), batch), objective.counts(batch))

    assert objective.counts(batch) == {"cross_entropy": 15 + 3}
    torch.testing.assert_close(ours, model(**batch).loss, rtol=1e-6, atol=0)


def test_two_terms_share_one_forward_pass(model: Any, batch: dict[str, Tensor]):
    calls: list[object] = []
    hook = model.model.register_forward_hook(lambda *_: calls.append(1))

    (CrossEntropy() + 0.5 * CrossEntropy())(Forward(model, batch), batch)

    hook.remove()
    assert len(calls) == 1


def test_a_reference_model_runs_without_gradients(model: Any, batch: dict[str, Tensor]):
    forward = Forward(model, batch)

    assert forward.hidden().requires_grad
    assert not forward.of(model).hidden().requires_grad
    assert forward.of(model) is forward.of(model)
    torch.testing.assert_close(forward.of(model).hidden(), forward.hidden())


def test_states_between_the_blocks_come_from_the_same_pass(model: Any, batch: dict[str, Tensor]):
    forward = Forward(model, batch)
    forward.keep_states()

    embedded, between, last = forward.states()

    assert last is forward.hidden()
    torch.testing.assert_close(embedded, model.model.embed_tokens(batch["input_ids"]))
    torch.testing.assert_close(model.model.norm(model.model.layers[1](between, **_positions(model, between))), last)
    assert [state.requires_grad for state in forward.of(model).states()] == [False] * 3


def _positions(model: Any, hidden_BTD: Tensor) -> dict[str, Any]:
    places_1T = torch.arange(hidden_BTD.shape[1])[None]
    return {"position_embeddings": model.model.rotary_emb(hidden_BTD, position_ids=places_1T)}


def test_smoothed_labels_are_a_mixture_with_all_classes(tmp_path: Path):
    """Each class has a share of the label's weight: the loss is that of the label, mixed with the mean over classes."""
    model = artifact.load(write_cnn(tmp_path, classes=5), kinds=(Kind.IMAGE_CLASSIFIER,)).model
    batch = {"pixel_values": torch.randn(6, 1, 8, 8), "labels": torch.arange(6) % 5}
    log_p = Forward(model, batch).classified().logits.log_softmax(dim=1)
    of_label, of_all = -log_p[torch.arange(6), batch["labels"]], -log_p.mean(dim=1)

    made = ClassCrossEntropy(smoothing=0.2).total(Forward(model, batch), batch)

    assert torch.allclose(made, (0.8 * of_label + 0.2 * of_all).sum())
