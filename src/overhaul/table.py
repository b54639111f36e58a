"""Measured numbers: rows with a value and its interval, as every `Measure` returns and every report shows.

A measure that has more to show than its rows adds curves and maps of layers; what draws them is in `report/`.
"""

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


@dataclass(frozen=True, slots=True, kw_only=True)
class Curve:
    """A line; curves with the same `y_label` are drawn into one chart.

    Attributes:
        name: of this line among those of its chart, such as a quantity or a model.
        x, y: its points.
        x_label, y_label: of the axes.
        title: the finding, as a sentence without a full stop; without one the page says where the line went.
    """

    name: str
    x: tuple[float, ...]
    y: tuple[float, ...]
    x_label: str
    y_label: str
    title: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerMap:
    """A number for each layer of a model, drawn as blocks from left to right and projections from top to bottom.

    Attributes:
        model: the directory or name it was measured on.
        quantity: what the numbers are, such as `outlier columns`.
        values: (layer, number), such as (`model.layers.3.mlp.down_proj`, 6.0); None is "not measured".
        meaning: the quantity in a sentence, for the caption.
        is_share: whether the numbers are shares of a whole, from 0 to 1.
    """

    model: str
    quantity: str
    values: tuple[tuple[str, float | None], ...]
    meaning: str = ""
    is_share: bool = False


@dataclass(frozen=True, slots=True)
class Table:
    """Rows in the order they were measured, and the pictures that go with them."""

    rows: tuple[Row, ...]
    curves: tuple[Curve, ...] = ()
    maps: tuple[LayerMap, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """`{"rows": [{"model":, "metric":, "value":, "low":, "high":, "count":}]}`, and `curves`, `maps` if any."""
        parts = {"rows": self.rows, "curves": self.curves, "maps": self.maps}
        return {
            name: [asdict(part) for part in part_list]
            for name, part_list in parts.items()
            if part_list or name == "rows"
        }

    def __add__(self, other: Table) -> Table:
        return Table(self.rows + other.rows, self.curves + other.curves, self.maps + other.maps)
