"""Random bases: drawn as peft draws them, told apart by a checksum."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import RandLoraConfig, VeraConfig, get_peft_model
from torch import nn

from overhaul.errors import UserError
from overhaul.random_bases import RandLoRABases, VeRABases

SHAPES = [(24, 16), (16, 40)]


class Two(nn.Module):
    """Layers of these shapes, as peft wants them."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = (nn.Linear(i, o) for o, i in SHAPES)


@pytest.mark.parametrize("kind", ["dense", "sparse", "very_sparse"])
@pytest.mark.parametrize("rank", [5, 8])
def test_randlora_draws_what_peft_draws(kind: Any, rank: int):
    flags = {kind: True} if kind != "dense" else {}
    config = RandLoraConfig(r=rank, target_modules=["up", "down"], projection_prng_key=7, **flags)
    theirs: Any = get_peft_model(Two(), config).base_model  # pyright: ignore[reportArgumentType]

    bases = RandLoRABases.draw(SHAPES, rank, key=7, kind=kind)

    assert torch.equal(bases.A_Rd, theirs.randlora_A["default"][:, 0].float())
    assert torch.equal(bases.B_DNR, theirs.randlora_B["default"].float())


def test_vera_draws_what_peft_draws():
    theirs: Any = get_peft_model(
        Two(), VeraConfig(r=6, target_modules=["up", "down"], projection_prng_key=7)
    ).base_model  # pyright: ignore

    bases = VeRABases.draw(SHAPES, 6, key=7)

    torch.testing.assert_close(bases.A_RI, theirs.vera_A["default"])
    torch.testing.assert_close(bases.B_OR, theirs.vera_B["default"])


def test_ternary_bases_have_the_promised_share_of_zeros():
    sparse = RandLoRABases.draw([(400, 100)], 10, kind="sparse")
    very_sparse = RandLoRABases.draw([(400, 100)], 10, kind="very_sparse")

    assert (sparse.B_DNR == 0).float().mean() == pytest.approx(2 / 3, abs=0.01)
    assert (very_sparse.B_DNR == 0).float().mean() == pytest.approx(1 - 1 / 10, abs=0.01)
    for bases in (sparse, very_sparse):
        assert bases.B_DNR.unique().numel() == 3
        assert bases.B_DNR.std() == pytest.approx(1, abs=1e-4)


def test_a_checksum_belongs_to_a_key_a_rank_a_kind_and_the_shapes():
    made = [
        RandLoRABases.draw(SHAPES, 4),
        RandLoRABases.draw(SHAPES, 4, key=1),
        RandLoRABases.draw(SHAPES, 5),
        RandLoRABases.draw(SHAPES, 4, kind="sparse"),
        RandLoRABases.draw([*SHAPES, (41, 4)], 4),
    ]

    assert len({bases.checksum() for bases in made}) == len(made)
    assert RandLoRABases.draw(SHAPES, 4).checksum() == made[0].checksum()


def test_a_layer_larger_than_the_shared_bases_is_refused_with_the_sizes():
    bases = RandLoRABases.draw(SHAPES, 8)

    with pytest.raises(UserError, match="64 x 16 needs 2 bases of 64 x 8; the shared ones are 3 of 40 x 8"):
        bases.part(64, 16)
