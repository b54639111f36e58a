"""Which parameters each update rule takes, and what its state weighs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from transformers import AutoModelForCausalLM

from overhaul.adapt.full import Full
from overhaul.errors import UserError
from overhaul.matrices import manifest
from overhaul.method import Projection
from overhaul.optim.build import build, state_bytes
from overhaul.optim.low_rank import LowRankAdamW


@pytest.fixture
def model(tiny: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(tiny)


def settings(optimizer: Any, **projection: Any) -> Full:
    return Full(optimizer=optimizer, projection=Projection(**projection))


def test_adamw_is_torchs_over_all_parameters_in_their_order(model: Any):
    rule = build(settings("adamw"), model.parameters(), model=model)

    assert type(rule) is torch.optim.AdamW
    assert [id(p) for p in rule.param_groups[0]["params"]] == [id(p) for p in model.parameters()]


def test_only_matrices_of_attention_and_mlp_above_the_rank_are_projected(model: Any, capsys: Any):
    rule = build(settings("fira", rank=32), model.parameters(), model=model)

    projected, rest = (group["params"] for group in rule.param_groups)
    names = {id(listed.parameter): listed.name for listed in manifest(model)}
    kinds = {names[id(p)].split(".")[-2] for p in projected}
    assert kinds == {"q_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}, "k and v have a side of 32"
    assert len(projected) + len(rest) == len(names)
    assert "4 of 14 matrices have a side of at most --projection.rank 32" in capsys.readouterr().err


def test_galore_is_fira_without_what_is_added(model: Any):
    galore, fira = (build(settings(name, rank=8), model.parameters(), model=model) for name in ("galore", "fira"))

    assert galore.param_groups[0]["residual"] == "none"
    assert fira.param_groups[0]["residual"] == "released"


def test_without_a_model_all_parameters_belong_to_a_block(model: Any):
    rule = build(settings("galore", rank=8), model.model.layers[0].mlp.parameters())

    assert isinstance(rule, LowRankAdamW)
    assert len(rule.param_groups) == 1


def test_nothing_to_project_is_refused_with_a_rank_that_would_do(model: Any):
    with pytest.raises(UserError, match=r"smaller sides of 32, 64, none above --projection.rank 64\ntry: .*rank 16"):
        build(settings("galore"), model.parameters(), model=model)
    with pytest.raises(UserError, match="no matrix of attention or MLP is trained"):
        build(settings("galore"), model.model.norm.parameters(), model=model)


@pytest.mark.parametrize("optimizer", ["adamw", "adamw8bit", "galore", "fira"])
def test_the_state_weighs_what_was_foretold(optimizer: str, model: Any):
    if optimizer == "adamw8bit":
        pytest.importorskip("bitsandbytes")
    chosen = settings(optimizer) if optimizer.startswith("adamw") else settings(optimizer, rank=8)
    rule = build(chosen, model.parameters(), model=model)
    foretold = state_bytes(rule)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)

    rule.step()

    tensors = {id(v): v for state in rule.state.values() for v in state.values() if isinstance(v, torch.Tensor)}
    assert sum(tensor.nbytes for tensor in tensors.values()) == foretold


def test_8_bit_states_take_a_quarter_and_update_as_adamw_does(model: Any):
    pytest.importorskip("bitsandbytes")
    weights = [torch.nn.Parameter(torch.ones(128, 64)) for _ in range(2)]
    eight, plain = (
        build(settings(name), [weight]) for name, weight in zip(("adamw8bit", "adamw"), weights, strict=True)
    )
    for step in range(10):
        gradient = torch.randn(128, 64, generator=torch.Generator().manual_seed(step))
        for weight, rule in zip(weights, (eight, plain), strict=True):
            weight.grad = gradient.clone()
            rule.step()

    assert state_bytes(eight) < 0.3 * state_bytes(plain)
    ours, theirs = (weight.detach() - 1 for weight in weights)
    assert float(torch.cosine_similarity(ours.flatten(), theirs.flatten(), dim=0)) > 0.95


def test_8_bits_without_the_package_is_refused_with_what_to_install(model: Any, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)

    with pytest.raises(UserError, match="pip install 'bitsandbytes"):
        build(settings("adamw8bit"), model.parameters(), model=model)


def test_galore_projects_from_both_sides():
    """What fira adds has no columns to scale by then; galore adds nothing."""
    Full.model_validate({"optimizer": "galore", "projection": {"side": "full"}})
    Full.model_validate({"optimizer": "fira", "projection": {"side": "full", "scaling": "matrix"}})


# Several processes, and settings that nothing would read.


def test_what_several_processes_cannot_do_is_refused(model: Any, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="--per-layer"):
        build(Full(per_layer=True, clip=0), model.parameters(), model=model)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(UserError, match="fira needs whole matrices"):
        build(settings("fira", rank=8), model.parameters(), model=model)


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"projection": {"rank": 8}}, "projection.rank is read by optimizer galore and fira"),
        ({"optimizer": "galore", "projection": {"limiter": 0}}, "projection.limiter is of what fira adds"),
        ({"optimizer": "fira", "projection": {"side": "full"}}, "use projection.scaling matrix or none"),
        ({"optimizer": "fira", "projection": {"side": "up"}}, "'std', 'reverse_std', 'left', 'right' or 'full'"),
        ({"optimizer": "fira", "projection": {"rank": 0}}, "greater than 0"),
        ({"optimizer": "fira", "projection": {"gap": 0}}, "greater than 0"),
        ({"per_layer": True}, "use clip 0, not 1"),
        ({"per_layer": True, "clip": 0, "accumulate": 2}, "use accumulate 1, not 2"),
    ],
)
def test_settings_that_would_not_be_read_are_refused(given: dict[str, Any], told: str):
    with pytest.raises(ValidationError, match=told):
        Full(**given)
