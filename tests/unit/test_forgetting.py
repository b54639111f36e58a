"""Metrics of forgetting: by hand, against loops written from the formulas, identities, missing entries, the page."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from command import python
from overhaul.errors import UserError
from overhaul.forgetting import (
    AccuracyMatrix,
    average_accuracy,
    average_incremental_accuracy,
    backward_transfer,
    consecutive_forgetting,
    forgetting,
    forgetting_since_learnt,
    forward_transfer,
    global_forgetting,
    intransigence,
    learning_accuracy,
    local_forgetting,
    summary,
)

PAGE = Path(__file__).parents[2] / "docs" / "reference" / "forgetting.md"
NAMES = ("digits", "letters", "signs")
JOINT = (0.85, 0.80, 0.95)
EXAMPLE: list[list[float]] = [[0.5, 0.3, 0.2], [0.8, 0.4, 0.2], [0.9, 0.7, 0.3], [0.6, 0.6, 0.9]]
SEEDS = range(5)
OF_TWO_OR_MORE = (
    backward_transfer,
    forward_transfer,
    forgetting,
    forgetting_since_learnt,
    global_forgetting,
    local_forgetting,
    consecutive_forgetting,
)


def matrix_of(values: Any, num_classes: Any = None, num_examples: Any = None) -> AccuracyMatrix:
    count = len(values[0])
    names = tuple(f"task{i}" for i in range(1, count + 1))
    return AccuracyMatrix(names, values, num_classes or (2,) * count, num_examples or (10,) * count)


def example() -> AccuracyMatrix:
    return AccuracyMatrix(NAMES, np.array(EXAMPLE), num_classes=(2, 3, 5), num_examples=(100, 100, 200))


def random_matrix(seed: int) -> AccuracyMatrix:
    """Two to seven tasks of unequal sizes, each example right or wrong."""
    rng = np.random.default_rng(seed)
    count = int(rng.integers(2, 8))
    num_examples = rng.integers(1, 50, count)
    values = rng.integers(0, num_examples + 1, (count + 1, count)) / num_examples
    return matrix_of(values, rng.integers(1, 9, count).tolist(), num_examples.tolist())


def without(values: list[list[float]], after: int, on: int) -> AccuracyMatrix:
    changed = [list(row) for row in values]
    changed[after][on - 1] = float("nan")
    return AccuracyMatrix(NAMES, np.array(changed), (2, 3, 5), (100, 100, 200))


# By hand: the worked example of the page.


def shown(heading: str) -> list[list[str]]:
    """The rows of the first table after a line of the page."""
    text = PAGE.read_text().split(heading, 1)[1]
    table = re.search(r"(?:^\|.*\n)+", text, re.MULTILINE)
    assert table
    return [[cell.strip() for cell in row.strip("|\n").split("|")] for row in table.group().splitlines()[2:]]


def test_the_page_shows_the_matrix_of_these_tests():
    assert [[float(cell) for cell in row[1:]] for row in shown("## A worked example")] == EXAMPLE
    (block,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    names: dict[str, Any] = {}
    exec(block.replace("print(", "("), names)
    assert names["matrix"].to_json() == example().to_json()


def test_the_numbers_of_the_page_are_those_of_the_functions():
    matrix = example()
    computed = {f"`{metric.__name__}`": metric(matrix) for metric in OF_TWO_OR_MORE}
    computed |= {
        "`average_accuracy`": average_accuracy(matrix),
        "`average_accuracy`, weighted": average_accuracy(matrix, weighted=True),
        "`average_incremental_accuracy`": average_incremental_accuracy(matrix),
        "`learning_accuracy`": learning_accuracy(matrix),
        "`intransigence`": intransigence(matrix, JOINT),
    }

    rows = shown("The joint references are")

    assert {name: value for name, _, value in rows} == {name: f"{value:.4f}" for name, value in computed.items()}


def test_what_the_page_does_by_hand_gives_its_numbers():
    for _, by_hand, value in shown("The joint references are"):
        products = re.sub(r"(\d) \(", r"\1 * (", by_hand)
        assert eval(products) == pytest.approx(float(value), abs=5e-5)


def test_the_page_has_every_metric():
    headings = re.findall(r"^### `(\w+)`$", PAGE.read_text(), re.MULTILINE)
    metrics = [*OF_TWO_OR_MORE, average_accuracy, average_incremental_accuracy, learning_accuracy, intransigence]

    assert sorted(headings) == sorted(metric.__name__ for metric in metrics)


def test_two_tasks_one_of_which_is_lost():
    matrix = matrix_of([[1.0, 0.0], [0.25, 1.0]], num_classes=(3, 1))

    assert average_accuracy(matrix) == 0.625
    assert backward_transfer(matrix) == local_forgetting(matrix) == -0.75
    assert forgetting(matrix) == forgetting_since_learnt(matrix) == consecutive_forgetting(matrix) == 0.75
    assert global_forgetting(matrix) == 3 / 4 * 0.75


def test_a_large_task_that_is_lost_weighs_more_than_a_small_one():
    values = [[1.0, 0.0, 0.0], [0.5, 1.0, 0.0], [0.5, 1.0, 1.0]]

    # 0.5 is lost of task 1, at both times.
    assert global_forgetting(matrix_of(values, (8, 1, 1))) == pytest.approx((8 / 9 + 8 / 10) * 0.5 / 2)
    assert global_forgetting(matrix_of(values, (1, 1, 8))) == pytest.approx((1 / 2 + 1 / 10) * 0.5 / 2)


# Against loops that follow the formulas.


def slow_average_incremental_accuracy(A: np.ndarray, T: int) -> float:
    total = 0.0
    for t in range(1, T + 1):
        inner = 0.0
        for i in range(1, t + 1):
            inner += A[t, i - 1]
        total += inner / t
    return total / T


def slow_backward_transfer(A: np.ndarray, T: int) -> float:
    total = 0.0
    for i in range(1, T):
        total += A[T, i - 1] - A[i, i - 1]
    return total / (T - 1)


def slow_forward_transfer(A: np.ndarray, T: int) -> float:
    total = 0.0
    for i in range(2, T + 1):
        total += A[i - 1, i - 1] - A[0, i - 1]
    return total / (T - 1)


def slow_forgetting(A: np.ndarray, T: int) -> float:
    total = 0.0
    for j in range(1, T):
        best = -1.0
        for row in range(j, T):
            best = max(best, A[row, j - 1])
        total += best - A[T, j - 1]
    return total / (T - 1)


def slow_global_forgetting(R: np.ndarray, sizes: tuple[int, ...]) -> float:
    N, total = len(sizes), 0.0
    for i in range(2, N + 1):
        seen = 0
        for n in range(1, i + 1):
            seen += sizes[n - 1]
        for n in range(1, i):
            total += sizes[n - 1] / seen * (R[n, n - 1] - R[i, n - 1])
    return total / (N - 1)


def slow_consecutive_forgetting(R: np.ndarray, N: int) -> float:
    total = 0.0
    for i in range(2, N + 1):
        for n in range(1, i):
            total += (R[i - 1, n - 1] - R[i, n - 1]) / (i - 1)
    return total / (N - 1)


@pytest.mark.parametrize("seed", SEEDS)
def test_the_metrics_are_their_formulas(seed: int):
    matrix = random_matrix(seed)
    A, T = matrix.values, matrix.num_tasks

    assert average_accuracy(matrix) == pytest.approx(sum(A[T]) / T)
    assert learning_accuracy(matrix) == pytest.approx(sum(A[i, i - 1] for i in range(1, T + 1)) / T)
    assert average_incremental_accuracy(matrix) == pytest.approx(slow_average_incremental_accuracy(A, T))
    assert backward_transfer(matrix) == pytest.approx(slow_backward_transfer(A, T))
    assert local_forgetting(matrix) == pytest.approx(slow_backward_transfer(A, T))
    assert forward_transfer(matrix) == pytest.approx(slow_forward_transfer(A, T))
    assert forgetting(matrix) == pytest.approx(slow_forgetting(A, T))
    assert global_forgetting(matrix) == pytest.approx(slow_global_forgetting(A, matrix.num_classes))
    assert consecutive_forgetting(matrix) == pytest.approx(slow_consecutive_forgetting(A, T))


# Identities.


@pytest.mark.parametrize("seed", SEEDS)
def test_forgetting_since_learnt_is_minus_backward_transfer_and_the_least_forgetting(seed: int):
    matrix = random_matrix(seed)

    assert forgetting_since_learnt(matrix) == pytest.approx(-backward_transfer(matrix), abs=1e-15)
    assert forgetting(matrix) >= forgetting_since_learnt(matrix)
    assert -1 <= forgetting(matrix) <= 1


@pytest.mark.parametrize("seed", SEEDS)
def test_weighted_accuracy_is_that_over_all_examples(seed: int):
    matrix = random_matrix(seed)
    rng = np.random.default_rng(seed)
    is_right = []
    for accuracy, count in zip(matrix.values[-1], matrix.num_examples, strict=True):
        is_right += rng.permutation(np.arange(count) < round(accuracy * count)).tolist()

    assert average_accuracy(matrix, weighted=True) == pytest.approx(np.mean(is_right))


@pytest.mark.parametrize("seed", SEEDS)
def test_with_equal_numbers_of_examples_weights_change_nothing(seed: int):
    matrix = matrix_of(random_matrix(seed).values)

    assert average_accuracy(matrix, weighted=True) == pytest.approx(average_accuracy(matrix))
    assert average_incremental_accuracy(matrix, weighted=True) == pytest.approx(average_incremental_accuracy(matrix))


@pytest.mark.parametrize("seed", SEEDS)
def test_tasks_of_equal_size_weigh_one_by_the_time_in_global_forgetting(seed: int):
    matrix = matrix_of(random_matrix(seed).values)
    R, N = matrix.values, matrix.num_tasks

    lost = [sum(R[n, n - 1] - R[i, n - 1] for n in range(1, i)) / i for i in range(2, N + 1)]

    assert global_forgetting(matrix) == pytest.approx(sum(lost) / (N - 1))


def test_of_two_equal_tasks_global_forgetting_is_half_of_what_was_lost():
    matrix = matrix_of([[0.9, 0.0], [0.5, 0.8]])

    assert consecutive_forgetting(matrix) == forgetting_since_learnt(matrix) == 0.4
    assert global_forgetting(matrix) == 0.2


@pytest.mark.parametrize("seed", SEEDS)
def test_where_nothing_changes_there_is_no_transfer_and_no_forgetting(seed: int):
    known = random_matrix(seed).values[0]
    matrix = matrix_of(np.tile(known, (len(known) + 1, 1)))

    assert [metric(matrix) for metric in OF_TWO_OR_MORE] == [0.0] * len(OF_TWO_OR_MORE)
    assert average_accuracy(matrix) == learning_accuracy(matrix) == pytest.approx(known.mean())
    assert intransigence(matrix, known.tolist()) == 0


@pytest.mark.parametrize("seed", SEEDS)
def test_the_order_of_tasks_does_not_matter_for_the_final_accuracy(seed: int):
    matrix = random_matrix(seed)
    order = np.random.default_rng(seed).permutation(matrix.num_tasks)
    moved = matrix_of(matrix.values[:, order], num_examples=np.array(matrix.num_examples)[order].tolist())

    assert average_accuracy(moved) == pytest.approx(average_accuracy(matrix))
    assert average_accuracy(moved, weighted=True) == pytest.approx(average_accuracy(matrix, weighted=True))


def test_what_a_task_gained_and_lost_again_is_forgetting_and_no_transfer():
    matrix = matrix_of([[0.5, 0.0, 0.0], [0.8, 0.5, 0.0], [0.5, 0.5, 0.5]])

    assert backward_transfer(matrix) == 0
    assert forgetting(matrix) == pytest.approx(0.15)
    assert global_forgetting(matrix) == pytest.approx(-0.3 / 2 / 2)


def test_a_last_task_that_helps_all_others_gives_negative_forgetting():
    assert forgetting(matrix_of([[0.5, 0.0], [0.7, 0.9]])) == pytest.approx(-0.2)


# One task.


def test_one_task_has_accuracies_and_no_forgetting():
    matrix = matrix_of([[0.25], [0.75]])

    for metric in (average_accuracy, average_incremental_accuracy, learning_accuracy):
        assert metric(matrix) == 0.75
    assert intransigence(matrix, [1.0]) == 0.25
    assert {value for _, value in summary(matrix, matrix, matrix)} == {0.75}
    for metric in OF_TWO_OR_MORE:
        with pytest.raises(UserError, match=r"of one task \(task1\)\nallowed: two tasks or more"):
            metric(matrix)


# Missing entries.


def test_the_upper_triangle_and_row_0_are_needed_by_forward_transfer_only():
    lower = np.where(np.tri(3, dtype=bool), EXAMPLE[1:], np.nan)
    matrix = AccuracyMatrix(NAMES, lower, (2, 3, 5), (100, 100, 200))

    for metric in OF_TWO_OR_MORE:
        if metric is not forward_transfer:
            assert metric(matrix) == metric(example())
    with pytest.raises(UserError, match=r"task 2 \(letters\) after task 1 \(digits\) is missing"):
        forward_transfer(matrix)


@pytest.mark.parametrize(
    ("metric", "after", "on", "said"),
    [
        (average_accuracy, 3, 2, r"task 2 \(letters\) after task 3 \(signs\) is missing"),
        (average_incremental_accuracy, 2, 1, r"task 1 \(digits\) after task 2 \(letters\) is missing"),
        (learning_accuracy, 1, 1, r"task 1 \(digits\) after task 1 \(digits\) is missing"),
        (backward_transfer, 3, 1, r"task 1 \(digits\) after task 3 \(signs\) is missing"),
        (forward_transfer, 0, 3, r"task 3 \(signs\) before any training is missing\n.*A\[0, 3\]"),
        (forgetting, 2, 1, r"task 1 \(digits\) after task 2 \(letters\) is missing\n.*A\[2, 1\]"),
        (global_forgetting, 2, 2, r"task 2 \(letters\) after task 2 \(letters\) is missing"),
        (consecutive_forgetting, 2, 1, r"task 1 \(digits\) after task 2 \(letters\) is missing"),
    ],
)
def test_a_missing_entry_that_is_needed_is_named(
    metric: Callable[[AccuracyMatrix], float], after: int, on: int, said: str
):
    with pytest.raises(UserError, match=said):
        metric(without(EXAMPLE, after, on))


def test_row_0_that_is_not_there_is_missing():
    matrix = AccuracyMatrix(NAMES, np.array(EXAMPLE[1:]), (2, 3, 5), (100, 100, 200))

    assert [matrix.has(after, 2) for after in range(4)] == [False, True, True, True]
    assert matrix.accuracy(3, 2) == example().accuracy(3, 2) == 0.6
    with pytest.raises(UserError, match="before any training is missing"):
        forward_transfer(matrix)
    for after, on in [(-1, 1), (4, 1), (1, 0), (1, 4)]:
        with pytest.raises(IndexError):
            matrix.has(after, on)


# What cannot be a matrix.


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"values": EXAMPLE[2:]}, r"shape \(2, 3\) for 3 tasks"),
        ({"values": EXAMPLE[0]}, r"shape \(3,\) for 3 tasks"),
        ({"values": [[0.5], [0.5, 0.5]]}, "no matrix of numbers"),
        ({"values": [["good"] * 3] * 3}, "no matrix of numbers"),
        ({"values": [[1.5, 0.0, 0.0]] * 3}, "an accuracy of 1.5"),
        ({"values": [[-0.1, 0.0, 0.0]] * 3}, "an accuracy of -0.1"),
        ({"values": [[float("inf"), 0.0, 0.0]] * 3}, "an accuracy of inf"),
        ({"names": ("a", "b", "a")}, "each with a name of its own"),
        ({"names": ("a", "b", 3)}, "each with a name of its own"),
        ({"names": ()}, "one or more"),
        ({"num_classes": (2, 3)}, "num_classes .* for 3 tasks"),
        ({"num_classes": (2, 3, 0)}, "positive integers"),
        ({"num_examples": (100, 100, 0.5)}, "num_examples .* positive integers"),
        ({"num_examples": 100}, "num_examples 100 for 3 tasks"),
    ],
)
def test_what_is_no_matrix_of_accuracies_is_refused(changed: dict[str, Any], said: str):
    with pytest.raises(UserError, match="(?s)" + said):
        AccuracyMatrix.from_json(example().to_json() | changed)


@pytest.mark.parametrize("joint", [(0.8, 0.8), (0.8, 0.8, 80.0), (0.8, 0.8, float("nan"))])
def test_references_are_one_share_a_task(joint: tuple[float, ...]):
    with pytest.raises(UserError, match="3 accuracies from 0 to 1"):
        intransigence(example(), joint)


def test_a_matrix_cannot_be_changed_afterwards():
    values = np.array(EXAMPLE)
    matrix = AccuracyMatrix(NAMES, values, (2, 3, 5), (100, 100, 200))
    values[-1] = 0

    assert average_accuracy(matrix) == pytest.approx(0.7)
    with pytest.raises(ValueError, match="read-only"):
        matrix.values[0, 0] = 1


# JSON.


@pytest.mark.parametrize("matrix", [example(), without(EXAMPLE, 2, 3), random_matrix(0)])
def test_a_matrix_goes_to_json_and_back(matrix: AccuracyMatrix):
    stored = json.loads(json.dumps(matrix.to_json(), allow_nan=False))
    back = AccuracyMatrix.from_json(stored)

    np.testing.assert_array_equal(back.values, matrix.values)
    assert (back.names, back.num_classes, back.num_examples) == (matrix.names, matrix.num_classes, matrix.num_examples)
    assert back.to_json() == stored


def test_what_was_not_measured_is_null():
    assert without(EXAMPLE, 2, 3).to_json()["values"][2] == [0.9, 0.7, None]


def test_json_without_a_part_is_refused():
    stored = example().to_json()
    del stored["num_classes"]

    with pytest.raises(UserError, match="without num_classes"):
        AccuracyMatrix.from_json(stored)


# The summary.


def test_a_summary_has_every_metric_once():
    names = [name for name, _ in summary(example(), example(), example())]

    of_one = ["average accuracy", "accuracy over all examples", "average incremental accuracy", "learning accuracy",
              "backward transfer", "forgetting"]  # fmt: skip
    assert names == [
        *(f"task-IL {name}" for name in of_one),
        "task-IL forward transfer",
        *(f"class-IL {name}" for name in of_one),
        "global forgetting",
        "consecutive forgetting",
    ]


def test_a_summary_takes_each_metric_from_its_matrix():
    unchanged = [[0.5, 0.5, 0.5]] * 3
    flat = AccuracyMatrix(NAMES, np.array(unchanged), (2, 3, 5), (100, 100, 200))

    found = dict(summary(flat, example(), flat))

    assert found["task-IL backward transfer"] == found["global forgetting"] == found["consecutive forgetting"] == 0
    assert found["class-IL backward transfer"] == pytest.approx(-0.15)
    assert "task-IL forward transfer" not in found
    assert "class-IL forward transfer" not in found


def test_a_summary_is_of_one_run():
    other = AccuracyMatrix(NAMES, np.array(EXAMPLE), (5, 3, 2), (100, 100, 200))

    with pytest.raises(UserError, match="different tasks: num_classes"):
        summary(example(), other)


def test_no_torch_is_needed():
    done = python("import sys, overhaul.forgetting\nprint('torch' in sys.modules)")

    assert (done.code, done.out.strip()) == (0, "False")
