"""Every row of the table of continual learning: value and gradient against the loss as its authors write it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - as losses are written
from transformers import ResNetConfig, ResNetForImageClassification

from overhaul.continual import (
    FeaturesKept,
    Focused,
    LogitsKept,
    OldModel,
    OldSigmoids,
    PredictionsKept,
    Pulled,
    Remembering,
    Replayed,
    Uniform,
)
from overhaul.interop.classifier import PENULTIMATE
from overhaul.objective import Batch, BinaryCrossEntropy, ClassCrossEntropy, Forward, Objective, weighted_mean
from overhaul.reservoir import Reservoir

B, M, C = 4, 3, 5


@pytest.fixture
def model() -> Any:
    torch.manual_seed(0)
    config = ResNetConfig(
        num_channels=1, embedding_size=4, hidden_sizes=[4, 8], depths=[1, 1], layer_type="basic", num_labels=C
    )
    return ResNetForImageClassification(config).eval()


@pytest.fixture
def batch() -> dict[str, Tensor]:
    torch.manual_seed(1)
    made = {"pixel_values": torch.randn(B, 1, 8, 8), "labels": torch.tensor([3, 4, 3, 4])}
    for draw in ("memory", "memory2"):
        made |= {
            f"{draw}/pixel_values": torch.randn(M, 1, 8, 8),
            f"{draw}/labels": torch.tensor([0, 1, 2]),
            f"{draw}/logits": torch.randn(M, C),
            f"{draw}/width": torch.full((M,), C),
        }
    return made


def value_and_gradients(model: nn.Module, loss: Tensor) -> list[Tensor]:
    parameters = list(model.parameters())
    found = torch.autograd.grad(loss, parameters, allow_unused=True)
    return [loss.detach(), *(torch.zeros_like(p) if g is None else g for g, p in zip(found, parameters, strict=True))]


def same(model: Any, batch: Batch, objective: Objective, direct: Callable[[], Tensor]) -> None:
    terms = objective(Forward(model, batch), batch)
    found = value_and_gradients(model, weighted_mean(terms, objective.counts(batch)))
    torch.testing.assert_close(found, value_and_gradients(model, direct()), rtol=1e-5, atol=1e-6)


def logits(model: Any, batch: Batch, draw: str = "") -> Tensor:
    return model(pixel_values=batch[f"{draw}pixel_values"]).logits


def test_finetune(model: Any, batch: Batch):
    same(model, batch, ClassCrossEntropy(), lambda: F.cross_entropy(logits(model, batch), batch["labels"]))


def test_only_some_classes_compete(model: Any, batch: Batch):
    kept = torch.tensor([3, 4])
    same(
        model, batch, ClassCrossEntropy(kept),
        lambda: F.cross_entropy(logits(model, batch)[:, kept], batch["labels"] - 3),
    )  # fmt: skip


def test_er(model: Any, batch: Batch):
    same(
        model, batch, ClassCrossEntropy() + 0.7 * Replayed(),
        lambda: F.cross_entropy(logits(model, batch), batch["labels"])
        + 0.7 * F.cross_entropy(logits(model, batch, "memory/"), batch["memory/labels"]),
    )  # fmt: skip


def test_der(model: Any, batch: Batch):
    same(
        model, batch, ClassCrossEntropy() + 0.3 * LogitsKept(),
        lambda: F.cross_entropy(logits(model, batch), batch["labels"])
        + 0.3 * F.mse_loss(logits(model, batch, "memory/"), batch["memory/logits"]),
    )  # fmt: skip


def test_der_plus_plus_has_two_draws(model: Any, batch: Batch):
    same(
        model, batch, ClassCrossEntropy() + 0.3 * LogitsKept(1) + 0.7 * Replayed(2),
        lambda: F.cross_entropy(logits(model, batch), batch["labels"])
        + 0.3 * F.mse_loss(logits(model, batch, "memory/"), batch["memory/logits"])
        + 0.7 * F.cross_entropy(logits(model, batch, "memory2/"), batch["memory2/labels"]),
    )  # fmt: skip


def test_logits_of_classes_that_came_later_are_left_free(model: Any, batch: Batch):
    narrow = dict(batch) | {"memory/width": torch.tensor([2, 3, 5])}

    def direct() -> Tensor:
        ours, theirs = logits(model, narrow, "memory/"), narrow["memory/logits"]
        return torch.stack([F.mse_loss(ours[i, :w], theirs[i, :w]) for i, w in enumerate((2, 3, 5))]).mean()

    same(model, narrow, LogitsKept(), direct)


def test_what_was_remembered_before_the_head_grew_holds_the_classes_of_then(model: Any, batch: Batch):
    narrow = dict(batch) | {"memory/width": torch.full((M,), 2), "memory/logits": batch["memory/logits"][:, :2]}

    def direct() -> Tensor:
        return F.mse_loss(logits(model, narrow, "memory/")[:, :2], narrow["memory/logits"])

    same(model, narrow, LogitsKept(), direct)
    now, then = logits(model, narrow, "memory/")[:, :2].softmax(-1), narrow["memory/logits"].softmax(-1)
    found = PredictionsKept()(Forward(model, narrow), narrow)["predictions_kept"].total
    torch.testing.assert_close(found, torch.linalg.vector_norm(now - then, dim=-1).sum())


def test_in_one_pass_the_loss_is_that_of_several_but_for_batch_statistics(model: Any, batch: Batch):
    objective = ClassCrossEntropy() + 0.3 * LogitsKept(1) + 0.7 * Replayed(2)
    one = Remembering(objective, Reservoir(9, seed=0), joined=True)
    names = ("", "memory/", "memory2/")

    def together() -> Tensor:
        made = model(pixel_values=torch.cat([batch[f"{name}pixel_values"] for name in names])).logits
        new, kept, replayed = made.split([B, M, M])
        loss = F.cross_entropy(new, batch["labels"]) + 0.3 * F.mse_loss(kept, batch["memory/logits"])
        return loss + 0.7 * F.cross_entropy(replayed, batch["memory2/labels"])

    same(model, batch, one, together)
    same(model, batch, objective, together)  # in evaluation there are no batch statistics
    same(model.train(), batch, one, together)
    with pytest.raises(AssertionError):
        same(model, batch, objective, together)


def test_in_one_pass_nothing_is_drawn_for_a_term_alone(model: Any, batch: Batch):
    focused = Focused(ClassCrossEntropy() + Replayed(), "cross_entropy")
    with focused.alone():
        same(model.train(), batch, Remembering(focused, Reservoir(9, seed=0), joined=True),
             lambda: F.cross_entropy(logits(model, batch), batch["labels"]))  # fmt: skip


def test_fdr_is_not_squared(model: Any, batch: Batch):
    same(
        model, batch, PredictionsKept(),
        lambda: torch.linalg.vector_norm(
            logits(model, batch, "memory/").softmax(-1) - batch["memory/logits"].softmax(-1), dim=-1
        ).mean(),
    )  # fmt: skip


def test_fdr_has_a_gradient_where_nothing_has_changed(model: Any, batch: Batch):
    kept = dict(batch) | {"memory/logits": logits(model, batch, "memory/").detach()}
    found = PredictionsKept()(Forward(model, kept), kept)["predictions_kept"].total

    assert all(tensor.isfinite().all() for tensor in value_and_gradients(model, found))


def test_lwf(model: Any, batch: Batch):
    torch.manual_seed(5)
    old = copy.deepcopy(model)
    nn.init.normal_(old.classifier[1].weight)

    def direct() -> Tensor:
        theirs = (logits(old, batch)[:, :3] / 2).softmax(-1).detach()
        return 4 * F.kl_div((logits(model, batch)[:, :3] / 2).log_softmax(-1), theirs, reduction="batchmean")

    same(model, batch, OldModel(old.requires_grad_(False), 3), direct)
    itself = OldModel(copy.deepcopy(model).requires_grad_(False), C)
    total = itself(Forward(model, batch), batch)["old_model"].total
    value, *gradients = value_and_gradients(model, total)
    assert abs(float(value)) < 1e-5
    assert all(gradient.abs().max() < 1e-5 for gradient in gradients)


def test_cpr_is_log_of_the_classes_less_entropy(model: Any, batch: Batch):
    def direct() -> Tensor:
        return (
            torch.log(torch.tensor(float(C)))
            - torch.distributions.Categorical(logits=logits(model, batch)).entropy().mean()
        )

    same(model, batch, Uniform(C), direct)


def test_ewc_and_l2(model: Any, batch: Batch):
    torch.manual_seed(2)
    anchor = {name: p.detach() + 0.1 * torch.randn_like(p) for name, p in model.named_parameters()}
    fisher = {name: torch.rand_like(p) for name, p in anchor.items()}

    def penalty(weights: dict[str, Tensor] | None) -> Tensor:
        own = dict(model.named_parameters())
        return 0.5 * sum(  # pyright: ignore
            ((1.0 if weights is None else weights[name]) * (own[name] - old) ** 2).sum() for name, old in anchor.items()
        )

    same(model, batch, Pulled(anchor, fisher), lambda: penalty(fisher))
    same(model, batch, Pulled(anchor), lambda: penalty(None))
    same(model, batch, Pulled(anchor, {n: torch.ones_like(f) for n, f in fisher.items()}), lambda: penalty(None))


def test_a_head_that_has_grown_is_held_where_it_was(model: Any, batch: Batch):
    head = model.classifier[1].weight
    anchor = {"classifier.1.weight": head.detach()[:2] - 1.0}

    same(model, batch, Pulled(anchor), lambda: 0.5 * (head[:2] - anchor["classifier.1.weight"]).square().sum())


@pytest.mark.parametrize(
    ("curvature", "says"),
    [
        ({"other": torch.ones(2)}, "fits no weight"),
        ({"w": torch.ones(3)}, "fits no weight"),
        ({"w": torch.tensor([1.0, -1.0])}, "is negative"),
        ({"w": torch.tensor([1.0, torch.nan])}, "is negative, NaN or infinite"),
    ],
)
def test_curvature_that_is_none_is_refused(curvature: dict[str, Tensor], says: str):
    with pytest.raises(ValueError, match=says):
        Pulled({"w": torch.zeros(2)}, curvature)


@pytest.mark.parametrize("term", [Replayed(), LogitsKept(), PredictionsKept()])
def test_before_anything_is_remembered_terms_of_memory_are_nothing(model: Any, batch: Batch, term: Any):
    alone = {name: tensor for name, tensor in batch.items() if "/" not in name}

    same(model, alone, ClassCrossEntropy() + term, lambda: F.cross_entropy(logits(model, alone), alone["labels"]))


def other(model: Any) -> Any:
    """The same network with other weights, frozen."""
    found = copy.deepcopy(model)
    torch.manual_seed(3)
    for parameter in found.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return found.requires_grad_(False)


def test_a_binary_head_says_nothing_of_old_classes(model: Any, batch: Batch):
    def direct() -> Tensor:
        new_BK = logits(model, batch)[:, [3, 4]]
        target_BK = F.one_hot(batch["labels"] - 3, 2).float()
        return F.binary_cross_entropy(new_BK.sigmoid(), target_BK, reduction="none").sum(dim=1).mean()

    same(model, batch, BinaryCrossEntropy((3, 4)), direct)
    found = F.one_hot(batch["labels"], C).float()
    whole = lambda: F.binary_cross_entropy_with_logits(logits(model, batch), found) * C  # noqa: E731
    same(model, batch, BinaryCrossEntropy(range(C)), whole)


def test_predictions_are_distilled_class_by_class(model: Any, batch: Batch):
    old = other(model)

    def direct() -> Tensor:
        p, q = (
            torch.stack([one.sigmoid(), 1 - one.sigmoid()])
            for one in (logits(old, batch)[:, :3], logits(model, batch)[:, :3])
        )
        return (p * (p / q).log()).sum() / B

    same(model, batch, OldSigmoids(old, 3), direct)


def test_features_are_held_where_they_were(model: Any, batch: Batch):
    old = other(model)
    stage = "resnet.encoder.stages.0"

    def penultimate() -> Tensor:
        ours, theirs = (one.resnet(batch["pixel_values"]).pooler_output.flatten(1) for one in (model, old))
        return (ours - theirs).square().sum() / B

    def inside() -> Tensor:
        ours, theirs = (
            one.resnet(batch["pixel_values"], output_hidden_states=True).hidden_states[1] for one in (model, old)
        )
        return (ours - theirs).square().sum() / B

    same(model, batch, FeaturesKept(old, PENULTIMATE), penultimate)
    same(model, batch, FeaturesKept(old, stage), inside)


@pytest.mark.parametrize("make", [lambda old: OldSigmoids(old, 3), lambda old: FeaturesKept(old, PENULTIMATE)])
def test_a_student_that_is_the_teacher_has_no_gradient(model: Any, batch: Batch, make: Callable[[Any], Objective]):
    objective = make(copy.deepcopy(model).requires_grad_(False))
    terms = objective(Forward(model, batch), batch)

    for tensor in value_and_gradients(model, weighted_mean(terms, objective.counts(batch))):
        assert torch.allclose(tensor, torch.zeros_like(tensor), atol=1e-6)
