"""Methods that become each other, or a closed form, at some setting."""

from __future__ import annotations

import torch

from overhaul.prune.magnitude import magnitude_score
from overhaul.prune.sparsegpt import inverse_factor, sparsegpt_prune
from overhaul.prune.wanda import wanda_score
from overhaul.sparsity import Target, keep_mask, keep_mask_pattern


def gaussian(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def test_wanda_with_equal_input_norms_is_magnitude_per_output() -> None:
    weight_OI = gaussian(8, 32)

    wanda = keep_mask(wanda_score(weight_OI, torch.full((32,), 3.0)), 0.5, "row")

    assert torch.equal(wanda, keep_mask(magnitude_score(weight_OI), 0.5, "row"))


def test_one_weight_removed_from_one_row_is_the_optimal_brain_surgeon() -> None:
    """`delta = -w_q / (H^-1)_qq * (H^-1)_:q`, for the weight that costs least and is met first."""
    mixing_II = gaussian(6, 6)
    hessian_II = mixing_II @ mixing_II.T + torch.eye(6)
    weight_OI = gaussian(1, 6)
    weight_OI[0, 0] = 0.01
    inverse_II = torch.linalg.inv(hessian_II)

    pruned_OI, mask_OI = sparsegpt_prune(weight_OI, inverse_factor(hessian_II, damping=1e-9), Target(sparsity=0.2))

    expected_I = weight_OI[0] - weight_OI[0, 0] / inverse_II[0, 0] * inverse_II[:, 0]
    assert mask_OI.tolist() == [[False, True, True, True, True, True]]
    torch.testing.assert_close(pruned_OI[0], expected_I, rtol=1e-3, atol=1e-4)


def test_sparsegpt_with_uncorrelated_inputs_is_wanda_over_the_layer_without_updates() -> None:
    weight_OI, input_norm_I = gaussian(8, 32), gaussian(32).abs() + 0.1
    upper_II = inverse_factor(torch.diag(input_norm_I.square()), damping=1e-9)

    pruned_OI, mask_OI = sparsegpt_prune(weight_OI, upper_II, Target(sparsity=0.5))

    assert torch.equal(mask_OI, keep_mask(wanda_score(weight_OI, input_norm_I), 0.5))
    assert torch.equal(pruned_OI, weight_OI * mask_OI)


def test_sparsegpt_with_equal_uncorrelated_inputs_and_a_pattern_is_magnitude() -> None:
    weight_OI = gaussian(8, 32)

    _, mask_OI = sparsegpt_prune(weight_OI, inverse_factor(torch.eye(32), 0.01), Target(pattern="2:4"))

    assert torch.equal(mask_OI, keep_mask_pattern(magnitude_score(weight_OI), 2, 4))


def test_a_pattern_of_the_whole_width_is_a_share_of_each_output() -> None:
    score_OI = gaussian(8, 32).abs()

    assert torch.equal(keep_mask_pattern(score_OI, 8, 32), keep_mask(score_OI, 0.75, "row"))


def test_next_to_nothing_removed_is_the_identity() -> None:
    weight_OI = gaussian(8, 32)

    assert keep_mask(weight_OI.abs(), 1e-6).all()
