"""Recovery in closed form, and curves out of a history."""

import math
from dataclasses import replace

import pytest

from overhaul.report.facts import curves_of_history, recovery
from overhaul.table import Span

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


def test_a_loss_is_of_one_of_what_was_counted() -> None:
    assert curves_of_history(history(5))[0].y_label == "loss (nats per token)"
    assert curves_of_history(history(5), unit="images")[0].y_label == "loss (nats per image)"


def test_terms_are_drawn_when_there_are_several() -> None:
    points = [{"step": 1, "loss": 3.0, "loss/ce": 2.0, "loss/distill": 1.0}, {"step": 2, "loss": 2.0}]

    curves = curves_of_history(points)

    assert [(curve.name, curve.x) for curve in curves] == [
        ("loss", (1, 2)),
        ("loss/ce", (1,)),
        ("loss/distill", (1,)),
    ]
    assert len({curve.y_label for curve in curves}) == 1


WATCHED = [
    {"step": 1, "tokens": 100, "loss": 3.0, "lr": 1e-3, "grad_norm": 1.0},
    {"step": 2, "tokens": 200, "loss": 2.0, "lr": 2e-3, "grad_norm": 1.0, "perplexity": math.e**2, "held-out/old": 4.5},
    {"step": 3, "tokens": 300, "loss": 2.0, "lr": 1e-3, "grad_norm": 1.0, "perplexity": math.e, "held-out/old": 4.25},
]


def test_watched_text_stands_beside_the_new_one_over_tokens_from_before_the_first_step() -> None:
    new, old, *others = curves_of_history(WATCHED, before={"new": 3.0, "old": 4.0}, judged="new")

    assert (new.name, new.x, new.y) == ("new", (0, 200, 300), (3.0, pytest.approx(2.0), pytest.approx(1.0)))
    assert (old.name, old.x, old.y) == ("old", (0, 200, 300), (4.0, 4.5, 4.25))
    assert new.y_label == old.y_label == "held-out loss (nats per token)"
    assert [(curve.name, curve.x) for curve in others] == [
        (name, (100, 200, 300)) for name in ("loss", "lr", "grad_norm")
    ]
    assert {curve.x_label for curve in (new, old, *others)} == {"tokens trained on"}


def test_the_depth_of_a_gap_is_marked_where_it_is_deepest() -> None:
    new, old, *_ = curves_of_history(WATCHED, before={"new": 3.0, "old": 4.0}, judged="new")

    assert old.spans == (Span(x=200, low=4.0, high=4.5, text="+0.500"),)
    assert old.title == "old rises by 0.500 until 200 tokens, ends 0.250 higher"
    assert new.spans == ()
    assert new.title == "new ends 2.000 lower"


def test_a_change_that_no_decimal_shows_is_neither_a_gap_nor_an_end_elsewhere() -> None:
    points = [WATCHED[0], WATCHED[1] | {"held-out/old": 4.0004}, WATCHED[2] | {"held-out/old": 3.9996}]

    _, old, *_ = curves_of_history(points, before={"new": 3.0, "old": 4.0}, judged="new")

    assert (old.spans, old.title) == ((), "old ends where it began")


def test_without_losses_before_the_curves_begin_where_they_were_taken_and_nothing_is_marked() -> None:
    new, old, *_ = curves_of_history(WATCHED, judged="new")

    assert new.x == old.x == (200, 300)
    assert (old.spans, old.title) == ((), "")


def test_a_text_that_is_judged_and_watched_is_drawn_once() -> None:
    names = [curve.name for curve in curves_of_history(WATCHED, before={"old": 4.0}, judged="old")]

    assert names == ["old", "loss", "lr", "grad_norm"]


def test_whole_texts_have_a_figure_of_their_own() -> None:
    points = [WATCHED[0], *(point | {"whole/a (to forget)": 5.0} for point in WATCHED[1:])]
    curves = curves_of_history(points, before={"new": 3.0, "a (to forget)": 1.0}, judged="new")

    labels = {curve.name: curve.y_label for curve in curves[:3]}
    assert labels["a (to forget)"] == "loss on whole texts (nats per token)"
    assert labels["new"] == labels["old"] == "held-out loss (nats per token)"


def test_where_nothing_else_is_watched_perplexity_is_drawn_over_steps() -> None:
    points = [{key: number for key, number in point.items() if key != "held-out/old"} for point in WATCHED]

    curves = curves_of_history(points, before={"new": 3.0}, judged="new")

    assert [(curve.name, curve.x_label) for curve in curves] == [
        (name, "step") for name in ("loss", "perplexity", "lr", "grad_norm")
    ]


def test_a_loss_that_is_not_finite_is_no_gap() -> None:
    points = [WATCHED[0], WATCHED[1] | {"held-out/old": math.inf}]

    _, old, *_ = curves_of_history(points, before={"new": 3.0, "old": 4.0}, judged="new")

    assert old.spans == ()
