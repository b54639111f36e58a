from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from overhaul.sparsity import Pattern, Target, keep_all_but_each, keep_mask, keep_mask_pattern, row_quotas


def mask_by_argsort(score_N: torch.Tensor, count: int) -> torch.Tensor:
    mask_N = torch.ones(len(score_N), dtype=torch.bool)
    mask_N[score_N.argsort(stable=True)[:count]] = False
    return mask_N


@settings(deadline=None, max_examples=60)
@given(
    rows=st.integers(1, 7),
    columns=st.integers(1, 9),
    levels=st.integers(1, 5),
    share=st.floats(0.01, 0.99),
    seed=st.integers(0, 99),
)
def test_keep_mask_equals_a_stable_argsort_also_with_ties(
    rows: int, columns: int, levels: int, share: float, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    score_OI = torch.randint(levels, (rows, columns), generator=generator).float()

    per_tensor = keep_mask(score_OI, share, "tensor")
    per_row = keep_mask(score_OI, share, "row")

    assert torch.equal(per_tensor.flatten(), mask_by_argsort(score_OI.flatten(), int(share * (rows * columns))))
    expected = [mask_by_argsort(score_I, int(share * columns)) for score_I in score_OI]
    assert torch.equal(per_row, torch.stack(expected))


def test_equal_scores_lose_the_lowest_indices_first() -> None:
    mask_OI = keep_mask(torch.ones(2, 4), 0.5)

    assert mask_OI.tolist() == [[False] * 4, [True] * 4]


@pytest.mark.parametrize(("kept", "group"), [(2, 4), (4, 8), (1, 4), (3, 4)])
def test_a_pattern_keeps_n_of_each_m_inputs(kept: int, group: int) -> None:
    score_OI = torch.rand(6, 16, generator=torch.Generator().manual_seed(0))

    mask_OI = keep_mask_pattern(score_OI, kept, group)

    assert (mask_OI.view(-1, group).sum(dim=1) == kept).all()
    worst_kept_G = score_OI.masked_fill(~mask_OI, 2).view(-1, group).amin(dim=1)
    best_removed_G = score_OI.masked_fill(mask_OI, -1).view(-1, group).amax(dim=1)
    assert (best_removed_G < worst_kept_G).all()


def test_a_score_that_is_not_a_number_is_an_error() -> None:
    score_OI = torch.tensor([[1.0, float("nan")]])

    with pytest.raises(ValueError, match="not a number"):
        keep_mask(score_OI, 0.5)
    with pytest.raises(ValueError, match="not a number"):
        keep_mask_pattern(score_OI, 1, 2)


def test_an_earlier_mask_is_extended_and_counts() -> None:
    score_OI = torch.tensor([[9.0, 8.0, 7.0, 6.0]])
    already_OI = torch.tensor([[False, True, True, True]])

    mask_OI = Target(sparsity=0.5).keep(score_OI, "tensor", already_OI)

    assert mask_OI.tolist() == [[False, True, True, False]]


@pytest.mark.parametrize(
    ("removed", "count", "quotas"),
    [
        ([0, 0, 0], 2, [2, 2, 2]),
        ([4, 0, 0], 2, [4, 1, 1]),
        ([3, 0, 0], 2, [3, 2, 1]),
        ([2, 2, 2], 2, [2, 2, 2]),
        ([5, 1, 0], 2, [5, 1, 0]),
        ([5, 4, 0], 2, [5, 4, 0]),  # more than all together is nobody's to give back
    ],
)
def test_rows_make_up_for_those_that_lost_more(removed: list[int], count: int, quotas: list[int]) -> None:
    assert row_quotas(torch.tensor(removed), count).tolist() == quotas


@settings(deadline=None, max_examples=60)
@given(
    rows=st.integers(1, 6),
    columns=st.integers(1, 8),
    share=st.floats(0.05, 0.95),
    part=st.floats(0, 1),
    seed=st.integers(0, 99),
)
def test_a_share_of_each_row_after_an_earlier_mask_is_exact_in_total(
    rows: int, columns: int, share: float, part: float, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    count = int(share * columns)
    removed = torch.randperm(rows * columns, generator=generator)[: int(part * count * rows)]
    already_OI = torch.ones(rows * columns).bool().index_fill(0, removed, False).view(rows, columns)
    score_OI = torch.rand(rows, columns, generator=generator)

    mask_OI = Target(sparsity=share).keep(score_OI, "row", already_OI)

    assert int((~mask_OI).sum()) == count * rows
    assert not (mask_OI & ~already_OI).any()
    lost_O, before_O = (~mask_OI).sum(1), (~already_OI).sum(1)
    more_O = lost_O[lost_O > before_O]
    assert len(more_O) == 0 or int(more_O.max() - more_O.min()) <= 1


def test_a_count_for_each_row_is_the_same_as_one_for_all_where_they_are_equal() -> None:
    score_OI = torch.randint(3, (5, 7), generator=torch.Generator().manual_seed(0)).float()

    assert torch.equal(keep_all_but_each(score_OI, torch.full((5,), 3)), keep_mask(score_OI, 3 / 7, "row"))


def test_a_group_of_a_pattern_that_lost_more_stays_as_it_is() -> None:
    already_OI = torch.tensor([[False, False, False, True, True, True, True, True]])
    score_OI = torch.tensor([[8.0, 7, 6, 5, 4, 3, 2, 1]])

    mask_OI = Target(pattern="2:4").keep(score_OI, "row", already_OI)

    assert mask_OI.tolist() == [[False, False, False, True, True, True, False, False]]


def test_the_target_says_its_share() -> None:
    assert Target().sparsity == 0.5
    assert Target(sparsity=0.3).share == 0.3
    assert Target(pattern="1:4").sparsity == 0.75
    assert Target(pattern="2:4", sparsity=0.5).n_of_m == Pattern(2, 4)
    assert Target(**Target(pattern="1:4").model_dump()) == Target(pattern="1:4")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"pattern": "4:2"}, "0 < N < M"),
        ({"pattern": "4:4"}, "0 < N < M"),
        ({"pattern": "0:4"}, "0 < N < M"),
        ({"pattern": "half"}, "write N:M"),
        ({"pattern": "2:4", "sparsity": 0.7}, "removes 0.5 of the weights"),
        ({"sparsity": 0}, "greater than 0"),
        ({"sparsity": 1}, "less than 1"),
        ({"sparsity": 1.7}, "less than 1"),
        ({"sparsity": float("nan")}, "finite number"),
    ],
)
def test_impossible_targets_are_refused(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        Target.model_validate(fields)
