"""Channel-wise reprogramming of a language model: how many numbers, what it equals, looks at, and refuses."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from overhaul import artifact, banks
from overhaul.banks import Banked, fingerprint
from overhaul.errors import UserError
from overhaul.layers.masked import MaskedLinear
from overhaul.sockets.channels import Channels, linears
from overhaul.sockets.reweighting import Reweighting

IDS = torch.arange(40).view(2, 20) * 7 % 500


def moved(banked: Banked, by: int = 0) -> Banked:
    """Fills what is a task's own with other numbers, as training would."""
    torch.manual_seed(by)
    for parameter in banked.parameters():
        parameter.data = parameter.data + 0.1 * torch.randn_like(parameter)
    return banked


SOCKETS = {
    "factors": lambda: Channels(),
    "kernels": lambda: Channels(kernel=4),
    "norms": lambda: Channels(behind="none"),
    "weights": lambda: Reweighting(kernel=5, init="unchanged"),
}


@pytest.mark.parametrize("name", SOCKETS)
def test_a_new_bank_changes_nothing_and_the_model_comes_out_as_it_went_in(tiny: Path, name: str):
    model: Any = artifact.load(tiny).model
    before, logits = fingerprint(model), model(IDS).logits
    banked = Banked(model, SOCKETS[name]())
    banked.begin()

    assert torch.equal(model(IDS).logits, logits)
    moved(banked).keep("task")
    assert not torch.allclose(model(IDS).logits, logits, atol=1e-3)
    assert fingerprint(banked.restore()) == before
    assert torch.equal(model(IDS).logits, logits)
    assert "generate" not in vars(model)


@pytest.mark.parametrize("name", SOCKETS)
def test_a_bank_that_is_used_again_says_the_same_bits(tiny: Path, name: str):
    model: Any = artifact.load(tiny).model
    banked, said = Banked(model, SOCKETS[name]()), []
    for number in range(3):
        banked.begin()
        moved(banked, number).keep(f"task {number}")
        said.append(model(IDS).logits)

    for number in (1, 0, 2):
        banked.use(number)
        assert torch.equal(model(IDS).logits, said[number])
    assert banked.banks[0].classes == ()


@pytest.mark.parametrize("name", SOCKETS)
def test_a_later_token_never_changes_an_earlier_logit(tiny: Path, name: str):
    model: Any = artifact.load(tiny).model
    banked = Banked(model, SOCKETS[name]())
    banked.begin()
    moved(banked)
    other = IDS.clone()
    other[:, 12:] = 3

    one, two = model(IDS).logits, model(other).logits
    assert torch.allclose(one[:, :12], two[:, :12], atol=1e-6)
    assert not torch.allclose(one[:, 12:], two[:, 12:], atol=1e-3)


@pytest.mark.parametrize("name", ["factors", "weights", "norms"])
@pytest.mark.parametrize("bias", [False, True])
def test_what_is_merged_says_what_it_said(make_tiny: Any, name: str, bias: bool):
    model: Any = artifact.load(make_tiny(bias=bias)).model
    banked = Banked(model, SOCKETS[name]())
    banked.begin()
    moved(banked)
    logits, names = model(IDS).logits, set(artifact.load(make_tiny(bias=bias)).model.state_dict())

    assert torch.allclose(banked.merge()(IDS).logits, logits, atol=1e-5)  # of logits up to 6
    assert set(model.state_dict()) == names


def test_what_is_drawn_is_another_model_and_with_a_parent_weights_begin_unchanged_too(tiny: Path):
    model: Any = artifact.load(tiny).model
    logits = model(IDS).logits
    drawn = Banked(model, Reweighting(kernel=5))
    drawn.begin()
    assert not torch.allclose(model(IDS).logits, logits, atol=1e-2)

    unchanged = Banked(drawn.restore(), Reweighting(kernel=5, init="unchanged", norms=False))
    unchanged.begin()
    moved(unchanged).keep("one")
    unchanged.begin(parent=0)
    assert torch.equal(model(IDS).logits, logits)
    assert unchanged.keep("two").parent == "one"


def test_kernels_over_time_are_in_no_weights(tiny: Path):
    banked = Banked(artifact.load(tiny).model, Channels(kernel=2))
    with pytest.raises(UserError, match="kernels over 2 tokens cannot be put into the weights"):
        banked.merge()


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing")
def test_factors_of_keys_and_values_are_an_ia3_of_peft(tiny: Path):
    peft = pytest.importorskip("peft")
    model: Any = artifact.load(tiny).model
    other: Any = peft.get_peft_model(
        copy.deepcopy(model), peft.IA3Config(target_modules=["k_proj", "v_proj"], feedforward_modules=[])
    )
    banked = Banked(model, Channels(norms=False))
    banked.begin()
    for name, layer in banked.model.named_modules():
        if name.endswith(("k_proj", "v_proj")):
            torch.nn.init.normal_(layer.kernel)  # pyright: ignore[reportArgumentType, reportAttributeAccessIssue]
            theirs = other.get_submodule(f"base_model.model.{name}").ia3_l["default"]
            theirs.data = layer.kernel.data.clone()  # pyright: ignore[reportCallIssue, reportAttributeAccessIssue]

    assert torch.allclose(model(IDS).logits, other(input_ids=IDS).logits, atol=1e-5)
    assert not torch.allclose(model(IDS).logits, artifact.load(tiny).model(IDS).logits, atol=1e-2)


@pytest.mark.parametrize("name", ["factors", "kernels", "weights"])
def test_what_is_written_is_what_the_whole_text_says(tiny: Path, name: str):
    """Greedily, token by token, from logits of the whole text; a text filled up on the left among them."""
    model: Any = artifact.load(tiny).model
    banked = Banked(model, SOCKETS[name]())
    banked.begin()
    moved(banked)
    ids = torch.arange(5, 14)[None]
    by_hand = ids
    for _ in range(6):
        by_hand = torch.cat([by_hand, model(by_hand).logits[:, -1:].argmax(-1)], dim=1)

    how: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    assert torch.equal(model.generate(ids, **how), by_hand)
    filled, mask = (torch.nn.functional.pad(one, (3, 0)) for one in (ids, torch.ones_like(ids)))
    both = torch.cat([filled, torch.arange(100, 112)[None]])
    mask = torch.cat([mask, torch.ones(1, 12, dtype=torch.long)])
    assert torch.equal(model.generate(both, attention_mask=mask, **how)[0, 3:], by_hand[0])


def test_kernels_over_time_refuse_a_cache(tiny: Path):
    model: Any = artifact.load(tiny).model
    cache = model(IDS).past_key_values
    Banked(model, Channels(kernel=3))
    with pytest.raises(UserError, match="look back at more than cached keys and values"):
        model(IDS[:, :1], past_key_values=cache)


def test_a_bank_is_as_small_as_it_should_be():
    """Of SmolLM2-135M: 5,184 outputs of linear layers in each of 30 blocks, and 61 norms of 576."""
    from transformers import LlamaConfig, LlamaForCausalLM

    shape: Any = {"num_attention_heads": 9, "num_key_value_heads": 3, "num_hidden_layers": 30, "vocab_size": 8}
    config = LlamaConfig(hidden_size=576, intermediate_size=1536, tie_word_embeddings=True, **shape)
    sizes = {}
    for name, sockets in (("clr", Channels()), ("clr 3", Channels(kernel=3)), ("contracon", Reweighting())):
        with torch.device("meta"):
            model = LlamaForCausalLM(config)
        sockets.fit(model)
        sizes[name] = sum(banks._tensor(model, at).numel() for at in sockets.names(model))

    norms = 61 * 576
    assert sizes == {
        "clr": 30 * 5184 + norms,
        "clr 3": 3 * 30 * 5184 + norms,
        # of each block 9 + 3 + 3 heads, with 225 numbers of a kernel, a shift and a gate
        "contracon": 30 * 15 * 227 + norms,
    }


def test_what_is_no_plain_linear_layer_is_refused(make_tiny: Any):
    model: Any = artifact.load(make_tiny()).model
    assert len(linears(model)) == 2 * 7
    up = model.model.layers[0].mlp.up_proj
    model.model.layers[0].mlp.up_proj = MaskedLinear.from_linear(up, torch.ones_like(up.weight, dtype=torch.bool))
    with pytest.raises(UserError, match="up_proj is a MaskedLinear"):
        Channels().fit(model)
    with pytest.raises(UserError, match="has no linear layers but its head"):
        linears(artifact.load(make_tiny(architecture="gpt2")).model)
    assert isinstance(model.model.layers[0].mlp.down_proj, nn.Linear)
