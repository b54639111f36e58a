from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, MixtralConfig, MixtralForCausalLM

from overhaul.errors import UserError
from overhaul.interop.fused import fused
from overhaul.walk import decoder_blocks, walk


def load(directory: Path) -> nn.Module:
    return AutoModelForCausalLM.from_pretrained(directory).eval()


def windows(num: int, length: int, seed: int = 0) -> Tensor:
    return torch.randint(3, 200, (num, length), generator=torch.Generator().manual_seed(seed))


def inputs_seen(model: nn.Module, run: Callable[[], object]) -> dict[str, Tensor]:
    """The last input of each linear layer, by hooks on the full model."""
    seen: dict[str, Tensor] = {}
    handles = [
        module.register_forward_pre_hook(lambda _, args, name=name: seen.__setitem__(name, args[0].detach()))
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
    ]
    with torch.no_grad():
        run()
    for handle in handles:
        handle.remove()
    return seen


@pytest.mark.parametrize("architecture", ["llama", "opt"])
def test_statistics_of_every_block_equal_hooks_on_the_full_model(
    make_tiny: Callable[..., Path], architecture: str
) -> None:
    model = load(make_tiny(architecture=architecture))
    input_ids = windows(3, 16)
    seen = inputs_seen(model, lambda: model(input_ids=input_ids))

    for block in walk(model, [{"input_ids": input_ids[:2]}, {"input_ids": input_ids[2:]}]):
        norms, hessians, largest = (block.statistics(kind) for kind in ("input_norm", "hessian", "absmax"))
        assert norms.keys() == block.linears.keys()
        for name in block.linears:
            x_NI = seen[name].flatten(0, -2)
            torch.testing.assert_close(norms[name], x_NI.norm(dim=0), rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(hessians[name], 2 / 48 * x_NI.T @ x_NI, rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(largest[name], x_NI.abs().amax(dim=0), rtol=1e-4, atol=1e-5)


def test_readers_of_one_tensor_share_one_statistic(tiny: Path) -> None:
    block = next(walk(load(tiny), [{"input_ids": windows(1, 8)}]))

    hessians = {name.rsplit(".", 1)[1]: tensor for name, tensor in block.statistics("hessian").items()}

    assert hessians["q_proj"] is hessians["k_proj"] is hessians["v_proj"]
    assert hessians["gate_proj"] is hessians["up_proj"]
    assert len({id(tensor) for tensor in hessians.values()}) == 4


def test_bf16_hessian_is_summed_in_fp32(make_tiny: Callable[..., Path]) -> None:
    model = load(make_tiny(dtype="bfloat16"))
    input_ids = windows(2, 32)
    with fused(model):  # rounds to bf16 in other places than transformers' own code
        seen = inputs_seen(model, lambda: model(input_ids=input_ids))

    block = next(walk(model, [{"input_ids": input_ids}]))

    name = f"{block.name}.self_attn.q_proj"
    x_NI = seen[name].flatten(0, -2).double()
    hessian_II = block.statistics("hessian")[name]
    assert hessian_II.dtype == torch.float32
    torch.testing.assert_close(hessian_II.double(), 2 / 64 * x_NI.T @ x_NI, rtol=1e-5, atol=1e-5)


def test_the_next_block_reads_the_changed_block(tiny: Path) -> None:
    model, input_ids = load(tiny), windows(2, 12)

    inputs = []
    for block in walk(model, [{"input_ids": input_ids}]):
        inputs.append(block.calls[0].hidden.clone())
        for linear in block.linears.values():
            linear.weight.data.zero_()

    assert torch.equal(inputs[1], inputs[0])  # a block of zeros adds nothing to the residual stream


def test_inputs_of_each_block_are_the_models_own_hidden_states(tiny: Path) -> None:
    model, input_ids = load(tiny), windows(2, 12)
    with torch.no_grad():
        expected = model(input_ids=input_ids, output_hidden_states=True).hidden_states

    for block, hidden_BTD in zip(walk(model, [{"input_ids": input_ids}]), expected, strict=False):
        torch.testing.assert_close(block.calls[0].hidden, hidden_BTD)


@pytest.mark.parametrize("left", [True, False])
def test_padding_is_left_out(tiny: Path, left: bool) -> None:
    model, input_ids = load(tiny), windows(1, 10)
    filler = windows(1, 6, seed=1)
    real, fill = torch.ones(1, 10, dtype=torch.int64), torch.zeros(1, 6, dtype=torch.int64)
    padded = {
        "input_ids": torch.cat([filler, input_ids] if left else [input_ids, filler], dim=1),
        "attention_mask": torch.cat([fill, real] if left else [real, fill], dim=1),
    }

    plain = [block.statistics("input_norm") for block in walk(model, [{"input_ids": input_ids}])]
    masked = [block.statistics("input_norm") for block in walk(model, [padded])]

    for one, other in zip(plain, masked, strict=True):
        for name in one:
            torch.testing.assert_close(one[name], other[name], rtol=1e-3, atol=1e-4)


def test_a_block_can_be_differentiated_and_leaves_gradients_on(tiny: Path) -> None:
    for block in walk(load(tiny), [{"input_ids": windows(1, 8)}]):
        target = block.outputs()[0]
        loss = (block(block.calls[0]) - 2 * target).square().mean()
        loss.backward()

        assert not target.requires_grad
        assert all(linear.weight.grad is not None for linear in block.linears.values())


def test_without_data_there_are_blocks_but_no_statistics(tiny: Path) -> None:
    blocks = list(walk(load(tiny), None))

    assert [block.name for block in blocks] == ["model.layers.0", "model.layers.1"]
    with pytest.raises(UserError, match="needs calibration data"):
        blocks[0].statistics("input_norm")


def test_empty_calibration_data_is_refused(tiny: Path) -> None:
    with pytest.raises(UserError, match="empty"):
        next(walk(load(tiny), []))


def test_the_model_is_as_before_when_the_walk_is_left_early(tiny: Path) -> None:
    model, input_ids = load(tiny), windows(1, 8)
    before = model(input_ids=input_ids).logits

    next(walk(model, [{"input_ids": input_ids}])).statistics("hessian")

    assert torch.equal(model(input_ids=input_ids).logits, before)


def test_matrices_outside_of_linear_layers_are_refused(make_tiny: Callable[..., Path]) -> None:
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "num_key_value_heads": 1}
    experts = MixtralForCausalLM(MixtralConfig(vocab_size=32, num_hidden_layers=1, **sizes))

    with pytest.raises(UserError, match="Conv1D"):
        decoder_blocks(load(make_tiny(architecture="gpt2")))
    with pytest.raises(UserError, match="8 experts in one parameter"):
        decoder_blocks(experts)
    with pytest.raises(UserError, match="no list of blocks"):
        decoder_blocks(nn.Linear(2, 2))


class TwoExperts(nn.Module):
    """Sends every token to expert 0."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))

    def forward(self, hidden_states: Tensor) -> Tensor:
        rows_ND = hidden_states.flatten(0, -2)
        none = rows_ND[:0]
        return hidden_states + (self.experts[0](rows_ND) + self.experts[1](none).sum()).view_as(hidden_states)


class TwoExpertModel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(8, 4)
        self.layers = nn.ModuleList([TwoExperts()])

    def forward(self, input_ids: Tensor) -> Tensor:
        hidden_states = self.embed(input_ids)
        for layer in self.layers:
            hidden_states = layer(hidden_states)
        return hidden_states


def test_an_expert_that_no_token_reaches_is_named() -> None:
    block = next(walk(TwoExpertModel(), [{"input_ids": torch.arange(8)[None]}]))

    with pytest.raises(UserError, match=r"reaches layers\.0\.experts\.1"):
        block.statistics("input_norm")
