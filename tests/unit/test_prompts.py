"""A model that writes prompts: the same ones for the same purpose and seed, others for another purpose."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from overhaul import artifact
from overhaul.bundle import Example
from overhaul.prompts import Writer
from overhaul.synthetic import Frame

SEEDS = (Example("sort 3 1 2 :", " 1 2 3"), Example("sort 9 8 :", " 8 9"))


@pytest.fixture(scope="module")
def made(tiny: Path) -> Any:
    return artifact.load(tiny)


def written(made: Any, purpose: Any, seed: int = 0) -> list[str]:
    writer = Writer(
        made.model, made.processor, SEEDS, Frame("sort ", " :"), longest=40, purpose=purpose, seed=seed,
        temperature=1.0, top_p=0.95, dtype=torch.float32,
    )  # fmt: skip
    return writer.several(40, budget=80)


def test_a_transfer_does_not_write_again_what_the_judge_learnt_to_refuse(made: Any):
    refused, new = written(made, "bundle"), written(made, "transfer")

    assert min(len(refused), len(new)) >= 20
    assert set(refused).isdisjoint(new)


def test_the_same_purpose_and_seed_write_the_same(made: Any):
    first, again, other = written(made, "transfer"), written(made, "transfer"), written(made, "transfer", seed=1)

    assert first == again
    assert set(first).isdisjoint(other)
