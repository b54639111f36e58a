"""The loop, on a model of one number and on the tiny language model."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from overhaul.adapt.full import Full
from overhaul.errors import UserError
from overhaul.objective import Batch, CrossEntropy, Forward, Term
from overhaul.optim.adamw import adamw
from overhaul.schedules import schedule
from overhaul.stream import Batch as Batched
from overhaul.stream import Repeat, Rows
from overhaul.train import History, Plan, train
from overhaul.watch import KeepZeros, Watcher


class Point(nn.Module):
    """A model that is a point; its forward pass is never asked for."""

    def __init__(self, start: float = 4.0) -> None:
        super().__init__()
        self.at = nn.Parameter(torch.tensor([start]))


class Distance(Term):
    """Half the squared distance from each target: the gradient of the mean is the distance to their mean."""

    name = "distance"

    def total(self, forward: Forward, batch: Batch) -> Tensor:
        point: Any = forward.model
        return 0.5 * (point.at - batch["target"]).square().sum()

    def count(self, batch: Batch) -> int:
        return batch["target"].numel()


def targets(values: list[float], batch_size: int) -> Batched:
    rows = [{"target": torch.tensor([value])} for value in values]
    return Batched(Repeat(Rows(rows, name="targets", fingerprint="t")), batch_size=batch_size)


def descent(values: list[float], *, batch_size: int = 1, lr: float = 0.5, **more: Any) -> Plan:
    point = Point()
    optimizer = torch.optim.SGD(point.parameters(), lr=lr)
    return Plan(model=point, objective=Distance(), stream=targets(values, batch_size), optimizer=optimizer, **more)


def test_an_optimizer_that_was_made_before_the_freezing_is_refused():
    model = nn.ModuleList([Point(), Point()])
    plan = Plan(
        model=model, objective=Distance(), stream=targets([1.0], 1), optimizer=torch.optim.SGD(model.parameters())
    )
    model[1].requires_grad_(False)

    with pytest.raises(UserError, match="frozen parameters"):
        train(plan, Full(steps=1), quiet=True)


def test_descent_on_a_parabola_is_the_closed_form():
    plan = descent([1.0])

    history = train(plan, Full(steps=6, clip=0), quiet=True)

    assert plan.model.at.item() == 1 + (4 - 1) * 0.5**6
    assert [point["loss"] for point in history.points] == [0.5 * (3 * 0.5**k) ** 2 for k in range(6)]
    assert [point["step"] for point in history.points] == [1, 2, 3, 4, 5, 6]


def test_accumulated_batches_are_one_large_batch():
    values = [1.0, 5.0, -2.0, 0.25, 3.0, 7.0, -4.0, 2.0]
    one, four = descent(values, batch_size=4), descent(values, batch_size=1)

    train(one, Full(steps=3, accumulate=1), quiet=True)
    train(four, Full(steps=3, accumulate=4), quiet=True)

    torch.testing.assert_close(four.model.at, one.model.at, rtol=1e-6, atol=0)


def test_the_gradient_is_clipped_and_its_norm_before_is_recorded():
    plan = descent([-96.0], lr=1.0)  # the gradient is 100

    history = train(plan, Full(steps=1, clip=0.25), quiet=True)

    assert plan.model.at.item() == pytest.approx(4 - 0.25)
    assert history.points[0]["grad_norm"] == 100


def test_the_rate_follows_the_schedule_in_the_middle_of_each_step():
    plan = descent([1.0], schedule=schedule("linear", 0.0))

    history = train(plan, Full(steps=4), quiet=True)

    assert [point["lr"] for point in history.points] == pytest.approx([0.5 * f for f in (0.875, 0.625, 0.375, 0.125)])


class Diary(Watcher):
    """Writes down when it is called."""

    def __init__(self) -> None:
        self.pages: list[Any] = []

    def start(self, model: nn.Module) -> None:
        self.pages.append("start")

    def step(self, model: nn.Module, step: int) -> None:
        self.pages.append(step)

    def end(self, model: nn.Module) -> None:
        self.pages.append("end")


def test_watchers_are_called_at_the_start_after_every_step_and_at_the_end():
    diary = Diary()

    train(descent([1.0], watchers=(diary,)), Full(steps=2), quiet=True)

    assert diary.pages == ["start", 1, 2, "end"]


def test_evaluations_stand_in_the_history_and_see_the_model_evaluating():
    seen: list[bool] = []

    def evaluate(model: nn.Module) -> dict[str, float]:
        seen.append(model.training)
        return {"perplexity": 7.0}

    history = train(descent([1.0]), Full(steps=5, eval_every=2), evaluate=evaluate, quiet=True)

    assert [point.get("perplexity") for point in history.points] == [None, 7.0, None, 7.0, None]
    assert seen == [False, False]


def test_what_the_probes_of_a_plan_find_stands_beside_an_evaluation_or_alone():
    def probe(model: nn.Module) -> dict[str, float]:
        return {"weight": float(next(model.parameters()).detach().mean())}

    beside = train(
        descent([1.0], probes=(probe,)), Full(steps=3, eval_every=2), evaluate=lambda _: {"perplexity": 7.0}, quiet=True
    )
    alone = train(descent([1.0], probes=(probe,)), Full(steps=3, eval_every=2), quiet=True)

    assert [point.get("perplexity") for point in beside.points] == [None, 7.0, None]
    assert [point.get("weight") for point in beside.points] == [point.get("weight") for point in alone.points]
    assert ["weight" in point for point in alone.points] == [False, True, False]


def test_a_plan_hears_what_was_done_once_and_again_where_a_resumed_run_finds_it_done(tmp_path: Path):
    told: list[History] = []
    method = Full(steps=3, save_every=1)

    first = train(descent([1.0], told=told.append), method, state_dir=tmp_path, goes_on=True, quiet=True)
    train(descent([1.0], told=told.append), method, state_dir=tmp_path, goes_on=True, resume=True, quiet=True)

    once, again = told
    assert once is first
    assert (again.points, again.seconds, again.trainable_parameters) == (first.points, first.seconds, 1)


def test_nothing_to_train():
    plan = descent([1.0])
    plan.model.requires_grad_(False)

    with pytest.raises(UserError, match="nothing is trainable"):
        train(plan, Full(steps=1), quiet=True)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_names_step_and_micro_batch(bad: float):
    plan = descent([1.0, 2.0, 3.0, bad, 5.0])

    with pytest.raises(UserError, match="step 2, micro-batch 1"):
        train(plan, Full(steps=5, accumulate=2), quiet=True)


# A language model.


@pytest.fixture
def model(tiny: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(tiny)


def windows(count: int = 6) -> Batched:
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randint(500, (16,), generator=generator) for _ in range(count)]
    items = [{"input_ids": ids, "labels": ids} for ids in rows]
    return Batched(Repeat(Rows(items, name="windows", fingerprint="w")), batch_size=2)


def full(model: nn.Module, settings: Full, **more: Any) -> Plan:
    model.requires_grad_(True)
    return Plan(
        model=model,
        objective=CrossEntropy(),
        stream=windows(),
        optimizer=adamw(model.parameters(), lr=settings.lr, weight_decay=settings.weight_decay),
        schedule=schedule(settings.schedule, settings.warmup),
        **more,
    )


def test_five_steps_are_a_hand_written_torch_loop(model: Any):
    settings = Full(steps=5, lr=1e-3, weight_decay=0.1, clip=0.5, warmup=0.4, schedule="cosine")
    reference = copy.deepcopy(model)

    train(full(model, settings), settings, quiet=True)

    optimizer = torch.optim.AdamW(reference.parameters(), lr=1e-3, weight_decay=0.1)
    stream = windows()
    for step in range(5):
        share = (step + 0.5) / 5
        factor = share / 0.4 if share < 0.4 else 0.5 * (1 + math.cos(math.pi * (share - 0.4) / 0.6))
        optimizer.param_groups[0]["lr"] = 1e-3 * factor
        loss = reference(**next(stream)).loss
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(reference.parameters(), 0.5)
        optimizer.step()
    for name, parameter in model.named_parameters():
        apart = (parameter - reference.get_parameter(name)).abs()
        # Adam turns the rounding of a gradient near zero into a part of a whole step, here of 1e-3.
        assert apart.max() < 5e-5, name
        assert apart.mean() < 1e-7, name


def test_weights_train_as_fp32_masters(model: Any):
    model.to(torch.bfloat16)
    settings = Full(steps=1, lr=1e-5)

    train(full(model, settings), settings, dtype=torch.bfloat16, quiet=True)

    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def test_a_bad_module_is_named(model: Any):
    with torch.no_grad():
        model.model.layers[1].mlp.gate_proj.weight[0, 0] = math.nan

    with pytest.raises(UserError, match=r"step 1, micro-batch 0; .* model\.layers\.1\.mlp\.gate_proj"):
        train(full(model, Full(steps=1)), Full(steps=1), quiet=True)


def test_the_history_counts_tokens_parameters_and_states(model: Any):
    settings = Full(steps=3)

    history = train(full(model, settings), settings, quiet=True)

    size = sum(parameter.numel() for parameter in model.parameters())
    assert history.tokens == 3 * 2 * 16
    assert history.trainable_parameters == size
    assert 2 * 4 * size <= history.optimizer_bytes < 2.1 * 4 * size


class Stopped(Exception):
    """A run that ends here, as if the power had failed."""


class PowerFails(Watcher):
    """Ends the run in step 4."""

    def step(self, model: nn.Module, step: int) -> None:
        if step == 4:
            raise Stopped


@pytest.mark.parametrize("save_every", [1, 2, 3])
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(tiny: Path, tmp_path: Path, save_every: int):
    settings = Full(steps=6, lr=1e-3, save_every=save_every)

    def run(*, resume: bool = False, state_dir: Path | None = tmp_path, watchers: tuple[Watcher, ...] = ()) -> Any:
        model = AutoModelForCausalLM.from_pretrained(tiny)
        history = train(
            full(model, settings, watchers=watchers), settings, state_dir=state_dir, resume=resume, quiet=True
        )
        return model, history

    whole, told = run(state_dir=None)
    with pytest.raises(Stopped):
        run(watchers=(PowerFails(),))
    resumed, retold = run(resume=True, watchers=(Watcher(),))

    for name, parameter in resumed.named_parameters():
        assert torch.equal(parameter, whole.get_parameter(name)), name
    assert [p["loss"] for p in retold.points] == [p["loss"] for p in told.points]
    assert retold.tokens == told.tokens


def test_resume_without_a_checkpoint_begins_at_the_beginning(tmp_path: Path):
    plan = descent([1.0])

    assert len(train(plan, Full(steps=3), state_dir=tmp_path, resume=True, quiet=True).points) == 3


def test_resume_with_other_settings_is_refused_but_for_how_often_to_save(tmp_path: Path):
    train(descent([1.0]), Full(steps=4, save_every=1), state_dir=tmp_path, quiet=True)

    with pytest.raises(UserError, match=r"clip: 1\.0 then, 2\.0 now"):
        train(descent([1.0]), Full(steps=4, save_every=1, clip=2.0), state_dir=tmp_path, resume=True, quiet=True)
    train(descent([1.0]), Full(steps=4, save_every=2, keep=1), state_dir=tmp_path, resume=True, quiet=True)


def test_pruned_weights_stay_zero(model: Any):
    from overhaul.layers import swap
    from overhaul.layers.masked import MaskedLinear

    mask_OI = torch.arange(128 * 64).view(128, 64) % 2 == 0
    name = "model.layers.0.mlp.up_proj"
    swap(model, [name], lambda linear: MaskedLinear.from_linear(linear, mask_OI))  # pyright: ignore
    settings = Full(steps=3, lr=1e-2)

    train(full(model, settings, watchers=(KeepZeros(),)), settings, quiet=True)

    weight_OI = model.get_submodule(name).weight
    assert (weight_OI[~mask_OI] == 0).all()
    assert (weight_OI[mask_OI] != 0).all()


def test_points_can_be_written_as_json():
    history = train(descent([1.0]), Full(steps=1), quiet=True)

    assert json.loads(json.dumps(history.points))[0].keys() >= {"step", "loss", "lr", "grad_norm", "tokens", "seconds"}
