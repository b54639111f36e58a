"""The arithmetic of LLM.int8(): closed forms, numpy's integers, and the bound on the error."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from overhaul import int8
from overhaul.int8 import Kind

KINDS = [
    Kind(granularity=granularity, zero_point=zero_point)
    for granularity in ("vector", "row", "tensor")
    for zero_point in (False, True)
]


def drawn(*shape: int, seed: int = 0, scale: float = 1.0) -> torch.Tensor:
    return scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_a_row_by_hand():
    scale = int8.scale_of(torch.tensor([[1.0, -2.0, 0.5]]))

    assert scale.constant.tolist() == [[2.0]]
    assert int8.integers_of(torch.tensor([[1.0, -2.0, 0.5]]), scale).tolist() == [[64.0, -127.0, 32.0]]


def test_a_row_with_zero_point_by_hand():
    x_RI = torch.tensor([[-1.0, 0.0, 4.1]])
    scale = int8.scale_of(x_RI, zero_point=True)

    assert scale.step.item() == pytest.approx(5.1 / 255)
    assert scale.zero is not None
    assert scale.zero.item() == -50 + 128
    assert int8.integers_of(x_RI, scale).tolist() == [[-128.0, -78.0, 127.0]]


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_zeros_stay_zeros_in_rows_of_zeros_and_in_others(kind: Kind):
    weight_OI = drawn(6, 40)
    weight_OI[2] = 0.0
    weight_OI[:, 5] = 0.0
    weight_OI[4] = weight_OI[4].abs()  # a range that would not reach down to zero by itself

    q_OI, scale = int8.quantize_weight(weight_OI, kind)
    back_OI = int8.numbers_of(q_OI, scale)

    assert (back_OI[weight_OI == 0] == 0).all()
    assert back_OI.isfinite().all()
    assert ((back_OI - weight_OI).abs() <= scale.step * 0.5001).all()


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_the_product_of_the_integers_is_numpys_bit_for_bit(kind: Kind):
    x_NI, weight_OI = drawn(20, 1100), drawn(7, 1100, seed=1)
    rows, (q_OI, scale) = int8.quantize_rows(x_NI, kind), int8.quantize_weight(weight_OI, kind)

    q_NI = rows.integers.as_int8.numpy().astype(np.int64)
    z_N1 = 0 if rows.scale.zero is None else rows.scale.zero.numpy().astype(np.int64)
    z_O1 = 0 if scale.zero is None else scale.zero.numpy().astype(np.int64)
    exact_NO = (q_NI + z_N1) @ (q_OI.numpy().astype(np.int64) + z_O1).T

    wanted_NO = torch.from_numpy(exact_NO).float() * scale.step[:, 0] * rows.scale.step
    assert torch.equal(int8.product(rows, q_OI, scale), wanted_NO)


def error_bound(x_NI: torch.Tensor, weight_OI: torch.Tensor) -> torch.Tensor:
    """The largest error that vector-wise rounding can make in each entry of x W^T, (N, O), without outlier columns.

    I (c_x / 254 * max|W| + c_w / 254 * max|x| + c_x c_w / 254^2), the largest magnitudes being those of the rows.
    """
    c_N1, c_O = x_NI.abs().amax(1, keepdim=True), weight_OI.abs().amax(1)
    return x_NI.shape[1] * (2 / 254 + 1 / 254**2) * c_N1 * c_O


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 12), st.integers(1, 70), st.integers(1, 9), st.integers(0, 2**31), st.floats(1e-3, 1e3))
def test_no_entry_is_further_off_than_the_bound(rows: int, inputs: int, outputs: int, seed: int, scale: float):
    x_NI, weight_OI = drawn(rows, inputs, seed=seed, scale=scale), drawn(outputs, inputs, seed=seed + 1)
    kind = Kind(threshold=0)

    y_NO = int8.product(int8.quantize_rows(x_NI, kind), *int8.quantize_weight(weight_OI, kind))

    off_NO = (y_NO.double() - x_NI.double() @ weight_OI.double().T).abs()
    assert (off_NO <= error_bound(x_NI.double(), weight_OI.double()) * (1 + 1e-5)).all()


def test_outlier_columns_are_those_that_reach_the_threshold_in_any_row():
    x_NI = drawn(5, 8).clamp(-3, 3)
    x_NI[1, 2], x_NI[4, 6] = 6.0, -7.0

    assert int8.quantize_rows(x_NI, Kind()).columns.tolist() == [2, 6]
    assert int8.quantize_rows(x_NI, Kind(threshold=0)).columns.tolist() == []
    assert int8.quantize_rows(x_NI, Kind(threshold=7.5)).columns.tolist() == []


@pytest.mark.parametrize("zero_point", [False, True])
def test_constants_are_taken_over_entries_below_the_threshold_not_over_the_other_columns(zero_point: bool):
    x_NI = torch.tensor([[1.0, 5.0, -2.0], [0.5, 60.0, 1.0]])

    rows = int8.quantize_rows(x_NI, Kind(zero_point=zero_point))

    # Row 0 has 5.0 in the outlier column, which is no outlier itself: it counts.
    wanted = [[7.0 * 127 / 255], [1.0 * 127 / 255]] if zero_point else [[5.0], [1.0]]
    torch.testing.assert_close(rows.scale.constant, torch.tensor(wanted))
    stands_for_zero = 0.0 if rows.scale.zero is None else -rows.scale.zero[:, 0]
    assert (rows.integers.fp32_NI[:, 1] == stands_for_zero).all()


def test_tiny_and_infinite_activations():
    x_NI = torch.tensor([[1e-38, -1e-38, 0.0], [1.0, float("inf"), 2.0], [float("nan"), 1.0, 2.0]])

    rows = int8.quantize_rows(x_NI, Kind())

    assert rows.integers.fp32_NI[0].tolist() == [0, 0, 0]
    assert rows.columns.tolist() == [1]
    assert rows.scale.constant[:2].flatten().tolist() == [pytest.approx(1e-38), 2.0]
    assert rows.scale.constant[2].isnan()  # what is not a number is not hidden, and hides no outliers of other rows


def test_one_constant_for_a_tensor_is_the_largest_of_its_rows():
    x_NI = drawn(4, 16)

    assert int8.scale_of(x_NI, whole=True).constant.tolist() == [[float(x_NI.abs().max())]]
    constants = int8.quantize_weight(x_NI, Kind(granularity="row"))[1].constant
    assert constants.flatten().tolist() == [float(x_NI.abs().max())] * 4
