"""Which task an example is of, where nobody says so: each task's model is asked how much it doubts.

Letters of shapes: N examples, C classes, T tokens, V words.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy


def entropies(logits_NC: Tensor, temperature: float = 1.0) -> Tensor:
    """`(N,)` entropy of each prediction as a share of the largest there is, so that heads of any width compare.

    Args:
        logits_NC: of one task's classes. A head of one class never doubts: it is given a whole doubt instead.
        temperature: that logits are divided by.

    Returns:
        From 0 to 1.
    """
    classes = logits_NC.shape[1]
    if classes == 1:
        return torch.ones(len(logits_NC))
    log_p = (logits_NC.double() / temperature).log_softmax(dim=1)
    return (-(log_p.exp() * log_p).sum(dim=1) / math.log(classes)).float()


def over_views(plain_NC: Tensor, views: Iterable[Tensor], copies: int = 1) -> Tensor:
    """`(N, C)` mean logits over an example's views (Roy et al., 2023): means of logits, not of probabilities.

    Args:
        plain_NC: of the examples as they are.
        views: `(N, C)` of each of their other views, such as augmented ones.
        copies: how often the examples as they are count; without views they are all there is.
    """
    # As differences from it: views that are no different leave the plain logits as they are, to the bit.
    total_NC, count = torch.zeros_like(plain_NC, dtype=torch.float64), copies
    for view_NC in views:
        total_NC += view_NC.double() - plain_NC
        count += 1
    return (plain_NC + total_NC / count).to(plain_NC.dtype)


@dataclass(frozen=True, slots=True, kw_only=True)
class Telling:
    """How the task of a text is told.

    Attributes:
        by: the mean entropy of the next token, or the mean loss on it.
        tokens: of a text that are looked at, its first ones.
        views: further readings of a text, each without some of its tokens.
        left_out: share of the tokens that a view is without.
        plain_views: how often the text as it is counts among its views.
        temperature: that logits are divided by.
    """

    by: Literal["entropy", "loss"] = "entropy"
    tokens: int = 64
    views: int = 0
    left_out: float = 0.1
    plain_views: int = 6
    temperature: float = 1.0


def kept(count: int, left_out: float, view: int) -> Tensor:
    """Places of the tokens that a view of a text keeps, in order; the first one is always among them.

    Args:
        count: tokens of the text.
        left_out: share that is dropped, each by itself.
        view: which one; a view drops the same places of every text as long as this one.
    """
    dice = torch.Generator().manual_seed(view)
    stays_T = torch.rand(count, generator=dice) >= left_out
    stays_T[0] = True
    return stays_T.nonzero()[:, 0]


def doubt_of_text(plain_TV: Tensor, views: Iterable[tuple[Tensor, Tensor]], ids_T: Tensor, how: Telling) -> float:
    """How much a model doubts a text: mean entropy of what follows each token, or mean loss on it.

    Logits are averaged over views as those of images are. At tokens that a view is without it counts as the plain text.

    Args:
        plain_TV: logits after each token.
        views: of each view the places of its tokens, `(K,)`, and the logits after them, `(K, V)`.
        ids_T: the tokens. Of a single one nothing is predicted: it is told by entropy.
        how: of it.
    """

    def in_place(places_K: Tensor, logits_KV: Tensor) -> Tensor:
        return plain_TV.index_copy(0, places_K, logits_KV)

    logits_TV = over_views(plain_TV, (in_place(*view) for view in views), how.plain_views)
    if how.by == "entropy" or len(ids_T) == 1:
        return float(entropies(logits_TV, how.temperature).mean())
    return float(cross_entropy(logits_TV[:-1].double() / how.temperature, ids_T[1:]))
