"""How near a model is to a task that it has not learnt: how well its features tell the task's classes apart."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from overhaul import machine
from overhaul.interop.classifier import PENULTIMATE, classified
from overhaul.task_data import SCORED_AT_ONCE, Examples

EXAMPLES = 1000
"""Of a task, at most, drawn once for all models that are asked."""


@torch.no_grad()
def similarity(model: nn.Module, examples: Examples, *, dtype: torch.dtype, seed: int) -> float:
    """The share of examples whose class has the nearest mean, in the features below the head.

    Means are of one half of the examples and the share is of the other one. It asks nothing of the model's own head,
    whose classes may be others; the paper names no measure, so that this one is ours.

    Args:
        model: a classifier; it is left in evaluation mode.
        examples: of the task, at least two.
        dtype: of matrix products.
        seed: of the draw and the halves.
    """
    device = next(model.parameters()).device
    model.eval()
    drawn_N = np.random.default_rng(seed).permutation(len(examples))[:EXAMPLES]
    features = []
    for start in range(0, len(drawn_N), SCORED_AT_ONCE):
        batch = examples.batch(drawn_N[start : start + SCORED_AT_ONCE])
        with machine.autocast(device, dtype):
            made = classified(model, {name: tensor.to(device) for name, tensor in batch.items()}, (PENULTIMATE,))
        features.append(made.features[PENULTIMATE].float().cpu())
    return separability(torch.cat(features), torch.from_numpy(examples.labels_N[drawn_N]))


def separability(features_ND: Tensor, labels_N: Tensor) -> float:
    """The share of the second half's examples whose class has the nearest mean among those of the first half."""
    half = (len(labels_N) + 1) // 2
    classes_C, places_N = labels_N[:half].unique(return_inverse=True)
    sums_CD = torch.zeros(len(classes_C), features_ND.shape[1]).index_add_(0, places_N, features_ND[:half])
    means_CD = sums_CD / places_N.bincount()[:, None]
    nearest_N = classes_C[torch.cdist(features_ND[half:], means_CD).argmin(dim=1)]
    return float((nearest_N == labels_N[half:]).double().mean())
