"""Blocks of 8 bits against those of bitsandbytes, and rows against torch's quantization per channel."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from overhaul import artifact
from overhaul.bct.blocks import decode, encode

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def weights(smol: Path) -> dict[str, Tensor]:
    """One matrix of each kind, of a block in the middle."""
    model = artifact.load(smol, dtype=torch.float32).model
    names = ("self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj")
    return {name: model.get_parameter(f"model.layers.15.{name}.weight").detach() for name in names}


def squared_error(weight: Tensor, elements: int, scale: str) -> float:
    """Of blocks of so many consecutive weights, as bitsandbytes cuts them."""
    rows = weight.reshape(1, -1)
    encoded = encode(rows, (1, elements), 8, scale)
    return float((decode(encoded.values, encoded.scale, encoded.block) - rows).square().mean())


@pytest.mark.filterwarnings("ignore")  # of the peer's own imports
@pytest.mark.parametrize("elements", [64, 256, 1024, 4096])
def test_the_error_is_not_above_that_of_bitsandbytes(elements, weights):
    functional = pytest.importorskip("bitsandbytes.functional")

    for name, weight in weights.items():
        integers, state = functional.quantize_blockwise(weight.reshape(-1), blocksize=elements)
        theirs = float((functional.dequantize_blockwise(integers, state) - weight.reshape(-1)).square().mean())
        # Its map is finer near zero and coarser near the largest value; weights in a block are nearly normal.
        assert squared_error(weight, elements, "fp32") <= theirs, name


def test_a_power_of_two_costs_at_most_four_times_the_squared_error(weights):
    for weight in weights.values():
        assert squared_error(weight, 64, "fp32") <= squared_error(weight, 64, "shift")
        assert squared_error(weight, 64, "shift") <= 4.1 * squared_error(weight, 64, "fp32")


def test_rows_are_those_of_torchs_quantization_per_channel(weights):
    for weight in weights.values():
        encoded = encode(weight, (1, weight.shape[1]), 8, "fp32")
        scale_O = encoded.scale[:, 0]

        theirs = torch.fake_quantize_per_channel_affine(
            weight, scale_O, torch.zeros_like(scale_O, dtype=torch.int32), 0, -127, 127
        )

        assert torch.equal(decode(encoded.values, encoded.scale, encoded.block), theirs)
