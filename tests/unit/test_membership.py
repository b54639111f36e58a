"""Telling what a model was trained on: known values, and other libraries on the same numbers."""

from __future__ import annotations

import zlib

import numpy as np
import pytest

from overhaul.errors import UserError
from overhaul.membership import auc, bounds, loss_by_zlib, min_k, priv_leak, resampled_auc, scores


def test_min_k_is_the_mean_of_the_lowest_share():
    log_probs = -np.array([1.0, 5.0, 2.0, 8.0, 3.0, 0.5, 4.0])  # floor(0.4 * 7) = 2

    assert min_k(log_probs, 0.4) == pytest.approx((8 + 5) / 2)
    assert min_k(log_probs, 1.0) == pytest.approx(-log_probs.mean())
    assert min_k(log_probs, 0.05) == 8, "of a short text one token at least"


def test_auc_is_sklearns():
    metrics = pytest.importorskip("sklearn.metrics")
    dice = np.random.default_rng(0)
    for ties in (False, True):
        seen, unseen = dice.normal(0, 1, 40), dice.normal(0.5, 1, 30)
        if ties:
            seen, unseen = seen.round(), unseen.round()
        # MUSE's convention: seen 0, not seen 1, and decided by the score with the sign turned.
        wanted = metrics.roc_auc_score([0] * 40 + [1] * 30, -np.concatenate([seen, unseen]))
        assert auc(seen, unseen) == pytest.approx(wanted, abs=1e-15)


def test_texts_known_by_heart_have_an_auc_of_0_and_leak_all():
    assert auc([0.1, 0.2], [3.0, 4.0]) == 0.0, "what was seen is likelier"
    assert auc([3.0, 4.0], [0.1, 0.2]) == 1.0, "what was seen has been unlearnt too far"
    assert priv_leak(0.0, 0.4772) == -100
    assert priv_leak(0.4772, 0.4772) == 0


def test_the_bounds_are_those_of_the_paper():
    assert [round(bound, 2) for bound in bounds(0.4772)] == [-100.0, 109.56]  # news
    assert [round(bound, 1) for bound in bounds(0.5393)] == [-100.0, 85.4]  # books


def test_the_order_of_texts_changes_nothing_and_draws_are_paired():
    dice = np.random.default_rng(0)
    seen, unseen = dice.normal(0, 1, 50), dice.normal(0.3, 1, 50)

    assert auc(seen, unseen) == pytest.approx(auc(dice.permutation(seen), dice.permutation(unseen)), abs=1e-15)
    drawn = resampled_auc(seen, unseen, draws=200)
    assert np.array_equal(drawn, resampled_auc(seen, unseen, draws=200))
    assert np.array_equal(drawn, resampled_auc(seen * 2, unseen * 2, draws=200)), "the same texts are drawn"
    assert drawn.std() == pytest.approx(0.057, abs=0.01)  # Hanley and McNeil's is 0.056
    assert drawn.mean() == pytest.approx(auc(seen, unseen), abs=0.01)


def test_all_scores_of_one_text():
    own, lowered, text = -np.array([1.0, 3.0]), -np.array([2.0, 6.0]), "Bert has a lamp"
    found = {name: score(own, lowered, text) for name, score in scores().items()}

    assert found["loss"] == 2.0
    assert found["loss/lowercase"] == 0.5
    assert found["loss/zlib"] == 2.0 / len(zlib.compress(text.encode())) == loss_by_zlib(own, text)
    assert found["min-5%"] == found["min-40%"] == 3.0
    assert len(found) == 10


def test_bad_input_is_one_clear_error():
    with pytest.raises(UserError, match="the AUC of the retrained model is 0"):
        priv_leak(0.5, 0.0)
    with pytest.raises(UserError, match="one has none"):
        auc([], [1.0])
    with pytest.raises(UserError, match="not finite"):
        auc([float("nan")], [1.0])
