"""Keys that texts find increments by: grouped, masked while they are learnt (DTKR, Peng et al., ICLR 2024).

Letters of shapes: B texts, D numbers of a query, G groups of C numbers, P entries, K that are found.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity, normalize


class Found(NamedTuple):
    """What was found for each text.

    Attributes:
        entries_BK: places of the entries, the likest first.
        weights_BK: of each, which sum to 1, or to 0 where nothing is like the text.
        nearest_B: the largest similarity.
    """

    entries_BK: Tensor
    weights_BK: Tensor
    nearest_B: Tensor


def similarities(queries_BD: Tensor, keys_GPC: Tensor) -> Tensor:
    """`(B, G, P)`: cosines of each group of a query with that group of each key."""
    groups, _, width = keys_GPC.shape
    queries_BGC = queries_BD.view(len(queries_BD), groups, width)
    return cosine_similarity(queries_BGC[:, :, None, :], keys_GPC[None], dim=-1)


def find(
    queries_BD: Tensor, keys_GPC: Tensor, count: int, allowed_P: Tensor | None = None, unknown: float = 0.0
) -> Found:
    """The entries whose keys are the likest, by the mean over groups; similarities below 0 count as none.

    Args:
        queries_BD: of the texts.
        keys_GPC: of all entries.
        count: K, entries that are found for each.
        allowed_P: bool, which entries may be found; None for all.
        unknown: a text whose nearest key is less like it than this finds nothing: its weights are 0.

    Raises:
        ValueError: fewer than K may be found.
    """
    alike_BP = similarities(queries_BD, keys_GPC).mean(dim=1)
    if allowed_P is not None:
        alike_BP = alike_BP.masked_fill(~allowed_P, -torch.inf)
    if int(alike_BP.isfinite().sum(dim=1).min()) < count:
        raise ValueError(f"{count} entries are to be found among {alike_BP.shape[1]}")
    alike_BK, entries_BK = alike_BP.topk(count, dim=1)
    positive_BK = alike_BK.clamp_min(0)
    weights_BK = positive_BK / positive_BK.sum(dim=1, keepdim=True).clamp_min(1e-12)
    nearest_B = alike_BK[:, 0]
    return Found(entries_BK, weights_BK * (nearest_B >= unknown)[:, None], nearest_B)


def first_keys(queries_ND: Tensor, groups: int, entries: int) -> Tensor:
    """`(G, P, C)`: the mean queries of as many stripes of a task's texts, in their order, of norm 1 in each group.

    Args:
        queries_ND: of the texts; at least one for each entry.
        groups: G, which divides D.
        entries: P.
    """
    stripes = queries_ND.tensor_split(entries)
    keys_PGC = torch.stack([stripe.mean(dim=0).view(groups, -1) for stripe in stripes])
    return normalize(keys_PGC.transpose(0, 1), dim=-1).contiguous()


def pull(queries_BD: Tensor, keys_GPC: Tensor, count: int, masked: float) -> Tensor:
    """What keys are learnt by: the mean of `-cos` over the likest K of each group, summed over texts.

    Each similarity is left out of the choice with probability `masked`, so that not one key wins all texts.

    Args:
        queries_BD: of the texts.
        keys_GPC: with gradient.
        count: K.
        masked: from 0 to 1.
    """
    alike_BGP = similarities(queries_BD, keys_GPC)
    left_BGP = alike_BGP.detach().masked_fill(torch.rand_like(alike_BGP) < masked, -100.0)
    chosen_BGK = left_BGP.topk(count, dim=-1).indices
    return -alike_BGP.gather(-1, chosen_BGK).mean(dim=(1, 2)).sum()


class Keys(nn.Module):
    """The keys of one task while they are learnt."""

    def __init__(self, keys_GPC: Tensor) -> None:
        super().__init__()
        self.keys_GPC = nn.Parameter(keys_GPC)
