from __future__ import annotations

import copy
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from overhaul import artifact
from overhaul.drift import Moved, bottom_and_top, drift_of, of_blocks, relative, size_of_ends, start_bytes, start_of


def a_tensor(change: float, start: float, block: int | None = 0) -> Moved:
    return Moved(name="w", block=block, kind="w", category="mlp", count=1, change=change, start=start)


@pytest.fixture
def model(tiny: Path) -> nn.Module:
    return artifact.load(tiny, dtype=torch.float32).model


def test_tensors_together_have_the_norm_of_their_concatenation():
    tensors = [a_tensor(3, 10), a_tensor(4, 24)]

    assert relative(tensors) == pytest.approx(5 / 26)
    assert relative([a_tensor(0, 0)]) == 0
    assert relative([a_tensor(1, 0)]) == math.inf


def test_blocks_are_in_order_and_what_is_outside_is_left_out():
    tensors = [a_tensor(1, 2, block=1), a_tensor(9, 1, block=None), a_tensor(1, 4, block=0)]

    assert of_blocks(tensors) == (0.25, 0.5)


@pytest.mark.parametrize(
    ("num_blocks", "ends", "size"), [(30, 5, 5), (10, 5, 5), (9, 5, 4), (2, 5, 1), (1, 5, 1), (4, 1, 1)]
)
def test_few_blocks_are_halved(num_blocks: int, ends: int, size: int):
    assert size_of_ends(num_blocks, ends) == size


def test_both_ends_are_means():
    assert bottom_and_top((1.0, 3.0, 100.0, 5.0, 7.0), 2) == (2.0, 6.0)


def test_a_model_that_rests_has_no_drift(model: nn.Module):
    assert drift_of(model, start_of(model)) == {"drift/bottom": 0.0, "drift/top": 0.0}


def test_scaled_weights_have_moved_by_the_scale_less_one(model: nn.Module):
    start = start_of(model)

    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.01)

    assert drift_of(model, start) == pytest.approx({"drift/bottom": 0.01, "drift/top": 0.01}, rel=1e-4)


def test_it_is_what_numpy_computes_of_the_blocks(model: nn.Module):
    before, start = copy.deepcopy(model).state_dict(), start_of(model)
    torch.manual_seed(0)
    with torch.no_grad():
        for number, parameter in enumerate(model.parameters()):
            parameter.add_(torch.randn_like(parameter), alpha=0.001 * number)

    found = drift_of(model, start)

    for end, block in (("drift/bottom", "model.layers.0."), ("drift/top", "model.layers.1.")):
        names = [name for name in before if name.startswith(block)]
        w_0, w_t = (
            np.concatenate([state[name].double().numpy().ravel() for name in names])
            for state in (before, model.state_dict())
        )
        assert found[end] == pytest.approx(np.linalg.norm(w_t - w_0) / np.linalg.norm(w_0), rel=1e-5)


def test_the_copy_is_of_the_blocks_at_the_ends_and_stays_as_it_is(model: nn.Module):
    start = start_of(model)
    kept = {name: tensor.clone() for name, tensor in start.items()}

    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()

    assert {name.split(".")[2] for name in start} == {"0", "1"}
    assert all(torch.equal(start[name], kept[name]) for name in kept)
    assert start_bytes(model) == sum(tensor.nbytes for tensor in start.values())
