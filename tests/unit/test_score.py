"""Scores read metrics and weights, and refuse what is neither."""

from __future__ import annotations

import pytest

from overhaul.errors import UserError
from overhaul.score import Score
from overhaul.table import Row


def row(metric: str, value: float) -> Row:
    return Row(model="m", metric=metric, value=value, low=value, high=value, count=1)


def test_a_score_is_a_metric_or_a_weighted_sum():
    metrics = {"perplexity": row("perplexity", 8.0), "loss on a": row("loss on a", 2.0)}

    assert Score.of("perplexity").value(metrics) == 8
    assert Score.of("0.5*perplexity + 3 * loss on a").value(metrics) == 10
    assert Score.of("perplexity + loss on a").value(metrics) == 10
    assert Score.of("loss on b").value(metrics) is None


def test_the_weight_ends_at_the_first_star():
    assert Score.of("2*loss on a*b").terms == ((2.0, "loss on a*b"),)


def test_a_name_may_begin_as_a_weight_does_not():
    # Names of texts may have any letters: nothing will measure these.
    assert Score.of("x2*").metrics == ("x2*",)
    assert Score.of("nan*loss on a").metrics == ("nan*loss on a",)


@pytest.mark.parametrize("text", ["", "-1*perplexity", "0*perplexity", "1.2.3*perplexity", "0.5*", "0.5"])
def test_a_score_that_is_none(text: str):
    with pytest.raises(UserError, match="is no metric"):
        Score.of(text)
