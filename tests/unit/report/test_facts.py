"""Recovery in closed form, and curves out of a history."""

import math
from dataclasses import replace

import pytest

from overhaul.report.facts import curves_of_history, recovery

from .examples import history, perplexity, three_facts


def test_half_of_the_log_gap_is_the_geometric_mean() -> None:
    dense, pruned, won_back = three_facts()
    assert dense.perplexity
    assert pruned.perplexity
    middle = math.sqrt(dense.perplexity.value * pruned.perplexity.value)

    gap = recovery((dense, pruned, replace(won_back, perplexity=perplexity("m", middle))))

    assert gap is not None
    assert dict(gap.shares) == {"pruned": 0.0, "won back": pytest.approx(0.5)}


def test_the_reference_itself_would_be_all_and_better_is_more() -> None:
    dense, pruned, won_back = three_facts()
    same = replace(won_back, label="same", perplexity=dense.perplexity)
    better = replace(won_back, label="better", perplexity=perplexity("m", 20.0))

    gap = recovery((dense, pruned, same, better))

    assert gap is not None
    shares = dict(gap.shares)
    assert shares["same"] == 1.0
    assert shares["better"] > 1.0


def test_no_recovery_where_nothing_was_lost_or_measured() -> None:
    dense, pruned, won_back = three_facts()

    assert recovery((dense,)) is None
    assert recovery((dense, pruned)) is None
    assert recovery((dense, replace(dense, label="copy"), replace(dense, label="other"))) is None
    assert recovery((replace(dense, perplexity=None), pruned, won_back)) is None


def test_an_infinite_perplexity_is_no_end_of_the_gap() -> None:
    dense, pruned, won_back = three_facts()
    broken = replace(pruned, label="broken", perplexity=perplexity("m", math.inf, spread=0))

    gap = recovery((dense, broken, pruned, won_back))

    assert gap is not None
    assert gap.worst is pruned


def test_a_history_becomes_one_curve_per_quantity() -> None:
    curves = curves_of_history(history(5))

    assert [curve.name for curve in curves] == ["loss", "lr", "grad_norm"]
    assert curves[0].x == (1, 2, 3, 4, 5)


def test_terms_are_drawn_when_there_are_several() -> None:
    points = [{"step": 1, "loss": 3.0, "loss/ce": 2.0, "loss/distill": 1.0}, {"step": 2, "loss": 2.0}]

    curves = curves_of_history(points)

    assert [(curve.name, curve.x) for curve in curves] == [
        ("loss", (1, 2)),
        ("loss/ce", (1,)),
        ("loss/distill", (1,)),
    ]
    assert len({curve.y_label for curve in curves}) == 1
