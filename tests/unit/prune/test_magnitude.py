from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from overhaul.errors import UserError
from overhaul.journal import recording
from overhaul.layers.masked import MaskedLinear
from overhaul.prune.magnitude import Magnitude, magnitude_score
from overhaul.sparsity import keep_mask


def load(directory: Path) -> nn.Module:
    return AutoModelForCausalLM.from_pretrained(directory).eval()


def masked_layers(model: nn.Module) -> dict[str, MaskedLinear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, MaskedLinear)}


def test_score_is_the_absolute_value() -> None:
    assert magnitude_score(torch.tensor([[-2.0, 1.0]])).tolist() == [[2.0, 1.0]]


def test_each_layer_loses_the_same_share_of_its_smallest_weights(tiny: Path) -> None:
    dense, model = load(tiny), load(tiny)

    Magnitude(sparsity=0.3).apply(model, None)

    for name, layer in masked_layers(model).items():
        weight_OI = dense.get_submodule(name).weight
        mask_OI = keep_mask(weight_OI.detach().abs(), 0.3)
        assert torch.equal(layer.mask, mask_OI)
        assert torch.equal(layer.weight, weight_OI * mask_OI)
        assert layer.num_pruned == int(0.3 * weight_OI.numel())


def test_all_linears_of_the_blocks_and_nothing_else_change(tiny: Path) -> None:
    dense, model = load(tiny), load(tiny)

    Magnitude().apply(model, None)

    assert len(masked_layers(model)) == 2 * 7
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert not isinstance(model.lm_head, MaskedLinear)
    assert torch.equal(model.lm_head.weight, dense.lm_head.weight)


def test_scope_row_takes_the_same_share_of_every_output(tiny: Path) -> None:
    model = load(tiny)

    Magnitude(sparsity=0.25, scope="row").apply(model, None)

    for layer in masked_layers(model).values():
        assert ((~layer.mask).sum(dim=1) == layer.in_features // 4).all()


def test_pattern(tiny: Path) -> None:
    model = load(tiny)

    Magnitude(pattern="1:4").apply(model, None)

    for layer in masked_layers(model).values():
        assert (layer.mask.view(-1, 4).sum(dim=1) == 1).all()


def test_a_pruned_model_can_be_pruned_further_but_not_back(tiny: Path) -> None:
    model = load(tiny)
    Magnitude(sparsity=0.3).apply(model, None)
    first = {name: layer.mask for name, layer in masked_layers(model).items()}

    Magnitude(sparsity=0.6).apply(model, None)

    for name, layer in masked_layers(model).items():
        assert not (layer.mask & ~first[name]).any()
        assert layer.num_pruned == int(0.6 * layer.mask.numel())
    with pytest.raises(UserError, match="is already removed"):
        Magnitude(sparsity=0.5).apply(model, None)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_numbers_are_named_before_anything_changes(tiny: Path, value: float) -> None:
    model = load(tiny)
    model.model.layers[1].mlp.up_proj.weight.data[0, 0] = value

    with pytest.raises(UserError, match=r"model\.layers\.1\.mlp\.up_proj\.weight contains NaN"):
        Magnitude().apply(model, None)
    assert not masked_layers(model)


def test_a_width_that_the_groups_do_not_divide_is_named_before_anything_changes(tiny: Path) -> None:
    model = load(tiny)
    model.model.layers[1].mlp.down_proj = nn.Linear(100, 64)

    with pytest.raises(UserError, match=r"model\.layers\.1\.mlp\.down_proj has 100 inputs"):
        Magnitude(pattern="4:8").apply(model, None)
    assert not masked_layers(model)


def test_every_layer_is_noted_with_its_error(make_tiny: Callable[..., Path]) -> None:
    dense, model = load(make_tiny(architecture="opt")), load(make_tiny(architecture="opt"))

    with recording() as notes:
        Magnitude().apply(model, None)

    assert [note.name for note in notes.layers] == list(masked_layers(model))
    for note in notes.layers:
        before, after = (m.get_submodule(note.name).weight.detach() for m in (dense, model))
        assert note.sparsity == 0.5
        assert note.error == pytest.approx(float((before - after).norm() / before.norm()))
