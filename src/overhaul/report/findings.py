"""Charts as a page shows them: with the finding as title, a caption, the numbers as a table and as CSV."""

from __future__ import annotations

import csv
import io
import math
import re
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from urllib.parse import quote

from markupsafe import Markup

from overhaul.report.facts import Facts, LayerFacts, Recovery, quality
from overhaul.report.figures import bar_chart, by_label, finite_points, heat_map, line_chart
from overhaul.report.numbers import as_interval, as_percent, as_place, as_quantity
from overhaul.report.pareto import Trade, on_front, trades_of
from overhaul.report.scatter import Point, scatter_chart
from overhaul.table import Curve, LayerMap

MOST_TABLE_ROWS = 50
"""The table beside a chart shows every n-th point beyond this; its CSV has them all."""

FEW_ZEROS = 0.01
"""Of a layer: as many are in models that were never pruned."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """A chart with its finding as title, what it shows as caption, and its numbers as a table and a CSV."""

    title: str
    caption: str
    svg: Markup
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    csv: str
    file_name: str

    @property
    def csv_url(self) -> str:
        """The CSV as a link's target."""
        return csv_url(self.csv)


def csv_url(text: str) -> str:
    """Comma-separated lines as a link's target."""
    return f"data:text/csv;charset=utf-8,{quote(text)}"


def recovery_figure(gap: Recovery) -> Figure:
    """One bar per model: the share of the lost log-perplexity that it has back."""
    label, share = max(gap.shares, key=lambda bar: bar[1])
    title = f"{label}: {as_percent(share, digits=2)} of the lost log-perplexity is back"
    rows = tuple((name, as_percent(value, digits=2)) for name, value in gap.shares)
    return Figure(
        title=title,
        caption=f"0% is the perplexity of {gap.worst.label}, 100% of {gap.reference.label}, in logarithms.",
        svg=bar_chart(gap.shares, title=title, full=gap.reference.label),
        header=("model", "share won back"),
        rows=rows,
        csv=as_csv(("model", "share"), [(name, repr(value)) for name, value in gap.shares]),
        file_name="recovery.csv",
    )


def trade_figures(facts: Sequence[Facts]) -> list[Figure]:
    """A scatter chart for every trade that two models at least were measured in."""
    return [
        _trade_figure(facts, trade)
        for trade in trades_of(facts)
        if sum(quality(one) is not None and trade.value(one) is not None for one in facts) > 1
    ]


def _trade_figure(facts: Sequence[Facts], trade: Trade) -> Figure:
    best = on_front(facts, trade)
    measured = [
        (one, row, value, is_best)
        for one, is_best in zip(facts, best, strict=True)
        if (row := quality(one)) is not None and (value := trade.value(one)) is not None
    ]
    metric = measured[0][1].metric
    number = trade.text if trade.is_cost else _tick
    points = [
        Point(
            label=one.label,
            x=value,
            y=row.value,
            low=row.low,
            high=row.high,
            is_best=is_best,
            is_reference=one is facts[0],
        )
        for one, row, value, is_best in measured
    ]
    names = [one.label for one, _, _, is_best in measured if is_best]
    named = _listed(names) if len(names) <= 4 else f"{len(names)} of {len(points)} models"
    title = f"No model is both better and {trade.better} than {named}"
    return Figure(
        title=title,
        caption=f"{metric[0].upper()}{metric[1:]} with its 95% interval against {trade.label}. Hollow: some model is "
        "at least as good in both. Dashed ring: the reference.",
        svg=scatter_chart(
            points,
            x_label=trade.label,
            y_label=metric,
            is_cost=trade.is_cost,
            number=number,
            title=title,
        ),
        header=("model", metric, trade.label, "on the front"),
        rows=tuple(
            (one.label, as_interval(row), trade.text(value), "yes" if is_best else "no")
            for one, row, value, is_best in measured
        ),
        csv=as_csv(
            ("model", metric, "low", "high", trade.label, "on the front"),
            [
                (one.label, repr(row.value), repr(row.low), repr(row.high), repr(value), str(is_best).lower())
                for one, row, value, is_best in measured
            ],
        ),
        file_name=f"{trade.name}.csv",
    )


def _tick(speed: float) -> str:
    """A number of an axis: no more digits than it needs."""
    return f"{speed:,.0f}" if speed >= 100 else f"{speed:.3g}"


def _listed(names: Sequence[str]) -> str:
    """`a`, `a and b`, `a, b and c`."""
    return " and ".join([", ".join(names[:-1]), names[-1]]) if len(names) > 1 else names[0]


def curve_figures(curves: Sequence[Curve]) -> list[Figure]:
    """One chart for all curves that share a y axis."""
    return [curve_figure(group) for group in by_label(curves)]


def curve_figure(curves: Sequence[Curve]) -> Figure:
    """The curves that share a y axis; without titles of their own, the title says where the first one went."""
    first = curves[0]
    title = "; ".join(dict.fromkeys(curve.title for curve in curves if curve.title)) or _course(first)
    xs = sorted({x for curve in curves for x in curve.x})
    at = [dict(zip(curve.x, curve.y, strict=True)) for curve in curves]
    header = (first.x_label, *(curve.name for curve in curves))
    every = max(1, math.ceil(len(xs) / MOST_TABLE_ROWS))
    rows = [(x, *(points.get(x) for points in at)) for x in xs]
    caption = f"{first.y_label[0].upper()}{first.y_label[1:]} against {first.x_label}, {len(xs)} points."
    if any(curve.spans for curve in curves):
        caption += " Marked: how far a line rose above its beginning."
    return Figure(
        title=title,
        caption=caption,
        svg=line_chart(curves, title=title),
        header=header,
        rows=tuple((as_place(row[0]), *(as_quantity(y) for y in row[1:])) for row in rows[::every]),
        csv=as_csv(header, [[_raw(number) for number in row] for row in rows]),
        file_name=f"{first.name.replace('/', '-')}.csv",
    )


def _course(curve: Curve) -> str:
    """`Loss fell from 5.31 to 3.28`; the end is the mean of the last tenth, for single batches are noisy."""
    ys = [y for _, y in finite_points(curve)]
    if not ys:
        return f"{curve.name} has no finite value"
    if curve.x_label == "part":
        return "Mean squared error of every reconstructed part, before and after"
    name = {"lr": "Learning rate", "grad_norm": "Gradient norm"}.get(curve.name, curve.name.capitalize())
    if curve.name == "lr":
        return f"{name} peaked at {max(ys):.3g}"
    start, end = ys[0], statistics.fmean(ys[-max(1, len(ys) // 10) :])
    if as_quantity(start, digits=3) == as_quantity(end, digits=3):
        return f"{name} stayed at {as_quantity(end, digits=3)}"
    way = "fell" if end < start else "rose"
    return f"{name} {way} from {as_quantity(start, digits=3)} to {as_quantity(end, digits=3)}"


def layer_figures(facts: Sequence[Facts]) -> list[Figure]:
    """A heat map of sparsity and one of error for each model that has them; equal ones are drawn once.

    Zeros that are few in every layer are left out: every model has some, those that once had 4 bits more.
    """
    maps: list[LayerMap] = []
    quantities: tuple[tuple[str, float, Callable[[LayerFacts], float | None], str], ...] = (
        ("sparsity", FEW_ZEROS, lambda layer: layer.sparsity, "Share of zeros"),
        (
            "error",
            0.0,
            lambda layer: layer.error,
            "Norm of the change over the norm of the original (the output if the method read data, else the weights)",
        ),
    )
    for quantity, least, value, meaning in quantities:
        owners: dict[tuple[tuple[str, float | None], ...], list[str]] = {}
        for one in facts:
            if any((value(layer) or 0) > least for layer in one.layers):
                owners.setdefault(tuple((layer.name, value(layer)) for layer in one.layers), []).append(one.label)
        maps += [
            LayerMap(
                model=", ".join(labels) if len(labels) <= 3 else f"{len(labels)} models",
                quantity=quantity,
                values=values,
                meaning=meaning,
                is_share=quantity == "sparsity",
            )
            for values, labels in owners.items()
        ]
    return map_figures(maps)


def map_figures(maps: Sequence[LayerMap]) -> list[Figure]:
    """Heat maps; those of one quantity share a scale, so that models can be compared."""
    figures = []
    for one in maps:
        known = [number for other in maps if other.quantity == one.quantity for _, number in other.values]
        highest = 1.0 if one.is_share else max((number for number in known if number is not None), default=0.0)
        figures.append(_map_figure(one, highest))
    return figures


def _map_figure(one: LayerMap, highest: float) -> Figure:
    text = as_percent if one.is_share else (lambda number: as_quantity(number, digits=2))
    title = f"{one.model}: {_map_finding(one, text)}"
    return Figure(
        title=title,
        caption=f"{one.meaning or one.quantity.capitalize()}{', per linear layer' if one.across == 'block' else ''}.",
        svg=heat_map(one.values, text, highest=highest, title=title, across=one.across),
        header=("layer", one.quantity),
        rows=tuple((name, text(number)) for name, number in one.values),
        csv=as_csv(("layer", one.quantity), [(name, _raw(number)) for name, number in one.values]),
        file_name=re.sub(r"[^\w.]+", "-", f"{one.quantity}-{one.model}") + ".csv",
    )


def _map_finding(one: LayerMap, text: Callable[[float | None], str]) -> str:
    known = [(number, name) for name, number in one.values if number is not None]
    if not known:
        return f"{one.quantity} was not measured"
    (low, low_name), (high, high_name) = min(known), max(known)
    if text(low) == text(high):
        return f"{one.quantity} is {text(low)} in every layer"
    if one.is_share:
        return f"{one.quantity} runs from {text(low)} ({low_name}) to {text(high)} ({high_name})"
    median = text(statistics.median(number for number, _ in known))
    return f"{one.quantity} is highest in {high_name}: {text(high)}, against {median} in the median layer"


def _raw(number: float | None) -> str:
    return "" if number is None else repr(number)


def as_csv(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Comma-separated lines."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([header, *rows])
    return text.getvalue()
