from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
from torch import Tensor

from overhaul.bct.blocks import integers
from overhaul.bct.scheme import Scheme
from overhaul.bct.softmax import exp_table, exponentials, softmax

BLOCK, UNIT = Scheme(probabilities="block", activation_block=16), Scheme(probabilities="unit")


def scores(shape: tuple[int, ...], spread: float = 4.0, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * spread


def causal(tokens: int) -> Tensor:
    return torch.ones(tokens, tokens, dtype=torch.bool).tril()


def test_the_table_is_the_rounded_exponential_for_all_256_codes():
    assert exp_table().tolist() == [round(2**15 * math.exp(-code / 16)) for code in range(256)]


def test_a_row_by_hand_in_whole_numbers():
    row = [3.0, 2.9375, 1.0, -20.0]
    table = [round(2**15 * math.exp(-code / 16)) for code in (0, 1, 32, 255)]

    found = softmax(torch.tensor([row]), None, UNIT)[0]

    assert exponentials(torch.tensor([row]), None)[0].tolist() == table
    wanted = [round(255 * Fraction(number, sum(table))) for number in table]
    assert (found * 255).round().int().tolist() == wanted


@pytest.mark.parametrize("spread", [0.0, 0.1, 1.0, 8.0, 60.0])
def test_rows_of_unit_probabilities_sum_to_255_within_half_a_unit_a_key(spread):
    tokens = 64
    p_TS = softmax(scores((tokens, tokens), spread), causal(tokens), UNIT) * 255

    numbers = p_TS.round()
    torch.testing.assert_close(p_TS, numbers, atol=1e-4, rtol=0)
    seen_T = torch.arange(1, tokens + 1)
    assert ((numbers.sum(-1) - 255).abs() <= seen_T / 2).all()
    assert numbers[0].tolist() == [255] + [0] * (tokens - 1)


@pytest.mark.parametrize("spread", [0.0, 0.1, 1.0, 8.0, 60.0])
def test_rows_with_a_shift_per_block_sum_to_one(spread):
    p_TS = softmax(scores((64, 64), spread), causal(64), BLOCK)

    # Half a step of 1/64 of the block's largest, which is at most its sum, for each of 16 keys at the worst.
    assert ((p_TS.sum(-1) - 1).abs() <= 16 / 128).all()
    value, _ = integers(p_TS, 16)
    assert value.min() == 0
    assert value.max() <= 127


@pytest.mark.parametrize("scheme", [BLOCK, UNIT], ids=["block", "unit"])
def test_the_order_of_scores_is_kept_among_those_of_one_scale(scheme):
    row_TS = scores((32, 64)).sort(-1).values

    p_TS = softmax(row_TS, None, scheme)

    assert (p_TS.unflatten(-1, (4, 16)).diff(dim=-1) >= 0).all()
    # Between blocks of other shifts by half a step of each: a 128th of the largest here, at most.
    allowed = 0.0 if scheme is UNIT else 2 / 128
    assert (p_TS.diff(dim=-1) >= -allowed * p_TS.amax(-1, keepdim=True)).all()


def test_it_is_near_torchs_softmax():
    row_TS = scores((64, 128), 2.0)

    p_TS = softmax(row_TS, None, Scheme(activation_block=32))

    # A thirty-second of a nat at most, and half a step of a block.
    assert ((p_TS - row_TS.softmax(-1)).abs() <= 0.04 * row_TS.softmax(-1).amax(-1, keepdim=True)).all()


def test_what_is_masked_does_not_count_even_as_the_maximum():
    row_TS = scores((8, 8))
    hidden = row_TS.clone()
    hidden[~causal(8)] = 1e4

    for scheme in (BLOCK, UNIT):
        assert torch.equal(softmax(hidden, causal(8), scheme), softmax(row_TS, causal(8), scheme))
        assert (softmax(hidden, causal(8), scheme)[~causal(8)] == 0).all()


def test_a_row_that_sees_nothing_is_zero():
    p_TS = softmax(scores((2, 4)), torch.tensor([[False], [True]]).expand(2, 4), BLOCK)

    assert (p_TS[0] == 0).all()
    assert p_TS[1].sum() > 0.9


def test_many_equal_keys_vanish_in_units_of_1_255_and_not_in_blocks():
    flat = torch.zeros(1, 1024)

    assert softmax(flat, None, UNIT).sum() == 0
    assert softmax(flat, None, BLOCK).sum() == pytest.approx(1, abs=2**-7)
