from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from overhaul.errors import UserError
from overhaul.journal import recording
from overhaul.layers.masked import MaskedLinear
from overhaul.prune.magnitude import Magnitude
from overhaul.prune.sparsegpt import SparseGPT, inverse_factor, output_error, sparsegpt_prune
from overhaul.prune.wanda import Wanda
from overhaul.sparsity import Target

CALIB = [{"input_ids": torch.randint(3, 200, (4, 32), generator=torch.Generator().manual_seed(0))}]


def load(directory: Path) -> nn.Module:
    return AutoModelForCausalLM.from_pretrained(directory).eval()


def layer_and_hessian(outputs: int, inputs: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    mixing_II = torch.randn(inputs, inputs, generator=generator)
    x_NI = torch.randn(4 * inputs, inputs, generator=generator) @ mixing_II
    return torch.randn(outputs, inputs, generator=generator), x_NI.T @ x_NI / len(x_NI)


def algorithm_1(weight_OI: Tensor, upper_II: Tensor, target: Target, block_size: int) -> tuple[Tensor, Tensor]:
    """The paper's listing, updating ahead column by column, in fp64."""
    weight_OI, upper_II = weight_OI.double(), upper_II.double()
    mask_OI = torch.ones_like(weight_OI, dtype=torch.bool)
    num_outputs, num_inputs = weight_OI.shape
    for start in range(0, num_inputs, block_size):
        end = min(start + block_size, num_inputs)
        if target.n_of_m is None:
            score_OK = (weight_OI[:, start:end] / upper_II.diagonal()[start:end]).square()
            count = int(target.share * (num_outputs * end)) - int((~mask_OI).sum())
            removed = score_OK.flatten().argsort()[:count]
            mask_OI[removed // (end - start), start + removed % (end - start)] = False
        for j in range(start, end):
            if target.n_of_m is not None and j % target.n_of_m.group == 0:
                group = slice(j, j + target.n_of_m.group)
                score_OM = (weight_OI[:, group] / upper_II.diagonal()[group]).square()
                removed_OM = score_OM.argsort(dim=1)[:, : target.n_of_m.group - target.n_of_m.kept]
                mask_OI[:, group] = mask_OI[:, group].scatter(1, removed_OM, False)
            error_O = weight_OI[:, j] * ~mask_OI[:, j] / upper_II[j, j]
            weight_OI = weight_OI - error_O[:, None] * upper_II[j] * (torch.arange(num_inputs) >= j)
    return weight_OI * mask_OI, mask_OI


def test_the_factor_is_the_upper_root_of_the_inverse() -> None:
    _, hessian_II = layer_and_hessian(1, 12)

    upper_II = inverse_factor(hessian_II, damping=0.01)

    damped_II = hessian_II + 0.01 * hessian_II.diagonal().mean() * torch.eye(12)
    assert torch.equal(upper_II, upper_II.triu())
    torch.testing.assert_close(upper_II.T @ upper_II @ damped_II, torch.eye(12), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("target", [Target(sparsity=0.5), Target(sparsity=0.3), Target(pattern="2:4")])
@pytest.mark.parametrize("block_size", [4, 16, 128])
def test_equals_the_listing_of_the_paper(target: Target, block_size: int) -> None:
    weight_OI, hessian_II = layer_and_hessian(6, 40)
    upper_II = inverse_factor(hessian_II, damping=0.01)

    pruned_OI, mask_OI = sparsegpt_prune(weight_OI, upper_II, target, block_size=block_size)

    expected_OI, expected_mask_OI = algorithm_1(weight_OI, upper_II, target, block_size)
    assert torch.equal(mask_OI, expected_mask_OI)
    torch.testing.assert_close(pruned_OI.double(), expected_OI, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("share", [0.1, 1 / 3, 0.5, 0.77])
def test_counts_are_exact_over_blocks_that_do_not_divide(share: float) -> None:
    weight_OI, hessian_II = layer_and_hessian(7, 45)

    pruned_OI, mask_OI = sparsegpt_prune(
        weight_OI, inverse_factor(hessian_II, 0.01), Target(sparsity=share), block_size=16
    )

    assert int((~mask_OI).sum()) == int(share * (7 * 45))
    assert (pruned_OI[~mask_OI] == 0).all()


def test_the_given_weights_are_not_changed() -> None:
    for outputs in (1, 6):
        weight_OI, hessian_II = layer_and_hessian(outputs, 16)
        before_OI = weight_OI.clone()

        sparsegpt_prune(weight_OI, inverse_factor(hessian_II, 0.01), Target())

        assert torch.equal(weight_OI, before_OI)


def test_an_earlier_mask_is_extended() -> None:
    weight_OI, hessian_II = layer_and_hessian(8, 32)
    already_OI = torch.rand(8, 32, generator=torch.Generator().manual_seed(1)) > 0.2

    pruned_OI, mask_OI = sparsegpt_prune(
        weight_OI * already_OI,
        inverse_factor(hessian_II, 0.01),
        Target(sparsity=0.5),
        already_OI=already_OI,
    )

    assert not (mask_OI & ~already_OI).any()
    assert int((~mask_OI).sum()) == 8 * 32 // 2
    assert (pruned_OI[~mask_OI] == 0).all()


def test_the_hessian_that_has_no_factor_gets_more_damping(caplog: pytest.LogCaptureFixture) -> None:
    indefinite_II = torch.tensor([[1.0, 1.05], [1.05, 1.0]])

    with caplog.at_level(logging.WARNING):
        upper_II = inverse_factor(indefinite_II, damping=0.01)

    assert "damping raised to 0.1" in caplog.text
    inverse_II = torch.linalg.inv(indefinite_II + 0.1 * torch.eye(2))
    torch.testing.assert_close(upper_II.T @ upper_II, inverse_II, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="no Cholesky factor even with damping 1"):
        inverse_factor(torch.tensor([[1.0, 3.0], [3.0, 1.0]]), damping=0.01)


def test_the_noted_error_is_that_of_the_outputs() -> None:
    generator = torch.Generator().manual_seed(0)
    x_NI, weight_OI = torch.randn(50, 8, generator=generator), torch.randn(3, 8, generator=generator)
    change_OI = torch.randn(3, 8, generator=generator)

    error = output_error(change_OI, weight_OI, x_NI.T @ x_NI)

    assert error == pytest.approx(float((x_NI @ change_OI.T).norm() / (x_NI @ weight_OI.T).norm()))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_model_is_pruned_exactly_and_better_than_by_wanda(make_tiny: Callable[..., Path], dtype: str) -> None:
    directory = make_tiny(dtype=dtype)
    dense, model, rival = load(directory), load(directory), load(directory)

    with recording() as notes:
        SparseGPT(sparsity=0.5).apply(model, CALIB)
    Wanda(sparsity=0.5).apply(rival, CALIB)

    for note in notes.layers:
        layer = model.get_submodule(note.name)
        assert isinstance(layer, MaskedLinear)
        assert layer.weight.dtype == getattr(torch, dtype)
        assert layer.num_pruned == layer.mask.numel() // 2
        assert (layer.weight[~layer.mask] == 0).all()
        assert 0 < note.error < 1
    with torch.no_grad():
        target, ours, theirs = (m(**CALIB[0]).logits.float() for m in (dense, model, rival))
    assert (ours - target).norm() < (theirs - target).norm()


def test_pattern_and_extension_on_a_model(tiny: Path) -> None:
    model = load(tiny)
    Magnitude(sparsity=0.2).apply(model, None)
    first = {name: m.mask for name, m in model.named_modules() if isinstance(m, MaskedLinear)}

    SparseGPT(pattern="2:4").apply(model, CALIB)

    for name, already_OI in first.items():
        mask_OI = model.get_submodule(name).mask
        assert not (mask_OI & ~already_OI).any()
        assert (mask_OI.view(-1, 4).sum(dim=1) <= 2).all()


def test_inputs_that_never_fire_lose_their_weights(tiny: Path) -> None:
    model = load(tiny)
    model.model.layers[0].input_layernorm.weight.data[5] = 0

    SparseGPT().apply(model, CALIB)

    assert (model.model.layers[0].self_attn.q_proj.weight[:, 5] == 0).all()
    assert all(parameter.isfinite().all() for parameter in model.parameters())


def test_a_factor_that_cannot_be_had_names_the_layer(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(hessian_II: Tensor, damping: float) -> Tensor:
        raise ValueError("no factor")

    monkeypatch.setattr("overhaul.prune.sparsegpt.inverse_factor", refuse)

    with pytest.raises(UserError, match=r"model\.layers\.0\.self_attn\.q_proj: no factor"):
        SparseGPT().apply(load(tiny), CALIB)


def test_blocks_hold_whole_groups() -> None:
    with pytest.raises(ValidationError, match="not divisible by the groups"):
        SparseGPT(pattern="2:4", block_size=30)


@pytest.mark.parametrize("columns", [slice(0, 8), slice(4, 12), slice(8, 16)], ids=["first", "middle", "last"])
def test_the_total_is_exact_wherever_an_earlier_mask_lies(columns: slice) -> None:
    weight_OI, hessian_II = layer_and_hessian(6, 16)
    already_OI = torch.ones_like(weight_OI).bool()
    already_OI[:, columns] = False

    _, mask_OI = sparsegpt_prune(
        weight_OI, inverse_factor(hessian_II, 0.01), Target(sparsity=0.6), block_size=4, already_OI=already_OI
    )

    assert int((~mask_OI).sum()) == int(0.6 * 6 * 16)
    assert not (mask_OI & ~already_OI).any()
