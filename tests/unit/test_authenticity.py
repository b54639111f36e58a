"""The judge of prompts: what it is trained on, and what its scores are worth."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from overhaul import artifact, authenticity
from overhaul.objective import CrossEntropy, Forward
from overhaul.stream import IGNORED


@pytest.mark.parametrize(
    ("real", "written", "area"),
    [([0.9, 0.8], [0.1, 0.2], 1.0), ([0.1], [0.9], 0.0), ([0.5, 0.5], [0.5], 0.5), ([0.9, 0.3], [0.5, 0.1], 0.75)],
)
def test_auroc_counts_pairs(real: list[float], written: list[float], area: float):
    assert authenticity.auroc(np.array(real), np.array(written)) == pytest.approx(area)


@pytest.mark.parametrize(
    ("real", "written", "threshold"),
    [([0.9, 0.8], [0.1, 0.2], 0.5), ([0.4, 0.3], [0.1, 0.2], 0.25), ([0.9, 0.95], [0.7, 0.8], 0.85)],
)
def test_the_threshold_parts_the_two_and_is_a_half_where_that_is_right(
    real: list[float], written: list[float], threshold: float
):
    assert authenticity.best_threshold(np.array(real), np.array(written)) == pytest.approx(threshold)


def test_only_the_answer_is_trained_on_and_the_loss_is_that_of_ignored_labels(tiny: Path):
    made = artifact.load(tiny)
    batch = next(authenticity.judging(made.processor, ["2 1", "3 9 1"], ["x", "y y y"], batch_size=4, seed=0))
    trained = [ids[labels != IGNORED] for ids, labels in zip(batch["input_ids"], batch["labels"], strict=True)]

    assert sorted(map(made.processor.decode, trained)) == [" no", " no", " yes", " yes"]
    total = CrossEntropy().total(Forward(made.model, batch), batch)
    logits_BTV = made.model(batch["input_ids"]).logits[:, :-1]
    expected = torch.nn.functional.cross_entropy(
        logits_BTV.flatten(0, 1), batch["labels"][:, 1:].flatten(), ignore_index=IGNORED, reduction="sum"
    )
    torch.testing.assert_close(total, expected)


def test_a_score_is_yes_against_no(tiny: Path):
    made = artifact.load(tiny)
    asked = authenticity.QUESTION.format(prompt="2 1")

    def likelihood(answer: str) -> float:
        ids_1T = torch.tensor([made.processor(asked + answer)["input_ids"]])
        begun = len(made.processor(asked)["input_ids"])
        logs_TV = made.model(ids_1T).logits[0].log_softmax(-1)
        return float(sum(logs_TV[place - 1, ids_1T[0, place]] for place in range(begun, ids_1T.shape[1])))

    with torch.no_grad():
        yes, no = likelihood(" yes"), likelihood(" no")
    (score,) = authenticity.scores(made.model, made.processor, ["2 1"])
    assert score == pytest.approx(1 / (1 + np.exp(no - yes)), rel=1e-4)
