"""What models are ranked by: a metric, or a weighted sum of several."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import NamedTuple, Self

from overhaul.errors import UserError
from overhaul.report.facts import LOSS_ON, PERPLEXITY
from overhaul.table import Row

ACCURACY = "accuracy"
"""How the metrics begin of which more is better."""


class Score(NamedTuple):
    """What settings are ranked by; less is better. Of an accuracy what is missing counts, 1 less it.

    Attributes:
        text: as it was asked for.
        terms: (weight, metric); the score is their sum.
    """

    text: str
    terms: tuple[tuple[float, str], ...]

    @classmethod
    def of(cls, text: str) -> Self:
        """From `METRIC`, or `0.5*METRIC + 0.5*METRIC`.

        Raises:
            UserError: a weight is not a positive number, or a metric is missing.
        """
        terms = []
        for part in re.split(r"\s+\+\s+", text.strip()):
            weight, times, metric = part.partition("*") if re.match(r"[-+.\d]", part) else ("", "*", part)
            try:
                number = float(weight or 1)
            except ValueError:
                number = math.nan
            if not (times and metric.strip() and 0 < number < math.inf):
                raise UserError(
                    f"--by {text!r}: {part!r} is no metric, nor a positive number times a metric",
                    hint=f"--by {PERPLEXITY}, or --by '0.5*{LOSS_ON} a + 0.5*{LOSS_ON} b'",
                )
            terms.append((number, metric.strip()))
        return cls(text, tuple(terms))

    @property
    def metrics(self) -> tuple[str, ...]:
        """Those that it needs."""
        return tuple(metric for _, metric in self.terms)

    def value(self, metrics: Mapping[str, Row]) -> float | None:
        """The score; None where a metric was not measured."""
        if not set(self.metrics) <= metrics.keys():
            return None
        return sum(weight * _cost(metrics[metric]) for weight, metric in self.terms)

    def shown(self, metrics: Mapping[str, Row]) -> float | None:
        """What people read: the metric itself where it is alone, which of an accuracy is not what is ranked by."""
        ((weight, metric), *others) = self.terms
        if others or weight != 1 or metric not in metrics:
            return self.value(metrics)
        return metrics[metric].value


def _cost(row: Row) -> float:
    return 1 - row.value if row.metric.startswith(ACCURACY) else row.value
