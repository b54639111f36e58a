from __future__ import annotations

from fractions import Fraction
from itertools import pairwise
from math import inf, nan

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from overhaul.bct.blocks import (
    MAX_EXPONENT,
    QMAX,
    decode,
    encode,
    fitting_exponent,
    integers,
    pack,
    power_of_two,
    snap,
    stored_bytes,
    unpack,
)

numbers = st.floats(-1e6, 1e6, width=32)
rows = st.lists(numbers, min_size=1, max_size=40)
shapes = st.tuples(st.integers(1, 9), st.integers(1, 9))
bits = st.sampled_from([4, 8])


def by_hand(block: list[float], bits: int) -> tuple[list[int], int]:
    """Integers and shift of one block by the definition, in exact arithmetic."""
    top = max(abs(Fraction(x)) for x in block)
    shifts = [e for e in range(-128, MAX_EXPONENT + 1) if top * Fraction(2) ** e <= QMAX[bits]]
    if top == 0 or top * Fraction(2) ** (MAX_EXPONENT + 1) <= QMAX[bits]:
        return [0] * len(block), 0
    return [round(Fraction(x) * Fraction(2) ** shifts[-1]) for x in block], shifts[-1]


def matrix(shape: tuple[int, int], seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    ("block", "bits", "integers", "shift"),
    [
        ([127.0, -1.0], 8, [127, -1], 0),
        ([127.5, 1.0], 8, [64, 0], -1),  # 63.75 and one half, which rounds to even
        ([1.0, 0.5, -0.25], 8, [64, 32, -16], 6),
        ([0.0, 0.0], 8, [0, 0], 0),
        ([2.5, 0.5, -1.5], 8, [80, 16, -48], 5),
        ([7.0, -3.0], 4, [7, -3], 0),
        ([7.5, 3.0], 4, [4, 2], -1),  # 3.75 and one and a half
        ([0.625, 0.125], 4, [5, 1], 3),
        ([1e-37, 0.0], 8, [0, 0], 0),  # flushed
    ],
)
def test_small_blocks_by_hand(block, bits, integers, shift):
    encoded = encode(torch.tensor([block]), (1, len(block)), bits)

    assert encoded.values.tolist() == [integers]
    assert encoded.scale.tolist() == [[shift]]


@given(rows, bits)
@settings(deadline=None)
def test_a_block_is_what_the_definition_says(block, bits):
    encoded = encode(torch.tensor([block]), (1, len(block)), bits)

    assert (encoded.values[0].tolist(), int(encoded.scale)) == by_hand(block, bits)


@given(rows, bits, st.sampled_from(["shift", "fp16", "fp32"]))
@settings(deadline=None)
def test_no_value_moves_by_more_than_half_a_step(block, bits, scale):
    block = [x / 64 for x in block]
    encoded = encode(torch.tensor([block]), (1, len(block)), bits, scale)

    step = Fraction(float(encoded.scale)) if scale != "shift" else Fraction(2) ** -int(encoded.scale)
    half = step * (Fraction(1, 2) + Fraction(QMAX[bits], 2**23))  # a float scale is divided by in fp32
    assert all(abs(Fraction(x) - step * q) <= half for x, q in zip(block, encoded.values[0].tolist(), strict=True))


def test_the_bound_of_float_scales_does_not_grow_when_blocks_are_split():
    x_RC = matrix((8, 64))
    bounds = [encode(x_RC, (1, columns), 8, "fp32").scale.repeat_interleave(columns, 1) for columns in (64, 16, 4, 1)]

    for coarse, fine in pairwise(bounds):
        assert (fine <= coarse).all()


@given(shapes, shapes, bits)
@settings(deadline=None)
def test_ragged_blocks_are_those_of_the_part_that_is_there(shape, block, bits):
    x_RC = matrix(shape)
    block = (min(block[0], shape[0]), min(block[1], shape[1]))
    encoded = encode(x_RC, block, bits)
    decoded_RC = decode(encoded.values, encoded.scale, block)

    assert encoded.values.shape == decoded_RC.shape == shape
    for row in range(0, shape[0], block[0]):
        for column in range(0, shape[1], block[1]):
            part = x_RC[row : row + block[0], column : column + block[1]]
            integers, shift = by_hand(part.flatten().tolist(), bits)
            assert int(encoded.scale[row // block[0], column // block[1]]) == shift
            expected = torch.tensor(integers, dtype=torch.float64) * 2.0**-shift
            there = decoded_RC[row : row + block[0], column : column + block[1]]
            assert torch.equal(there.double().flatten(), expected)


@given(rows, st.integers(1, 50))
@settings(deadline=None)
def test_what_was_encoded_is_encoded_to_itself(block, columns):
    once = snap(torch.tensor(block), columns)

    assert torch.equal(snap(once, columns), once)
    value, shift = integers(once, columns)
    again = value.float() * power_of_two(-shift)
    assert torch.equal(again.flatten()[: len(block)], once)
    assert int(value.abs().max()) <= 127


@pytest.mark.parametrize("columns", [1, 2, 8, 100])
def test_snap_is_encode_and_decode_of_each_row(columns):
    x_RC = matrix((5, 24))
    encoded = encode(x_RC, (1, min(columns, 24)))

    assert torch.equal(snap(x_RC, columns), decode(encoded.values, encoded.scale, encoded.block))


def test_shifts_are_whole_powers_over_their_whole_range():
    shifts = torch.arange(-MAX_EXPONENT, MAX_EXPONENT + 1)

    assert power_of_two(shifts).tolist() == [2.0**e for e in shifts.tolist()]


@pytest.mark.parametrize("qmax", [7, 127])
def test_the_largest_shift_is_found_next_to_every_power_of_two(qmax):
    near = [x for e in range(-110, 120) for x in (2.0**e * (1 - 2**-24), 2.0**e, 2.0**e * (1 + 2**-23), qmax * 2.0**e)]
    shift, fits = fitting_exponent(torch.tensor(near), qmax)

    assert fits.all()
    for x, e in zip(torch.tensor(near).tolist(), shift.tolist(), strict=True):
        assert Fraction(x) * Fraction(2) ** e <= qmax < Fraction(x) * Fraction(2) ** (e + 1)


def test_blocks_that_are_too_small_are_counted():
    encoded = encode(torch.tensor([[2.0**-121, 0.0, 0.0, 0.0, 1.0, 2.0**-130]]), (1, 2))

    assert encoded.flushed == 1
    assert encoded.values.tolist() == [[0, 0, 0, 0, 64, 0]]


@pytest.mark.parametrize("width", [1, 2, 7, 8])
def test_two_integers_a_byte_come_back(width):
    values_RC = torch.arange(3 * width).view(3, width).remainder(15).sub(7).to(torch.int8)
    packed = pack(values_RC)

    assert packed.shape == (3, (width + 1) // 2)
    assert torch.equal(unpack(packed, width), values_RC)


def test_all_pairs_of_integers_have_their_own_byte():
    pairs = torch.cartesian_prod(torch.arange(-7, 8), torch.arange(-7, 8)).to(torch.int8)

    assert len(set(pack(pairs).flatten().tolist())) == 225


@pytest.mark.parametrize(
    ("shape", "block", "bits", "scale", "wanted"),
    [
        ((64, 1024), (1, 64), 8, "shift", 64 * 1024 + 64 * 16),
        ((64, 1024), (1, 1024), 4, "shift", 64 * 512 + 64),
        ((64, 1024), (16, 64), 4, "fp16", 64 * 512 + 4 * 16 * 2),
        ((3, 5), (2, 2), 4, "fp32", 3 * 3 + 2 * 3 * 4),
    ],
)
def test_bytes_are_those_of_the_tensors(shape, block, bits, scale, wanted):
    encoded = encode(matrix(shape), block, bits, scale)
    values = encoded.values if bits == 8 else pack(encoded.values)

    assert stored_bytes(shape, block, bits, scale) == wanted
    assert values.numel() + encoded.scale.numel() * encoded.scale.element_size() == wanted


@pytest.mark.parametrize(("elements", "ratio"), [(256, 7.938), (512, 7.969), (1024, 7.984), (2048, 7.992)])
def test_ratios_to_fp32_are_32_over_w_and_m_over_b(elements, ratio):
    shape = (64, 2048)

    assert 4 * 64 * 2048 / stored_bytes(shape, (1, elements), 4, "shift") == pytest.approx(ratio, abs=5e-4)


@pytest.mark.parametrize("bad", [nan, inf, -inf])
def test_values_that_are_no_numbers_are_refused(bad):
    with pytest.raises(ValueError, match="1 values are NaN"):
        encode(torch.tensor([[1.0, bad]]), (1, 2))
    assert not snap(torch.tensor([1.0, bad]), 2).isfinite().all()


def test_only_matrices_of_floats_have_blocks():
    with pytest.raises(ValueError, match="matrix of floats"):
        encode(torch.ones(2, 2, dtype=torch.int64), (1, 2))
    with pytest.raises(ValueError, match="matrix of floats"):
        encode(torch.ones(4), (1, 2))


def test_values_too_large_for_a_scale_are_refused():
    with pytest.raises(ValueError, match="fp16"):
        encode(torch.tensor([[1e8]]), (1, 1), 8, "fp16")
