from __future__ import annotations

import math

import pytest
from pydantic import ValidationError

from overhaul.adapt.full import Full
from overhaul.method import Method
from overhaul.prune.magnitude import Magnitude


def test_a_method_is_frozen_and_strict():
    method = Magnitude(sparsity=0.3)

    with pytest.raises(ValidationError, match="frozen"):
        method.sparsity = 0.4  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(ValidationError, match="Extra inputs"):
        Magnitude(sparcity=0.3)  # pyright: ignore[reportCallIssue]


def test_equal_settings_are_equal_methods():
    assert Magnitude(sparsity=0.5) == Magnitude() != Magnitude(sparsity=0.25)


def test_the_summary_is_the_first_line():
    class Sprinkle(Method):
        """Sprinkle salt.

        Not sugar.
        """

    assert Sprinkle.summary() == "Sprinkle salt."


@pytest.mark.parametrize("lr", [0, -1, math.inf, math.nan])
def test_a_rate_is_a_positive_number(lr: float):
    with pytest.raises(ValidationError):
        Full(lr=lr)


@pytest.mark.parametrize("field", ["steps", "batch_size", "accumulate", "keep"])
def test_counts_are_positive(field: str):
    with pytest.raises(ValidationError):
        Full(**{field: 0})


def test_a_method_that_trains_once_has_one_stage():
    assert not Full().in_stages()
