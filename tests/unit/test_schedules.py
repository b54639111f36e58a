"""Schedules: their values, no jumps, and the same as transformers' where these have them."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.optim.lr_scheduler import CosineAnnealingWarmRestarts
from transformers import optimization

from overhaul.schedules import Piece, Schedule, annealing, chain, infinite, schedule, warmup_stable_decay

STEPS, WARMUP, DECAY = 400, 40, 100


@pytest.mark.parametrize(
    ("name", "warmup", "expected"),
    [
        ("constant", 0.0, {0.0: 1, 0.5: 1, 1.0: 1}),
        ("linear", 0.0, {0.0: 1, 0.25: 0.75, 1.0: 0}),
        ("linear", 0.5, {0.0: 0, 0.25: 0.5, 0.5: 1, 0.75: 0.5, 1.0: 0}),
        ("cosine", 0.0, {0.0: 1, 0.5: 0.5, 1.0: 0}),
        ("cosine", 0.2, {0.1: 0.5, 0.2: 1, 0.6: 0.5, 1.0: 0}),
        ("constant", 1.0, {0.5: 0.5, 1.0: 1}),
    ],
)
def test_schedules(name: Any, warmup: float, expected: dict[float, float]):
    factor = schedule(name, warmup)

    assert {share: factor(share) for share in expected} == pytest.approx(expected)


def test_a_schedule_that_ends_above_nothing():
    factor = schedule("cosine", 0.2, 0.1)

    assert {share: factor(share) for share in (0.1, 0.2, 0.6, 1.0)} == pytest.approx(
        {0.1: 0.5, 0.2: 1, 0.6: 0.55, 1.0: 0.1}
    )


def test_a_piece_without_length_changes_nothing():
    factor = chain((Piece(0.5, 1.0), Piece(0.5, 0.1), Piece(1.0, 1.0)), start=0.0)

    assert [factor(share) for share in (0.25, 0.5, 0.75, 1.0)] == [0.5, 1, 1, 1]


def test_a_piece_that_would_end_before_it_begins():
    with pytest.raises(ValueError, match=r"ends at 0\.4 of the run and begins at 0\.5"):
        chain((Piece(0.5, 1.0), Piece(0.4, 0.1)), start=0.0)


def of_transformers(make: Callable[..., Any], **how: Any) -> list[float]:
    """The factors of one of its schedules, step by step."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    factor = make(optimizer, **how).lr_lambdas[0]
    return [factor(step) for step in range(STEPS + 1)]


def by_step(factor: Schedule) -> list[float]:
    return [factor(step / STEPS) for step in range(STEPS + 1)]


def test_a_cosine_to_a_floor_is_that_of_transformers():
    theirs = of_transformers(
        optimization.get_cosine_with_min_lr_schedule_with_warmup,
        num_warmup_steps=WARMUP, num_training_steps=STEPS, min_lr_rate=0.1,
    )  # fmt: skip

    assert by_step(schedule("cosine", WARMUP / STEPS, 0.1)) == pytest.approx(theirs, abs=1e-9)


@pytest.mark.parametrize(
    ("shape", "decay_type"), [("linear", "linear"), ("cosine", "cosine"), ("one-minus-sqrt", "1-sqrt")]
)
def test_warm_up_stable_decay_is_that_of_transformers(shape: Any, decay_type: str):
    theirs = of_transformers(
        optimization.get_wsd_schedule,
        num_warmup_steps=WARMUP, num_decay_steps=DECAY, num_training_steps=STEPS, min_lr_ratio=0.1,
        decay_type=decay_type,
    )  # fmt: skip
    ours = warmup_stable_decay(WARMUP / STEPS, DECAY / STEPS, 0.1, shape=shape, start=0.1)

    assert by_step(ours) == pytest.approx(theirs, abs=1e-9)


def test_a_decay_that_is_cut_off_at_a_floor():
    """As Llama-3-SynE's script has it: max(0.1, (T - t) / (T - s T)) after a share s of the steps."""
    stable = 0.75

    def theirs(step: int) -> float:
        if step < WARMUP:
            return step / WARMUP
        return 1.0 if step < stable * STEPS else max(0.1, (STEPS - step) / (STEPS - stable * STEPS))

    cut = stable + 0.9 * (1 - stable)
    ours = chain((Piece(WARMUP / STEPS, 1.0), Piece(stable, 1.0), Piece(cut, 0.1), Piece(1.0, 0.1)), start=0.0)

    assert by_step(ours) == pytest.approx([theirs(step) for step in range(STEPS + 1)], abs=1e-12)


@pytest.mark.parametrize("shape", ["cosine", "inverse-sqrt"])
def test_an_infinite_schedule_is_that_of_the_paper(shape: Any):
    warmup, cooldown, constant = 0.1, 0.6, 0.55

    def theirs(n: float) -> float:
        if n < warmup:
            return n / warmup
        if n >= warmup + cooldown:
            return constant
        gone = (n - warmup) / cooldown
        if shape == "cosine":
            return constant + (1 - constant) / 2 * (1 + math.cos(math.pi * gone))
        return 1 + (constant - 1) / (1 / math.sqrt(11) - 1) * (1 / math.sqrt(1 + 10 * gone) - 1)

    ours = infinite(warmup, cooldown, constant, shape=shape)

    assert by_step(ours) == pytest.approx([theirs(step / STEPS) for step in range(STEPS + 1)], abs=1e-12)


def test_annealing_takes_up_where_an_infinite_schedule_is():
    ends, begins = infinite(0.1, 0.6, 0.55)(1.0), annealing(0.1, start=0.55)

    assert begins(0.0) == ends == 0.55
    assert [begins(share) for share in (0.5, 1.0)] == pytest.approx([math.sqrt(0.55 * 0.1), 0.1])


def test_without_a_cooldown_an_infinite_schedule_keeps_its_peak():
    assert [infinite(0.1, 0.0, 0.55)(share) for share in (0.1, 0.5, 1.0)] == [1, 1, 1]


SCHEDULES = {
    "linear": schedule("linear", 0.1),
    "cosine": schedule("cosine", 0.1, 0.1, start=0.2),
    "constant": schedule("constant", 0.1),
    "without a warm-up": schedule("cosine", 0.0, 0.1),
    "wsd": warmup_stable_decay(0.1, 0.25, 0.1),
    "wsd with a cosine": warmup_stable_decay(0.1, 0.25, 0.1, shape="cosine"),
    "infinite": infinite(0.1, 0.6, 0.55, shape="inverse-sqrt"),
    "annealing": annealing(0.01),
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_no_schedule_jumps_or_rises_after_its_warm_up(name: str):
    factors = [SCHEDULES[name](step / 10_000) for step in range(10_001)]
    steps = [after - before for before, after in itertools.pairwise(factors)]

    assert max(map(abs, steps)) < 2e-3
    assert all(step <= 0 for step in steps[1000:])
    assert all(0 <= factor <= 1 for factor in factors)


def test_parts_that_fill_the_run():
    assert [warmup_stable_decay(0.1, 0.9, 0.0)(share) for share in (0.1, 0.55, 1.0)] == pytest.approx([1, 0.5, 0])


@pytest.mark.parametrize("make", [lambda: warmup_stable_decay(0.6, 0.5, 0.1), lambda: infinite(0.5, 0.6, 0.5)])
def test_parts_that_are_longer_than_the_run(make: Callable[[], Schedule]):
    with pytest.raises(ValueError, match="a piece of the schedule ends at"):
        make()


def test_restarts_are_those_of_torch():
    parameter = torch.nn.Parameter(torch.zeros(()))
    theirs = CosineAnnealingWarmRestarts(torch.optim.SGD([parameter], lr=1.0), T_0=50, eta_min=0.1)
    factors = []
    for _ in range(100):
        factors.append(theirs.get_last_lr()[0])
        theirs.optimizer.step()
        theirs.step()

    ours = schedule("restarts", 0.0, 0.1)
    assert [ours(step / 100) for step in range(100)] == pytest.approx(factors)
    assert ours(1.0) == pytest.approx(0.1)
