from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from overhaul.errors import UserError
from overhaul.layers.masked import MaskedLinear
from overhaul.prune.magnitude import Magnitude
from overhaul.prune.wanda import Wanda, wanda_score
from overhaul.sparsity import keep_mask
from overhaul.walk import walk

CALIB = [{"input_ids": torch.randint(3, 200, (4, 16), generator=torch.Generator().manual_seed(0))}]


def load(directory: Path) -> nn.Module:
    return AutoModelForCausalLM.from_pretrained(directory).eval()


def test_score_is_magnitude_times_input_norm() -> None:
    weight_OI = torch.tensor([[-2.0, 1.0]])

    score_OI = wanda_score(weight_OI, torch.tensor([3.0, 5.0]))

    assert score_OI.tolist() == [[6.0, 5.0]]
    assert weight_OI.tolist() == [[-2.0, 1.0]]


def test_masks_are_those_of_the_statistics_of_the_pruned_stream(tiny: Path) -> None:
    by_hand, model = load(tiny), load(tiny)
    expected = {}
    for block in walk(by_hand, CALIB):
        input_norm = block.statistics("input_norm")
        for name, linear in block.linears.items():
            expected[name] = keep_mask(linear.weight.detach().abs() * input_norm[name], 0.5, "row")
            linear.weight.data *= expected[name]

    Wanda(sparsity=0.5).apply(model, CALIB)

    for name, mask_OI in expected.items():
        layer = model.get_submodule(name)
        assert isinstance(layer, MaskedLinear)
        assert torch.equal(layer.mask, mask_OI)
        assert torch.equal(layer.weight, by_hand.get_submodule(name).weight)


def test_every_output_loses_the_same_count_and_no_kept_weight_changes(tiny: Path) -> None:
    dense, model = load(tiny), load(tiny)

    Wanda(sparsity=0.7).apply(model, CALIB)

    for name, layer in model.named_modules():
        if isinstance(layer, MaskedLinear):
            assert ((~layer.mask).sum(dim=1) == int(0.7 * layer.in_features)).all()
            assert torch.equal(layer.weight, dense.get_submodule(name).weight * layer.mask)


def test_how_the_windows_are_batched_does_not_matter(tiny: Path) -> None:
    at_once, one_by_one = load(tiny), load(tiny)

    Wanda().apply(at_once, CALIB)
    Wanda().apply(one_by_one, [{"input_ids": window_T[None]} for window_T in CALIB[0]["input_ids"]])

    for one, other in zip(at_once.parameters(), one_by_one.parameters(), strict=True):
        assert torch.equal(one, other)


def test_data_is_needed_and_nothing_changes_without(tiny: Path) -> None:
    model = load(tiny)

    with pytest.raises(UserError, match="needs calibration data"):
        Wanda().apply(model, None)
    assert not any(isinstance(module, MaskedLinear) for module in model.modules())


def test_after_a_mask_of_whole_layers_every_layer_loses_exactly_what_was_asked(tiny: Path) -> None:
    model = Magnitude(sparsity=0.3, scope="layer").apply(load(tiny), None)
    before = {name: layer.mask for name, layer in model.named_modules() if isinstance(layer, MaskedLinear)}

    Wanda(sparsity=0.5).apply(model, CALIB)

    for name, mask_OI in before.items():
        layer = model.get_submodule(name)
        assert isinstance(layer, MaskedLinear)
        assert layer.num_pruned == mask_OI.numel() // 2
        assert not (layer.mask & ~mask_OI).any()
