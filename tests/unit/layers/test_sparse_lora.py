"""Adapters of pruned layers: what they compute, and that merging keeps every zero."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from overhaul.layers import adapters_off
from overhaul.layers.lora import LoRALinear, LowRankLinear
from overhaul.layers.masked import MaskedLinear
from overhaul.layers.sparse_lora import LoRAPruneLinear, MaskLoRALinear, ScaleLoRALinear

RANK, ALPHA = 3, 6.0
SPARSE = [MaskLoRALinear, LoRAPruneLinear, ScaleLoRALinear]
EXACT = [MaskLoRALinear, ScaleLoRALinear]


def pruned(kept_share: float = 0.5, dtype: torch.dtype = torch.float32) -> MaskedLinear:
    torch.manual_seed(0)
    return MaskedLinear.from_linear(nn.Linear(12, 10, dtype=dtype), torch.rand(10, 12) < kept_share)


def fresh(kind: type[LowRankLinear], base: MaskedLinear) -> LowRankLinear:
    generator = torch.Generator().manual_seed(1)
    if kind is ScaleLoRALinear:
        return ScaleLoRALinear.from_linear(base, RANK, generator=generator)
    return kind.from_linear(base, RANK, ALPHA, generator=generator)


def adapted(kind: type[LowRankLinear], base: MaskedLinear) -> LowRankLinear:
    """An adapter in the middle of training."""
    layer = fresh(kind, base)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        layer.lora_A += 0.3 * torch.randn(layer.lora_A.shape, generator=generator)
        layer.lora_B += 0.3 * torch.randn(layer.lora_B.shape, generator=generator)
    return layer


def inputs() -> Tensor:
    return torch.randn(2, 7, 12, generator=torch.Generator().manual_seed(3)).requires_grad_()


@pytest.mark.parametrize("kind", SPARSE)
def test_starts_as_the_pruned_layer(kind):
    base, x = pruned(), inputs()

    torch.testing.assert_close(fresh(kind, base)(x), base(x))


@pytest.mark.parametrize("kind", SPARSE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merged_zeros_are_the_mask(kind, dtype):
    base = pruned(dtype=dtype)
    layer = adapted(kind, base)

    merged = layer.merge()

    assert merged.weight.dtype == dtype
    assert torch.equal(merged.mask, base.mask)
    assert torch.equal(merged.weight != 0, base.mask)
    assert not torch.signbit(merged.weight[~base.mask]).any()
    assert merged.bias is base.bias


@pytest.mark.parametrize("kind", EXACT)
def test_merging_changes_nothing(kind):
    layer, x = adapted(kind, pruned()), inputs()

    torch.testing.assert_close(layer.merge()(x), layer(x), rtol=0, atol=1e-6)


def test_merging_lora_prune_masks_the_increment():
    layer, x = adapted(LoRAPruneLinear, pruned()), inputs()

    merged = layer.merge()

    assert not torch.allclose(merged(x), layer(x), atol=1e-2)
    assert isinstance(layer, LoRAPruneLinear)
    torch.testing.assert_close(merged.weight, layer.dense() * layer.mask)


@pytest.mark.parametrize("kind", [MaskLoRALinear, LoRAPruneLinear])
def test_an_empty_mask_is_plain_lora(kind):
    base, x = pruned(kept_share=1.1), inputs()
    layer = adapted(kind, base)
    plain = LoRALinear(base, layer.lora_A.detach(), layer.lora_B.detach(), ALPHA)

    torch.testing.assert_close(layer(x), plain(x))


def test_gradients_of_mask_lora_in_closed_form():
    layer, x = adapted(MaskLoRALinear, pruned()), inputs()
    assert isinstance(layer, MaskLoRALinear)
    grad = torch.randn(2, 7, 10)

    layer(x).backward(grad)

    # dL/dW = g^T x; the mask and the scale stand between W and B A.
    grad_OI = layer.scale * layer.mask * (grad.flatten(0, 1).t() @ x.detach().flatten(0, 1))
    torch.testing.assert_close(layer.lora_B.grad, grad_OI @ layer.lora_A.detach().t())
    torch.testing.assert_close(layer.lora_A.grad, layer.lora_B.detach().t() @ grad_OI)
    torch.testing.assert_close(x.grad, grad @ layer.dense().detach())


def test_gradients_of_scale_lora_in_closed_form():
    layer, x = adapted(ScaleLoRALinear, pruned()), inputs()
    grad = torch.randn(2, 7, 10)

    layer(x).backward(grad)

    # dL/dW = g^T x; W_p stands between W and B A.
    grad_OI = layer.weight * (grad.flatten(0, 1).t() @ x.detach().flatten(0, 1))
    torch.testing.assert_close(layer.lora_B.grad, grad_OI @ layer.lora_A.detach().t())
    torch.testing.assert_close(layer.lora_A.grad, layer.lora_B.detach().t() @ grad_OI)
    torch.testing.assert_close(x.grad, grad @ layer.dense().detach())


@pytest.mark.parametrize("kind", SPARSE)
def test_the_base_stays_frozen_under_autocast(kind):
    base = pruned(dtype=torch.bfloat16)
    before = base.weight.clone()
    layer, x = adapted(kind, base), inputs()

    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    y.float().square().sum().backward()

    assert y.dtype == torch.bfloat16
    assert layer.weight is base.weight
    assert layer.weight.grad is None
    assert torch.equal(layer.weight, before)
    assert layer.lora_A.grad is not None
    assert layer.lora_A.grad.dtype == torch.float32
    assert x.grad is not None
    assert x.grad.dtype == torch.float32


@pytest.mark.parametrize("kind", EXACT)
def test_bf16_training_sees_the_weights_that_a_merge_writes(kind):
    layer = adapted(kind, pruned(dtype=torch.bfloat16))
    identity = torch.eye(12)

    with torch.autocast("cpu", torch.bfloat16):
        seen_OI = (layer(identity) - layer.bias).t()

    written_OI = layer.merge().weight
    torch.testing.assert_close(seen_OI.float(), written_OI.float(), rtol=2**-6, atol=2**-7)


@pytest.mark.parametrize("kind", SPARSE)
def test_switched_off_it_is_the_pruned_layer(kind):
    base, x = pruned(), inputs()
    layer = adapted(kind, base)

    with adapters_off(layer):
        torch.testing.assert_close(layer(x), base(x), rtol=0, atol=0)


def test_rank_one_scale_lora_scales_rows_and_columns():
    base = pruned()
    layer = ScaleLoRALinear.from_linear(base, rank=1, noise=0.5)

    rows_O, columns_I = layer.lora_B[:, 0], layer.lora_A[0]

    torch.testing.assert_close(layer.dense(), torch.diag(rows_O) @ base.weight @ torch.diag(columns_I))


@pytest.mark.parametrize(("noise", "ranks"), [(0.0, 1), (0.1, RANK)])
def test_constant_initialisation_stays_rank_one(noise, ranks):
    layer = ScaleLoRALinear.from_linear(pruned(), RANK, noise)
    target = torch.randn(2, 7, 10)
    sgd = torch.optim.SGD([layer.lora_A, layer.lora_B], lr=0.1)

    for _ in range(20):
        sgd.zero_grad()
        F.mse_loss(layer(inputs()), target).backward()
        sgd.step()

    scale_OI = (layer.lora_B @ layer.lora_A).detach()
    assert (scale_OI - 1).abs().max() > 0.01
    assert torch.linalg.matrix_rank(scale_OI, rtol=1e-5) == ranks
