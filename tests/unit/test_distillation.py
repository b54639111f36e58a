"""What distillation asks of a student, on models of a few layers."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from transformers import AutoModelForCausalLM, LlamaConfig

from overhaul import artifact
from overhaul.adapt.full import Full
from overhaul.corpora import CorpusSpec, open_corpus
from overhaul.data import Data
from overhaul.distillation import (
    Distill,
    HiddenStates,
    distillation_plan,
    least_squares,
    pairs_by_depth,
    partner,
    state_map,
)
from overhaul.layers.masked import MaskedLinear
from overhaul.objective import CrossEntropy, Forward, weighted_mean
from overhaul.prune.magnitude import Magnitude
from overhaul.stream import IGNORED
from overhaul.train import train

SHORT = Full(steps=3, batch_size=2, seq_len=32, lr=1e-3, save_every=0)


@pytest.fixture(scope="module")
def teacher(tiny: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(tiny)


@pytest.fixture
def narrow() -> Any:
    """A student of other widths, with the teacher's vocabulary."""
    sizes: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "vocab_size": 512}
    heads: dict[str, Any] = {"num_attention_heads": 2, "num_key_value_heads": 2}
    torch.manual_seed(1)
    config = LlamaConfig(num_hidden_layers=2, max_position_embeddings=512, **sizes, **heads)
    return AutoModelForCausalLM.from_config(config).eval()


@pytest.fixture(scope="module")
def data(tiny: Path) -> Data:
    return Data(open_corpus(CorpusSpec(path="sample")), artifact.load(tiny).processor)


def log_probs(model: Any, batch: dict[str, Tensor]) -> Tensor:
    kept_BT = batch["labels"][:, 1:] != IGNORED
    return model(input_ids=batch["input_ids"]).logits[:, :-1][kept_BT].log_softmax(-1)


def test_the_divergence_is_that_of_the_models_logits(narrow: Any, teacher: Any, batch: dict[str, Tensor]):
    term = Distill(teacher)

    loss = weighted_mean(term(Forward(narrow, batch), batch), term.counts(batch))

    assert term.counts(batch) == {"kl": 15 + 3}
    with torch.no_grad():
        expected = F.kl_div(log_probs(narrow, batch), log_probs(teacher, batch), log_target=True, reduction="batchmean")
    torch.testing.assert_close(loss.detach(), expected)


def test_models_with_logits_of_their_own_kind_go_through_them(narrow: Any, teacher: Any, batch: dict[str, Tensor]):
    term = Distill(teacher)
    plain = term.total(Forward(narrow, batch), batch)
    for changed in (narrow, teacher):
        other = copy.deepcopy(changed)
        other.config.logit_scale = 3.0  # in name only: the logits are the same, but no linear map is trusted
        pair = (other, teacher) if changed is narrow else (narrow, other)
        torch.testing.assert_close(Distill(pair[1]).total(Forward(pair[0], batch), batch), plain)


def test_one_pass_of_each_model_serves_all_terms(narrow: Any, teacher: Any, batch: dict[str, Tensor]):
    passes: list[str] = []
    hooks = [
        model.model.register_forward_hook(lambda *_, name=name: passes.append(name))
        for model, name in ((narrow, "student"), (teacher, "teacher"))
    ]
    narrow.add_module("state_map", nn.Linear(32, 64, bias=False))

    (Distill(teacher) + CrossEntropy() + HiddenStates(teacher, ((0, 0), (1, 1))))(Forward(narrow, batch), batch)

    for hook in hooks:
        hook.remove()
    assert sorted(passes) == ["student", "teacher"]


def test_hidden_states_are_compared_through_the_map(narrow: Any, teacher: Any, batch: dict[str, Tensor]):
    translate = nn.Linear(32, 64, bias=False)
    narrow.add_module("state_map", translate)
    forward, term = Forward(narrow, batch), HiddenStates(teacher, ((0, 0), (1, 1)))
    forward.keep_states()

    total = term.total(forward, batch)

    kept_BT = batch["labels"][:, 1:] != IGNORED
    own, theirs = (m(input_ids=batch["input_ids"], output_hidden_states=True).hidden_states for m in (narrow, teacher))
    expected = sum(
        18 * F.mse_loss(translate(own[place][:, :-1][kept_BT]), theirs[place][:, :-1][kept_BT]) for place in (0, 1)
    )
    torch.testing.assert_close(total, expected)
    total.backward()
    assert translate.weight.grad is not None
    assert all(parameter.grad is None for parameter in teacher.parameters())


def test_distillation_from_itself_changes_nothing(teacher: Any, data: Data):
    student = copy.deepcopy(teacher)
    plan = distillation_plan(student, teacher, data, SHORT, pairs=pairs_by_depth(2, 2))

    history = train(plan, SHORT, quiet=True)
    plan.finish(student)

    assert [point["loss"] for point in history.points] == [0.0] * 3
    for (name, parameter), theirs in zip(student.named_parameters(), teacher.parameters(), strict=True):
        assert torch.equal(parameter, theirs), name


def test_a_student_comes_closer_and_the_map_is_not_left_in_it(narrow: Any, teacher: Any, data: Data):
    names, before = set(narrow.state_dict()), copy.deepcopy(teacher.state_dict())
    longer = SHORT.model_copy(update={"steps": 12})
    plan = distillation_plan(narrow, teacher, data, longer, pairs=((0, 0), (1, 1)), ce_weight=0.5)

    history = train(plan, longer, quiet=True)
    plan.finish(narrow)

    first, last = history.points[0], history.points[-1]
    assert {name for name in last if name.startswith("loss/")} == {"loss/kl", "loss/states", "loss/cross_entropy"}
    assert last["loss/kl"] < first["loss/kl"]
    assert first["loss"] == pytest.approx(first["loss/kl"] + 0.5 * first["loss/cross_entropy"])
    assert set(narrow.state_dict()) == names
    for name, tensor in teacher.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_hidden_states_come_closer_too(narrow: Any, teacher: Any, data: Data):
    longer = SHORT.model_copy(update={"steps": 30, "lr": 1e-2})
    plan = distillation_plan(narrow, teacher, data, longer, pairs=((0, 0), (1, 1)))

    history = train(replace(plan, objective=HiddenStates(teacher, ((0, 0), (1, 1)))), longer, quiet=True)

    assert history.points[-1]["loss/states"] < 0.8 * history.points[0]["loss/states"]


def test_both_terms_have_the_size_of_the_step_before(narrow: Any, teacher: Any, data: Data):
    plan = distillation_plan(narrow, teacher, data, SHORT, pairs=((0, 0), (1, 1)))

    first, second, _ = train(plan, SHORT, quiet=True).points

    alpha = first["loss/kl"] / first["loss/states"]
    assert second["loss"] == pytest.approx(second["loss/kl"] + alpha * second["loss/states"])


def test_accumulated_micro_batches_are_one_batch_with_states_too(narrow: Any, teacher: Any, data: Data):
    students = []
    for batch_size, accumulate in ((4, 1), (1, 4)):
        settings = SHORT.model_copy(update={"batch_size": batch_size, "accumulate": accumulate})
        student = copy.deepcopy(narrow)
        train(distillation_plan(student, teacher, data, settings, pairs=((0, 0), (1, 1))), settings, quiet=True)
        students.append(student)

    one, four = students
    for own, other, start in zip(one.parameters(), four.parameters(), narrow.parameters(), strict=False):
        assert (own - other).abs().max() < 0.01 * (own - start).abs().max()


def test_zeros_of_a_pruned_student_stay(teacher: Any, data: Data):
    student = Magnitude(sparsity=0.5).apply(copy.deepcopy(teacher), None)
    plan = distillation_plan(student, teacher, data, SHORT)

    train(plan, SHORT, quiet=True)

    masked = [module for module in student.modules() if isinstance(module, MaskedLinear)]
    assert masked
    assert all(not layer.weight[~layer.mask].any() for layer in masked)


# Pairs and their map.


def test_pairs_are_spread_over_the_depth():
    assert pairs_by_depth(30, 30) == ((0, 0), (8, 8), (15, 15), (22, 22))
    assert pairs_by_depth(20, 30) == ((0, 0), (5, 8), (10, 15), (15, 22))
    assert pairs_by_depth(2, 2) == ((0, 0), (1, 1))
    assert pairs_by_depth(1, 6) == ((0, 0),)
    assert [partner(place, 3, 6) for place in (0, 1, 2)] == [0, 2, 4]
    assert partner(7, 8, 4) == 3, "the last block has passed the final norm"


def test_the_map_begins_as_the_best_one(narrow: Any, teacher: Any, batch: dict[str, Tensor]):
    begun = state_map(narrow, teacher, batch["input_ids"], ((0, 0), (1, 1)))
    random = nn.Linear(32, 64, bias=False)

    losses = []
    for translate in (begun, random):
        narrow.add_module("state_map", translate)
        forward = Forward(narrow, batch)
        forward.keep_states()
        losses.append(HiddenStates(teacher, ((0, 0), (1, 1))).total(forward, batch).item())

    assert losses[0] < 0.7 * losses[1]
    assert torch.equal(state_map(teacher, teacher, batch["input_ids"], ((0, 0),)).weight, torch.eye(64))


def test_least_squares_finds_a_linear_map():
    random = torch.Generator().manual_seed(0)
    weight_ED, source_ND = torch.randn(7, 5, generator=random), torch.randn(200, 5, generator=random)

    found_ED = least_squares(source_ND, source_ND @ weight_ED.t())

    torch.testing.assert_close(found_ED, weight_ED.double(), rtol=5e-3, atol=5e-3)
