"""LoRA against its formula, against peft, and under autocast."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from overhaul.errors import UserError
from overhaul.layers import adapters_off
from overhaul.layers.lora import LoRALinear, refuse_pruned
from overhaul.layers.masked import MaskedLinear

RANK, ALPHA = 3, 6.0


def linear(*, bias: bool = True, dtype: torch.dtype = torch.float32) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(8, 5, bias=bias, dtype=dtype)


def adapted(base: nn.Linear, dropout: float = 0.0) -> LoRALinear:
    """An adapter in the middle of training: B is no longer zero."""
    layer = LoRALinear.from_linear(base, RANK, ALPHA, dropout, torch.Generator().manual_seed(1))
    nn.init.normal_(layer.lora_B, generator=torch.Generator().manual_seed(2))
    return layer


def formula(layer: LoRALinear, x: Tensor) -> Tensor:
    increment = F.linear(F.linear(x, layer.lora_A), layer.lora_B)
    return F.linear(x, layer.weight, layer.bias) + ALPHA / RANK * increment


def inputs() -> Tensor:
    return torch.randn(2, 7, 8, generator=torch.Generator().manual_seed(3)).requires_grad_()


def test_starts_as_its_base_and_shares_its_parameters():
    base, x = linear(), inputs()

    layer = LoRALinear.from_linear(base, RANK, ALPHA)

    assert layer.weight is base.weight
    assert layer.bias is base.bias
    assert not layer.weight.requires_grad
    torch.testing.assert_close(layer(x), base(x))


@pytest.mark.parametrize("bias", [True, False])
def test_outputs_and_gradients_are_the_formulas(bias):
    layer, x = adapted(linear(bias=bias)), inputs()
    leaves = [x, layer.lora_A, layer.lora_B] + ([layer.bias] if layer.bias is not None else [])

    y, reference = layer(x), formula(layer, x)

    torch.testing.assert_close(y, reference)
    grad = torch.randn_like(y)
    torch.testing.assert_close(
        torch.autograd.grad(y, leaves, grad), torch.autograd.grad(reference, leaves, grad), rtol=1e-5, atol=1e-5
    )


def test_bf16_base_under_autocast_keeps_fp32_gradients():
    layer, x = adapted(linear(dtype=torch.bfloat16)), inputs()

    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
        reference = formula(layer, x)
    grads = torch.autograd.grad(y.float().square().sum(), (x, layer.lora_A, layer.lora_B))
    peers = torch.autograd.grad(reference.float().square().sum(), (x, layer.lora_A, layer.lora_B))

    assert y.dtype == torch.bfloat16
    for grad, peer in zip(grads, peers, strict=True):
        assert grad.dtype == torch.float32
        assert (grad - peer).norm() < 0.02 * peer.norm()


def test_an_input_without_gradient_still_trains_the_factors():
    layer = adapted(linear())

    layer(inputs().detach()).sum().backward()

    assert layer.lora_A.grad is not None
    assert layer.lora_B.grad is not None
    assert layer.weight.grad is None


def test_dropout_acts_on_the_increment_in_training_only():
    layer, x = adapted(linear(), dropout=0.5), inputs()
    without = formula(layer, x)

    torch.testing.assert_close(layer.eval()(x), without)
    layer.train()
    draws = torch.stack([layer(x) for _ in range(4000)])
    assert (draws[0] - without).abs().max() > 0.01
    torch.testing.assert_close(draws.mean(0), without, rtol=0.1, atol=0.2)


def test_merged_is_unmerged():
    layer, x = adapted(linear()), inputs()

    merged = layer.merge()

    assert type(merged) is nn.Linear
    torch.testing.assert_close(merged(x), layer(x))
    torch.testing.assert_close(F.linear(x, layer.dense(), layer.bias), layer(x))


def test_merging_into_bf16_rounds_once():
    layer = adapted(linear(dtype=torch.bfloat16))

    exact = layer.weight.double() + ALPHA / RANK * layer.lora_B.double() @ layer.lora_A.double()

    assert layer.merge().weight.dtype == torch.bfloat16
    torch.testing.assert_close(layer.merge().weight.double(), exact, rtol=2**-8, atol=1e-6)


def test_same_as_peft():
    from peft import LoraConfig
    from peft.tuners.lora import Linear

    base, x = linear(), inputs()
    config = LoraConfig(r=RANK, lora_alpha=int(ALPHA))
    peer = Linear(base, "default", config=config, r=RANK, lora_alpha=int(ALPHA))
    layer = adapted(base)
    with torch.no_grad():
        peer.lora_A["default"].weight.copy_(layer.lora_A)
        peer.lora_B["default"].weight.copy_(layer.lora_B)

    torch.testing.assert_close(layer(x), peer(x), rtol=0, atol=1e-5)


def test_the_reference_is_the_model_with_adapters_off():
    base, x = linear(), inputs()
    before = base(x)
    model = nn.Sequential(adapted(base))

    with adapters_off(model):
        torch.testing.assert_close(model(x), before, rtol=0, atol=0)
    assert not torch.allclose(model(x), before)


def test_a_pruned_layer_refuses_to_be_filled():
    mask_OI = torch.ones(5, 8, dtype=torch.bool)
    mask_OI[0, :4] = False
    pruned = MaskedLinear.from_linear(linear(), mask_OI)

    with pytest.raises(UserError, match=r"4 pruned weights.*\n.*mask_lora.*lora_prune"):
        LoRALinear.from_linear(pruned, RANK, ALPHA).merge()
    with pytest.raises(UserError, match=r"^0 has 4 pruned weights"):
        refuse_pruned(nn.Sequential(pruned), ["0"])
