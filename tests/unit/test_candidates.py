"""Candidates are tried one after the other, and the one with the least loss after its training is the result."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from overhaul import artifact, candidates, importance, journal
from overhaul.candidates import Candidate, ShortDistillation, note, try_each
from overhaul.corpora import CorpusSpec, open_corpus
from overhaul.cut import cut
from overhaul.data import Data
from overhaul.errors import Diverged, UserError
from overhaul.interop import decoder
from overhaul.shapes import Shape
from overhaul.workspace import Workspace

WIDE = Shape(layers=2, hidden=64, ffn=96, heads=4, kv_groups=2)
SHALLOW = Shape(layers=1, hidden=64, ffn=128, heads=4, kv_groups=2)


@pytest.fixture
def teacher(tiny: Path) -> nn.Module:
    return artifact.load(tiny).model


@pytest.fixture
def work(tiny: Path) -> Workspace:
    data = Data(open_corpus(CorpusSpec(path="sample")), artifact.load(tiny).processor)
    return Workspace(data=data, dtype=torch.float32, path=tiny, weights_sha256="")


@pytest.fixture
def make(teacher: nn.Module, work: Workspace) -> Callable[[Shape], nn.Module]:
    scores = importance.score(teacher, work.data.calibration(samples=4, seq_len=32))
    source = decoder.find(teacher).shape

    def cut_to(shape: Shape) -> nn.Module:
        return cut(teacher, importance.choose(scores, source, shape, torch.arange(shape.layers)))

    return cut_to


def short(teacher: nn.Module, **settings: object) -> ShortDistillation:
    given = {"teacher": teacher, "steps": 3, "batch_size": 2, "seq_len": 32, "lr": 1e-2}
    return ShortDistillation.model_validate(given | settings)


def test_the_result_is_the_trained_candidate_with_the_least_loss(teacher: nn.Module, work: Workspace, make):
    windows_NT = work.data.windows("calib", seq_len=32, limit=4)
    architecture = decoder.find(teacher).architecture
    before = copy.deepcopy(teacher.state_dict())

    with journal.recording() as notes:
        best, tried = try_each([WIDE, SHALLOW], make, work, short(teacher), architecture, windows_NT)

    assert [one.shape for one in tried] == [WIDE, SHALLOW]
    winner = min(tried, key=lambda one: one.trained_loss)
    assert decoder.find(best).shape == winner.shape
    assert candidates.loss(best, windows_NT, torch.float32) == winner.trained_loss
    assert all(one.trained_loss != one.cut_loss for one in tried)
    assert tried[0].cut_loss == candidates.loss(make(WIDE), windows_NT, torch.float32)
    assert tried[0].parameters == sum(p.numel() for p in make(WIDE).parameters())
    assert notes.num_tokens == 2 * 3 * 2 * 32
    assert all(torch.equal(tensor, before[name]) for name, tensor in teacher.state_dict().items())


def test_a_candidate_whose_training_diverges_is_not_the_best(teacher: nn.Module, work: Workspace, make, monkeypatch):
    windows_NT = work.data.windows("calib", seq_len=32, limit=2)
    train = Workspace.train

    def diverges_once(self: Workspace, plan: Any, settings: Any) -> Any:
        monkeypatch.setattr(Workspace, "train", train)
        raise Diverged("the loss is not finite at step 2")

    monkeypatch.setattr(Workspace, "train", diverges_once)
    with journal.recording() as notes:
        best, tried = try_each(
            [WIDE, SHALLOW], make, work, short(teacher), decoder.find(teacher).architecture, windows_NT
        )
        note(tried, 3)

    assert decoder.find(best).shape == SHALLOW
    assert math.isinf(tried[0].trained_loss)
    assert notes.tables[0].title.startswith(str(SHALLOW))


def test_if_all_diverge_the_search_says_so(teacher: nn.Module, work: Workspace, make):
    windows_NT = work.data.windows("calib", seq_len=32, limit=2)

    with journal.recording(), pytest.raises(UserError, match="all 1 candidates diverged"):
        try_each([WIDE], make, work, short(teacher, lr=1e9, steps=12), decoder.find(teacher).architecture, windows_NT)


def test_training_follows_the_original(teacher: nn.Module, work: Workspace, make):
    student = make(WIDE)
    settings = short(teacher, steps=30, batch_size=4, lr=1e-4)
    ids_BT = work.data.windows("calib", seq_len=32, limit=4)

    def distance() -> float:
        with torch.no_grad():
            own, theirs = student(ids_BT).logits, teacher(ids_BT).logits
        return float(
            nn.functional.kl_div(own.log_softmax(-1), theirs.log_softmax(-1), log_target=True, reduction="batchmean")
        )

    before = distance()
    work.train(settings.plan(student, work.data), settings)

    assert distance() < 0.95 * before


def test_the_table_puts_the_best_first_and_says_its_rank_after_the_cut():
    made = [
        Candidate(shape=WIDE, parameters=1000, cut_loss=3.0, trained_loss=2.5),
        Candidate(shape=SHALLOW, parameters=2000, cut_loss=4.0, trained_loss=2.25),
    ]

    with journal.recording() as notes:
        note(made, 50)

    (table,) = notes.tables
    assert table.title == f"{SHALLOW} is the best of 2 shapes of this size"
    assert table.columns[-1] == "loss after 50 steps"
    assert table.rows == (
        ("1", str(SHALLOW), "2,000", "4.000", "2", "2.250"),
        ("2", str(WIDE), "1,000", "3.000", "1", "2.500"),
    )
