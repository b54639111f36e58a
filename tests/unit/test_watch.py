"""The best of several passes, and the last good one of a run that diverges: kept to the bit, and resumed as it was."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from overhaul.adapt.full import Full
from overhaul.checkpoint import trained_tensors
from overhaul.errors import Diverged
from overhaul.journal import recording
from overhaul.method import Training
from overhaul.objective import Batch, Forward, Term
from overhaul.stream import Batch as Batched
from overhaul.stream import Repeat, Rows
from overhaul.train import Plan, train
from overhaul.watch import KeepBest, LastGood, Watcher


class Walk(nn.Module):
    """A point that every step moves on by one, and how often it was."""

    def __init__(self) -> None:
        super().__init__()
        self.at = nn.Parameter(torch.zeros(()))
        self.register_buffer("moves", torch.zeros((), dtype=torch.long))
        self.rests = nn.BatchNorm2d(1).requires_grad_(False)


class Slope(Term):
    name = "slope"

    def total(self, forward: Forward, batch: Batch) -> Tensor:
        model: Any = forward.model
        model.moves += 1
        return -model.at * len(batch["labels"])

    def count(self, batch: Batch) -> int:
        return len(batch["labels"])


def walk(scores: list[float], *, steps: int, every: int = 2, patience: int | None = None, **more: Any) -> Plan:
    """Of which the passes are as good as `scores` says, asked in evaluation mode."""
    model, rows = Walk(), Rows([{"labels": torch.zeros(())}], name="rows", fingerprint="0" * 8)
    at = lambda place: scores[-(-place // every) - 1]  # noqa: E731 - of the pass that the point is at the end of

    def score(model: Any) -> float:
        assert not model.training
        return at(round(model.at.item()))

    best = KeepBest(score, trained_tensors, every=every, steps=steps, patience=patience)
    return Plan(
        model=model, objective=Slope(), stream=Batched(Repeat(rows), batch_size=1), steps=steps,
        optimizer=torch.optim.SGD([model.at], lr=1.0), watchers=(best, *more.get("watchers", ())),
    )  # fmt: skip


def told(plan: Plan) -> tuple[int, int, list[float]]:
    """Where the point is, how often it had moved by then, and the scores that were seen."""
    model: Any = plan.model
    (best, *_) = plan.watchers
    assert isinstance(best, KeepBest)
    return round(model.at.item()), int(model.moves), best.scores


SETTINGS: Training = Full(steps=1, clip=0)


@pytest.mark.parametrize(
    ("scores", "steps", "patience", "place", "passes"),
    [
        ([0.1, 0.2, 0.3], 6, None, 6, 3),
        ([0.1, 0.3, 0.2], 6, None, 4, 3),
        ([0.3, 0.3, 0.3], 6, None, 2, 3),
        ([0.1, 0.2, 0.3], 5, None, 5, 3),  # the last pass is not whole
        ([0.2, 0.1, 0.1, 0.3], 8, 2, 2, 3),
        ([0.2, 0.1, 0.3, 0.1], 8, 2, 6, 4),
        ([0.2, 0.1, 0.3, 0.1], 8, 1, 2, 2),
    ],
)
def test_the_first_best_pass_is_kept_with_its_buffers(
    scores: list[float], steps: int, patience: int | None, place: int, passes: int
):
    plan = walk(scores, steps=steps, patience=patience)

    history = train(plan, SETTINGS, quiet=True)

    assert told(plan) == (place, place, scores[:passes])
    assert len(history.points) == min(2 * passes, steps)


def test_modules_that_rest_still_do_after_a_look():
    plan = walk([0.1, 0.2], steps=4)
    model: Any = plan.model
    model.train()
    model.rests.eval()
    model.at.data += 2

    plan.watchers[0].step(model, 2)

    assert model.training
    assert not model.rests.training


@pytest.mark.parametrize("patience", [None, 1])
@pytest.mark.parametrize("last", [1, 3, 4, 5, 6])
def test_a_run_that_was_cut_off_ends_as_the_whole_one(last: int, patience: int | None, tmp_path: Path):
    how: dict[str, Any] = {"scores": [0.1, 0.3, 0.2, 0.2], "steps": 8, "patience": patience}
    whole = walk(**how)
    history = train(whole, SETTINGS, quiet=True)
    settings = SETTINGS.model_copy(update={"save_every": 1})

    class Cut(Exception): ...

    class Cuts(Watcher):
        def step(self, model: nn.Module, step: int) -> None:
            if step > last:
                raise Cut

    with contextlib.suppress(Cut):  # after step 6 it may be over already
        train(walk(**how, watchers=(Cuts(),)), settings, state_dir=tmp_path, quiet=True)
    for _ in range(2):  # the second time all is done
        resumed = walk(**how, watchers=(Watcher(),))
        again = train(resumed, settings, state_dir=tmp_path, resume=True, goes_on=True, quiet=True)

        assert told(resumed) == told(whole)
        assert len(again.points) == len(history.points)


FAR = 1.2e38
"""Three times as far is no fp32 number any more: the weights are not after step 3, the loss is not in step 4."""


def leap(*, steps: int, every: int, cut: int | None = None) -> Plan:
    """Every step goes `FAR`; passes have `every` steps."""

    class Cuts(Watcher):
        def step(self, model: nn.Module, step: int) -> None:
            if step == cut:
                raise KeyboardInterrupt

    model, rows = Walk(), Rows([{"labels": torch.zeros(())}], name="rows", fingerprint="0" * 8)
    good = LastGood(trained_tensors, ends_pass=lambda step: not step % every)
    return Plan(
        model=model, objective=Slope(), stream=Batched(Repeat(rows), batch_size=1), steps=steps,
        optimizer=torch.optim.SGD([model.at], lr=FAR), watchers=(good, Cuts()),
    )  # fmt: skip


def leapt(plan: Plan) -> tuple[float, int]:
    model: Any = plan.model
    return model.at.item(), int(model.moves)


@pytest.mark.parametrize(("steps", "every", "at"), [(9, 1, 2), (9, 2, 2), (3, 1, 2), (3, 2, 2), (2, 1, 2), (1, 1, 1)])
def test_where_training_diverges_the_last_good_weights_are_put_back(steps: int, every: int, at: int):
    plan = leap(steps=steps, every=every)

    with recording() as notes:
        history = train(plan, SETTINGS, quiet=True)

    assert leapt(plan) == (pytest.approx(at * FAR), at)
    assert len(history.points) == min(steps, 3)
    assert [table.rows for table in notes.tables] == ([(("4", "2"),)] if steps > 2 else [])
    assert (history.points[-1].get("diverged"), history.points[-1].get("weights_of")) == (
        (4, 2) if steps == 9 else (None, None)
    )


@pytest.mark.parametrize("every", [3, 4, 9])
def test_where_no_pass_was_good_it_is_an_error_that_names_the_rate(every: int):
    with pytest.raises(Diverged, match=r"not finite at step 4.*(\n.*)*a lower --lr"):
        train(leap(steps=9, every=every), SETTINGS, quiet=True)


@pytest.mark.parametrize("every", [1, 2])
@pytest.mark.parametrize("cut", [2, 3])
def test_a_run_that_was_cut_off_diverges_to_the_same_weights(cut: int, every: int, tmp_path: Path):
    settings = SETTINGS.model_copy(update={"save_every": 1})
    with contextlib.suppress(KeyboardInterrupt):
        train(leap(steps=9, every=every, cut=cut), settings, state_dir=tmp_path, quiet=True)

    plan = leap(steps=9, every=every)
    history = train(plan, settings, state_dir=tmp_path, resume=True, quiet=True)

    assert leapt(plan) == (pytest.approx(2 * FAR), 2)
    assert history.points[-1]["weights_of"] == 2
