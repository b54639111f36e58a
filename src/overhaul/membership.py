"""How well the texts a model was trained on can be told from others by what it says of them.

    Min-K% Prob   s(x) = -mean of the lowest floor(K T) log-probabilities of x's tokens, the first one left out
    AUC           P(a text that was not seen has a smaller s than one that was)
    PrivLeak      100 (AUC - AUC_retrain) / AUC_retrain

A model that knows the texts to forget by heart has an AUC near 0 against texts it never saw and leaks -100; one in
which they are less likely than texts never seen has unlearnt too much, which tells them just as well (Shi et al.: MUSE,
ICLR 2025; Min-K%: Shi et al.: Detecting Pretraining Data from Large Language Models, ICLR 2024).

Shapes: N texts, T tokens that are predicted.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from overhaul.errors import UserError

Floats = NDArray[np.float64]

SHARES = (0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6)
"""K of Min-K%: MUSE's figure is that of 0.4, the others are told beside."""
CHOSEN = 0.4


def min_k(log_probs_T: Floats, share: float) -> float:
    """Min-K% Prob of one text, in nats: the larger, the less likely its unlikeliest tokens are.

    Of a text of fewer than 1 / share tokens the unlikeliest one is taken, where the published code divides by 0.

    Args:
        log_probs_T: of its tokens after the first, at least one.
        share: K, above 0 and at most 1.
    """
    count = max(1, int(share * len(log_probs_T)))
    return float(-np.sort(log_probs_T)[:count].mean())


def loss(log_probs_T: Floats) -> float:
    """Nats a token."""
    return float(-log_probs_T.mean())


def loss_by_zlib(log_probs_T: Floats, text: str) -> float:
    """The loss over the bytes that zlib makes of the text: what is unlikely because it is intricate counts less."""
    return loss(log_probs_T) / len(zlib.compress(text.encode("utf-8", "surrogatepass")))


def loss_by_lower(log_probs_T: Floats, lowered_T: Floats) -> float:
    """The loss over that of the text in lower case."""
    return loss(log_probs_T) / max(loss(lowered_T), 1e-12)


def auc(seen_N: Sequence[float], unseen_N: Sequence[float]) -> float:
    """P(an unseen text is likelier than a seen one), ties counted half, by scores that are larger the less likely.

    0.5 where nothing can be told, 0 where every seen text is likelier than every unseen one.

    Raises:
        UserError: one side has no text, or a score is not finite.
    """
    from scipy.stats import rankdata

    if not len(seen_N) or not len(unseen_N):
        raise UserError("an AUC needs texts of both kinds: one has none")
    both = -np.concatenate([np.asarray(unseen_N, np.float64), np.asarray(seen_N, np.float64)])
    if not np.isfinite(both).all():
        raise UserError("a text's score is not finite: the model's predictions are not numbers any more")
    ranks = rankdata(both)
    count = len(unseen_N)
    return float((ranks[:count].sum() - count * (count + 1) / 2) / (count * len(seen_N)))


def priv_leak(found: float, retrained: float) -> float:
    """PrivLeak in percent.

    Args:
        found: AUC of the model.
        retrained: of one that never saw the texts to forget.

    Raises:
        UserError: the latter is 0: it tells the texts perfectly, and there is no ratio.
    """
    if retrained <= 0:
        raise UserError(
            "the AUC of the retrained model is 0: it knows every text to forget better than every held-out one",
            allowed="a model that was trained without the texts to forget, and held-out texts of the same kind",
        )
    return 100 * (found - retrained) / retrained


def bounds(retrained: float) -> tuple[float, float]:
    """What PrivLeak can be at all, in percent: at AUC 0, and at AUC 1, where a method is saturated, not better."""
    return priv_leak(0.0, retrained), priv_leak(1.0, retrained)


def resampled_auc(
    seen_N: Sequence[float], unseen_N: Sequence[float], *, draws: int = 500, seed: int = 0
) -> NDArray[np.float64]:
    """`(draws,)` AUCs of texts drawn again with replacement, each kind by itself; the same seed draws the same texts.

    Models that are compared on the same texts are drawn alike, so that a ratio of two has the interval it should have.
    """
    dice = np.random.default_rng(seed)
    seen, unseen = np.asarray(seen_N, np.float64), np.asarray(unseen_N, np.float64)
    picks = [(dice.integers(0, len(seen), len(seen)), dice.integers(0, len(unseen), len(unseen))) for _ in range(draws)]
    return np.array([auc(seen[one].tolist(), unseen[other].tolist()) for one, other in picks])


Score = Callable[[Floats, Floats, str], float]
"""Of the log-probabilities of a text, those of it in lower case, and the text."""


def scores() -> Mapping[str, Score]:
    """All scores by name, MUSE's own among them."""
    by_share: dict[str, Score] = {
        f"min-{share:.0%}": lambda own_T, _lowered_T, _text, share=share: min_k(own_T, share) for share in SHARES
    }
    return {
        **by_share,
        "loss": lambda own_T, _lowered_T, _text: loss(own_T),
        "loss/lowercase": lambda own_T, lowered_T, _text: loss_by_lower(own_T, lowered_T),
        "loss/zlib": lambda own_T, _lowered_T, text: loss_by_zlib(own_T, text),
    }
