from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from overhaul.delta import Delta, fingerprint
from overhaul.errors import UserError


@pytest.fixture
def base() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "same": torch.randn(4, 5, generator=generator),
        "sparse": torch.randn(30, 10, generator=generator),
        "dense": torch.randn(8, 8, generator=generator).bfloat16(),
        "scalar": torch.tensor(2.0),
    }


@pytest.fixture
def tuned(base: dict[str, Tensor]) -> dict[str, Tensor]:
    changed = {name: tensor.clone() for name, tensor in base.items()}
    changed["sparse"][3, 4] += 1.0
    changed["dense"] += 0.5
    changed["scalar"] += 1
    return changed


def test_base_plus_the_change_is_the_tuned_model(base: dict[str, Tensor], tuned: dict[str, Tensor]) -> None:
    made = Delta.between(base, tuned).apply(base)
    assert all(torch.equal(made[name], tuned[name]) and made[name].dtype == tuned[name].dtype for name in base)


def test_what_did_not_change_costs_nothing_and_little_costs_little(
    base: dict[str, Tensor], tuned: dict[str, Tensor]
) -> None:
    delta = Delta.between(base, tuned)
    assert set(delta.changes) == {"sparse", "dense", "scalar"}
    assert delta.changes["sparse"].bytes == 12
    assert delta.bytes == 12 + 4 * 64 + 4
    assert Delta.between(base, base).bytes == 0


def test_scaled_by_minus_one_it_undoes_itself(base: dict[str, Tensor], tuned: dict[str, Tensor]) -> None:
    delta = Delta.between(base, tuned)
    nothing = delta.add(delta.scale(-1)).apply(base)
    assert all(torch.equal(nothing[name], base[name]) for name in base)


def test_saved_and_loaded_is_the_same(base: dict[str, Tensor], tuned: dict[str, Tensor], tmp_path: Path) -> None:
    delta = Delta.between(base, tuned)
    delta.save(tmp_path / "delta.safetensors")
    made = Delta.load(tmp_path / "delta.safetensors").apply(base)
    assert all(torch.equal(made[name], tuned[name]) for name in base)


def test_another_base_is_refused(base: dict[str, Tensor], tuned: dict[str, Tensor]) -> None:
    delta = Delta.between(base, tuned)
    with pytest.raises(UserError, match="another base"):
        delta.apply(tuned)
    with pytest.raises(UserError, match="different base"):
        delta.add(Delta.between(tuned, base))
    with pytest.raises(UserError, match="more than values"):
        Delta.between(base, {"same": base["same"]})
    assert fingerprint(base) != fingerprint(tuned)
