"""Measured numbers: rows with a value and its interval, as every `Measure` returns and every report shows."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One number.

    Attributes:
        model: the directory or name it was measured on.
        metric: what it is, such as `perplexity` or `accuracy/boolq`.
        value: the number.
        low, high: its 95% interval; equal to `value` where there is no sampling.
        count: how many units it was taken over: tokens for perplexity, questions for accuracy.
    """

    model: str
    metric: str
    value: float
    low: float
    high: float
    count: int


@dataclass(frozen=True, slots=True)
class Table:
    """Rows in the order they were measured."""

    rows: tuple[Row, ...]

    def to_json(self) -> dict[str, Any]:
        """`{"rows": [{"model":, "metric":, "value":, "low":, "high":, "count":}]}`."""
        return {"rows": [asdict(row) for row in self.rows]}

    def __add__(self, other: Table) -> Table:
        return Table(self.rows + other.rows)
