"""Measured numbers: rows with a value and its interval, as every `Measure` returns and every report shows.

A measure that has more to show than its rows adds curves and maps of layers; what draws them is in `report/`.
"""

from __future__ import annotations

from collections.abc import Mapping
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


TOKENS = "tokens trained on"
"""The label of x axes that begin at 0, before the first step."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Span:
    """A distance above a curve's beginning that is marked in its chart.

    Attributes:
        x: where.
        low, high: its ends, in the units of y.
        text: what stands beside it.
    """

    x: float
    low: float
    high: float
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Curve:
    """A line; curves with the same `y_label` are drawn into one chart.

    Attributes:
        name: of this line among those of its chart, such as a quantity or a model.
        x, y: its points.
        x_label, y_label: of the axes.
        title: the finding, as a sentence without a full stop; without one the page says where the line went.
        spans: what is marked of it.
    """

    name: str
    x: tuple[float, ...]
    y: tuple[float, ...]
    x_label: str
    y_label: str
    title: str = ""
    spans: tuple[Span, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerMap:
    """A number for each layer of a model, drawn as blocks from left to right and projections from top to bottom.

    Attributes:
        model: the directory or name it was measured on.
        quantity: what the numbers are, such as `outlier columns`.
        values: (layer, number), such as (`model.layers.3.mlp.down_proj`, 6.0); None is "not measured".
        meaning: the quantity in a sentence, for the caption.
        is_share: whether the numbers are shares of a whole, from 0 to 1.
        across: what lies from left to right.
    """

    model: str
    quantity: str
    values: tuple[tuple[str, float | None], ...]
    meaning: str = ""
    is_share: bool = False
    across: str = "block"


@dataclass(frozen=True, slots=True)
class Table:
    """Rows in the order they were measured, the pictures that go with them, and what is to be known beside.

    Attributes:
        rows, curves, maps: the numbers and their pictures.
        details: one record for each thing that the rows sum up, such as a matrix, all with the same keys.
        notes: sentences about what was measured.
    """

    rows: tuple[Row, ...]
    curves: tuple[Curve, ...] = ()
    maps: tuple[LayerMap, ...] = ()
    details: tuple[Mapping[str, Any], ...] = ()
    notes: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """`{"rows": [{"model":, "metric":, "value":, "low":, "high":, "count":}]}`, and the other parts if any."""
        parts = {"rows": self.rows, "curves": self.curves, "maps": self.maps}
        found = {name: [asdict(part) for part in part_list] for name, part_list in parts.items()}
        found |= {"details": [dict(detail) for detail in self.details], "notes": list(self.notes)}
        return {name: part for name, part in found.items() if part or name == "rows"}

    def __add__(self, other: Table) -> Table:
        notes = tuple(dict.fromkeys(self.notes + other.notes))
        return Table(
            self.rows + other.rows,
            self.curves + other.curves,
            self.maps + other.maps,
            self.details + other.details,
            notes,
        )
