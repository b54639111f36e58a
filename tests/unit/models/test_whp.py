"""Two networks as one model: the formula, each with its own cache, tied words, and what is refused."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, Mamba2Config, Mamba2ForCausalLM, MistralConfig
from transformers import MistralForCausalLM as Mistral

from command import python
from overhaul import models
from overhaul.models.whp import TwoCaches, WhpConfig, WhpForCausalLM, fits
from tiny_models import MakeTiny

VARIANTS = [("llama", True), ("llama", False), ("gpt2", True), ("opt", True)]


@pytest.fixture(autouse=True, scope="module")
def _registered() -> None:
    models.register("whp")


@pytest.fixture
def dice() -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


@pytest.fixture(params=VARIANTS, ids=[f"{name}{'-tied' if tie else ''}" for name, tie in VARIANTS])
def target(request: pytest.FixtureRequest, make_tiny: MakeTiny) -> Any:
    architecture, tie = request.param
    return loud(AutoModelForCausalLM.from_pretrained(make_tiny(architecture=architecture, tie=tie)))


def loud(model: Any) -> Any:
    """With logits that are far apart, so that not one word is written for ever."""
    return moved(model, 0.2, seed=1)


def moved(model: Any, by: float = 0.1, seed: int = 2) -> Any:
    """A copy whose weights are elsewhere."""
    other, random = copy.deepcopy(model), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(by * torch.randn(parameter.shape, generator=random).to(parameter.dtype))
    return other.eval()


def joined(target: Any, reinforced: Any, alpha: float = 1.0) -> Any:
    return WhpForCausalLM.joining(copy.deepcopy(target), copy.deepcopy(reinforced), alpha).eval()


def texts(padded: bool = True) -> dict[str, Tensor]:
    """Three of nine tokens, two of them filled up on the left."""
    ids_BT = torch.randint(3, 500, (3, 9), generator=torch.Generator().manual_seed(0))
    mask_BT = torch.ones_like(ids_BT)
    if padded:
        mask_BT[0, :4] = mask_BT[1, :2] = 0
    return {"input_ids": ids_BT, "attention_mask": mask_BT}


def write(model: Any, **more: Any) -> list[list[int]]:
    how: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, "eos_token_id": None, **more}
    torch.manual_seed(3)
    return model.generate(**{**texts(), **how}).tolist()


@torch.no_grad()
@pytest.mark.parametrize("given", [texts(), texts(padded=False), {"input_ids": texts()["input_ids"]}])
@pytest.mark.parametrize("alpha", [0.5, 1.0, 16.0])
def test_logits_are_those_of_the_formula(target: Any, alpha: float, given: dict[str, Tensor]):
    reinforced = moved(target)
    made = joined(target, reinforced, alpha)(**given).logits
    one, other = target(**given).logits, reinforced(**given).logits

    assert torch.equal(made, one - alpha * torch.relu(other - one))
    assert bool((made <= one).all())
    assert bool((made < one).any())


@torch.no_grad()
def test_alpha_of_nothing_is_the_target_to_the_bit(target: Any):
    made = joined(target, moved(target), 0.0)

    assert torch.equal(made(**texts()).logits, target(**texts()).logits)
    assert write(made) == write(target)


@torch.no_grad()
@pytest.mark.parametrize("alpha", [0.0, 1.0, 256.0])
def test_where_nothing_was_learnt_it_is_the_target(target: Any, alpha: float):
    assert torch.equal(joined(target, target, alpha)(**texts()).logits, target(**texts()).logits)


@torch.no_grad()
def test_a_larger_alpha_raises_no_logit_and_can_be_set_afterwards(target: Any):
    made, before = joined(target, moved(target), 0.0), target(**texts()).logits
    for alpha in (0.5, 1, 4.0):
        made.config.alpha = alpha
        after = made(**texts()).logits
        assert bool((after <= before).all())
        before = after

    assert torch.equal(after, joined(target, moved(target), 4.0)(**texts()).logits)


@pytest.mark.parametrize(
    "how",
    [{}, {"do_sample": True}, {"num_beams": 3}, {"num_return_sequences": 2, "do_sample": True}],
    ids=["greedy", "sampled", "beams", "several"],
)
def test_with_caches_it_writes_what_it_writes_without(target: Any, how: dict[str, Any]):
    made = joined(target, moved(target), 2.0)

    assert write(made, **how) == write(made, use_cache=False, **how)
    assert write(made) != write(target)


@pytest.mark.parametrize("how", [{"cache_implementation": "static"}, {"prompt_lookup_num_tokens": 2}])
def test_caches_of_a_fixed_size_and_guessed_words_change_nothing(target: Any, how: dict[str, Any]):
    made = joined(target, moved(target), 2.0)
    alone = {name: rows[2:] for name, rows in texts().items()}

    assert write(made, **alone, **how) == write(made, **alone, use_cache=False)


@pytest.mark.usefixtures("dice")
def test_a_window_of_attention_slides_in_both():
    sizes: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "vocab_size": 500}
    config = MistralConfig(num_attention_heads=4, num_key_value_heads=2, sliding_window=4, **sizes)
    target = loud(Mistral(config))
    made = joined(target, moved(target), 2.0)

    assert write(made) == write(made, use_cache=False)
    assert write(made, num_beams=2) == write(made, use_cache=False, num_beams=2)


@torch.no_grad()
def test_the_caches_go_on_where_they_were(target: Any):
    made, given = joined(target, moved(target)), texts(padded=False)["input_ids"]
    first = made(given[:, :5], use_cache=True)
    rest = made(given[:, 5:], past_key_values=first.past_key_values, use_cache=True)

    assert isinstance(rest.past_key_values, TwoCaches)
    assert rest.past_key_values.get_seq_length() == 9
    torch.testing.assert_close(rest.logits, made(given).logits[:, 5:], rtol=1e-4, atol=1e-4)
    assert made(given, use_cache=False).past_key_values is None


@torch.no_grad()
def test_the_last_places_alone_and_the_loss(target: Any):
    made, given = joined(target, moved(target)), texts(padded=False)
    logits = made(**given).logits
    loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), given["input_ids"][:, 1:].flatten())

    torch.testing.assert_close(made(**given, logits_to_keep=2).logits, logits[:, -2:])
    torch.testing.assert_close(made(**given, labels=given["input_ids"]).loss, loss)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_it_is_read_as_it_was_written_with_tied_words_once(target: Any, dtype: torch.dtype, tmp_path: Path):
    target = target.to(dtype)
    joined(target, moved(target), 1.5).save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    again, told = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    for name, model in (("one", target), ("other", moved(target))):
        model.save_pretrained(tmp_path / name)
    one, other = (AutoModelForCausalLM.from_pretrained(tmp_path / name)(**texts()).logits for name in ("one", "other"))

    assert not any(told.values()), told
    assert (again.config.alpha, again.dtype) == (1.5, dtype)
    assert {tensor.dtype for tensor in stored.values()} == {dtype}
    assert len(stored) == 2 * len(list(target.parameters()))
    assert torch.equal(again.eval()(**texts()).logits, one - 1.5 * torch.relu(other - one))
    assert json.loads((tmp_path / "config.json").read_text())["text_config"].get("_name_or_path") in (None, "")


def test_it_says_the_shape_of_its_networks(target: Any):
    made = joined(target, moved(target))

    assert made.config.get_text_config().to_dict() == {**target.config.to_dict(), "_name_or_path": ""}
    assert models.is_of_two(made)
    assert models.is_of_two(made.config)
    assert not models.is_of_two(target)


@torch.no_grad()
def test_what_there_are_two_of_is_refused(target: Any):
    made, given = joined(target, moved(target)), texts(padded=False)["input_ids"]
    filled = target(given, use_cache=True).past_key_values

    with pytest.raises(ValueError, match="needs its own"):
        made(given, past_key_values=filled)
    for asked in ("output_hidden_states", "output_attentions"):
        with pytest.raises(ValueError, match=f"{asked}: there are two networks"):
            made(given, **{asked: True})
    assert made(given, past_key_values=DynamicCache(config=target.config)).past_key_values.get_seq_length() == 9


@pytest.mark.parametrize("alpha", [-1.0, float("nan"), float("inf"), "much"])
def test_an_alpha_that_is_none_is_refused(alpha: Any):
    with pytest.raises(ValueError, match="alpha is a number from 0 up"):
        WhpConfig(alpha=alpha)


@pytest.mark.usefixtures("dice")
def test_a_network_with_a_memory_of_another_kind_is_refused():
    config = Mamba2Config(hidden_size=32, num_hidden_layers=1, num_heads=4, head_dim=16, state_size=8, vocab_size=50,
                          n_groups=1)  # fmt: skip

    assert not fits(Mamba2ForCausalLM(config))
    with pytest.raises(ValueError, match="Mamba2ForCausalLM keeps no past_key_values"):
        WhpForCausalLM(WhpConfig(text_config=config))


PLAIN = """
import sys
sys.modules["overhaul"] = None
sys.path[:] = [folder for folder in sys.path if not folder.endswith("src")]
import torch
from transformers import AutoModelForCausalLM
directory, out = sys.argv[1:]
try:
    AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=False)
    raise SystemExit("it was read without its code")
except ValueError as error:
    assert "trust_remote_code" in str(error), error
model, told = AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=True, output_loading_info=True)
assert not any(told.values()), told
assert type(model).__module__.startswith("transformers_modules"), type(model).__module__
ids = torch.arange(3, 19).view(2, 8)
torch.save([model.eval()(ids).logits, model.generate(ids, max_new_tokens=8, do_sample=False, eos_token_id=None,
                                                     pad_token_id=0)], out)
model.save_pretrained(directory + "-again")
"""


def test_plain_transformers_reads_it_with_trust_and_never_without(tiny: Path, tmp_path: Path):
    target = loud(AutoModelForCausalLM.from_pretrained(tiny))
    made = joined(target, moved(target), 2.0)
    made.save_pretrained(tmp_path / "made")
    done = python(PLAIN, tmp_path / "made", tmp_path / "out.pt", env={"HF_MODULES_CACHE": str(tmp_path / "hf")})
    assert done.code == 0, done.err

    logits, words = torch.load(tmp_path / "out.pt")
    ids = torch.arange(3, 19).view(2, 8)
    with torch.no_grad():
        torch.testing.assert_close(made(ids).logits, logits, rtol=1e-6, atol=1e-6)
    assert words.tolist() == made.generate(ids, max_new_tokens=8, do_sample=False, eos_token_id=None, pad_token_id=0
                                           ).tolist()  # fmt: skip
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("made", "made-again"))
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert AutoConfig.from_pretrained(tmp_path / "made-again", trust_remote_code=False).alpha == 2.0
