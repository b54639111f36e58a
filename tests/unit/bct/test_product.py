from __future__ import annotations

from fractions import Fraction
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from overhaul.bct.blocks import decode, encode, snap
from overhaul.bct.product import exact_product, float_product, integer_product, refuse_overflow
from overhaul.bct.scheme import LONGEST_INNER
from overhaul.errors import UserError

sizes = st.tuples(st.integers(1, 4), st.integers(1, 4), st.integers(1, 24))
columns = st.integers(1, 9)


def draw(shape: tuple[int, ...], seed: int) -> Tensor:
    """Numbers of very different size, some of them zero."""
    generator = torch.Generator().manual_seed(seed)
    size = torch.exp2(torch.randint(-6, 7, shape, generator=generator).float())
    return torch.randn(shape, generator=generator) * size * (torch.rand(shape, generator=generator) > 0.2)


def blocks_of(row: Tensor, columns: int, qmax: int) -> list[tuple[list[int], int]]:
    """Integers and shift of each block of a row on the grid, in Python's numbers."""
    found = []
    for part in row.split(columns):
        encoded = encode(part[None], (1, len(part)), 8 if qmax == 127 else 4)
        found.append((encoded.values[0].tolist(), int(encoded.scale)))
    return found


def machine(x: Tensor, w: Tensor, x_columns: int, w_columns: int, w_qmax: int) -> Fraction:
    """What an integer machine computes for a row of X and a row of W: no floats anywhere."""
    x_blocks, w_blocks = blocks_of(x, x_columns, 127), blocks_of(w, w_columns, w_qmax)
    cuts = sorted({0, len(x), *range(0, len(x), x_columns), *range(0, len(x), w_columns)})
    partial = []
    for start, end in pairwise(cuts):
        (x_q, x_e), (w_q, w_e) = x_blocks[start // x_columns], w_blocks[start // w_columns]
        inner = range(start, end)
        total = sum(x_q[i % x_columns] * w_q[i % w_columns] for i in inner)
        assert abs(total) < 2**31
        if any(x_q) and any(w_q):
            partial.append((total, x_e + w_e))
    if not partial:
        return Fraction(0)
    smallest = min(exponent for _, exponent in partial)
    # A shift to the right with rounding to even.
    total = sum(round(Fraction(number, 2 ** (exponent - smallest))) for number, exponent in partial)
    return total * Fraction(2) ** -smallest


@given(sizes, columns, columns, st.sampled_from([8, 4]), st.integers(0, 10**6))
@settings(deadline=None, max_examples=150)
def test_integer_products_are_those_of_a_machine_without_floats(size, x_columns, w_columns, bits, seed):
    num_rows, num_out, inner = size
    x_columns, w_columns = min(x_columns, inner), min(w_columns, inner)
    x_NK = snap(draw((num_rows, inner), seed), x_columns)
    encoded = encode(draw((num_out, inner), seed + 1), (1, w_columns), bits)
    w_OK = decode(encoded.values, encoded.scale, encoded.block)

    y_NO = integer_product(x_NK, w_OK, x_columns, w_columns, encoded.scale)

    for n in range(num_rows):
        for o in range(num_out):
            wanted = machine(x_NK[n], w_OK[o], x_columns, w_columns, 127 if bits == 8 else 7)
            assert y_NO[n, o].item() == float(wanted)


@given(sizes, columns, st.integers(0, 10**6))
@settings(deadline=None, max_examples=80)
def test_float_products_are_exact_up_to_the_rounding_of_sums(size, columns, seed):
    num_rows, num_out, inner = size
    x_NK, w_OK = (snap(draw((n, inner), seed + n), columns) for n in (num_rows, num_out))

    y_NO = float_product(x_NK, w_OK)

    for n in range(num_rows):
        for o in range(num_out):
            terms = [Fraction(a) * Fraction(b) for a, b in zip(x_NK[n].tolist(), w_OK[o].tolist(), strict=True)]
            bound = inner * Fraction(2) ** -24 * sum(map(abs, terms))
            assert abs(Fraction(y_NO[n, o].item()) - sum(terms)) <= bound


def test_a_partial_sum_with_one_exponent_is_exact_in_fp32():
    generator = torch.Generator().manual_seed(0)
    x_NK, w_OK = (torch.randint(-127, 128, (40, 1040), generator=generator) for _ in range(2))
    x_NK[0], w_OK[0] = 127, 127

    y_NO = float_product(x_NK.float() * 2.0**-9, w_OK.float() * 2.0**5)

    assert torch.equal(y_NO.double() * 16, (x_NK @ w_OK.t()).double())


@given(sizes, columns, columns, st.integers(0, 10**6))
@settings(deadline=None, max_examples=80)
def test_exact_products_are_rounded_once(size, p_columns, v_columns, seed):
    num_rows, width, keys = size
    p_NK = snap(draw((num_rows, keys), seed).abs(), p_columns)
    v_KO = snap(draw((keys, width), seed + 1), v_columns)

    y_NO = exact_product(p_NK, v_KO.t())

    for n in range(num_rows):
        for o in range(width):
            pairs = zip(p_NK[n].tolist(), v_KO[:, o].tolist(), strict=True)
            exact = sum(Fraction(a) * Fraction(b) for a, b in pairs)
            assert y_NO[n, o].item() == torch.tensor(float(exact)).item()


def test_heads_are_multiplied_each_for_itself():
    q, k = snap(draw((2, 3, 5, 8), 0), 4), snap(draw((2, 3, 7, 8), 1), 8)

    y = integer_product(q, k, 4, 8)

    assert y.shape == (2, 3, 5, 7)
    assert torch.equal(y[1, 2], integer_product(q[1, 2], k[1, 2], 4, 8))


def test_sums_that_could_leave_int32_are_refused():
    refuse_overflow("down_proj", LONGEST_INNER)
    with pytest.raises(UserError, match="down_proj"):
        refuse_overflow("down_proj", LONGEST_INNER + 1)


def test_autocast_does_not_narrow_a_product():
    x, w = snap(draw((4, 32), 0), 8), snap(draw((4, 32), 1), 8)

    with torch.autocast("cpu", torch.bfloat16):
        assert (x @ w.t()).dtype == torch.bfloat16
        inside = float_product(x, w)
    assert inside.dtype == torch.float32
    assert torch.equal(inside, float_product(x, w))
