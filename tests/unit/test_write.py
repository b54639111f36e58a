"""What a run's record and report are made of."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from overhaul.report.facts import Facts
from overhaul.table import Row
from overhaul.write import losses_before


def row(metric: str, value: float) -> Row:
    return Row(model="m", metric=metric, value=value, low=value, high=value, count=100)


PARENT = Facts(
    label="dense",
    path="m",
    parameters=1,
    perplexity=row("perplexity", math.e**3),
    corpus="new",
    metrics=(row("bits per byte", 9.0), row("loss on old", 4.0), row("loss on C: text", 5.0)),
)
FIRST = replace(PARENT, perplexity=row("perplexity", 99.0), metrics=())


def test_losses_before_a_step_are_those_of_the_model_it_was_made_from():
    assert losses_before([FIRST, PARENT, PARENT]) == {"new": pytest.approx(3.0), "old": 4.0, "C: text": 5.0}


def test_without_a_parent_or_on_another_text_there_are_none():
    assert losses_before([PARENT]) == {}
    assert losses_before([PARENT, replace(PARENT, corpus="other")]) == {"old": 4.0, "C: text": 5.0}
    assert losses_before([replace(PARENT, perplexity=None, metrics=()), PARENT]) == {}
