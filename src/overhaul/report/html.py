"""One self-contained HTML file: no script is needed to read it, and nothing is loaded from anywhere."""

from __future__ import annotations

import csv
import io
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from overhaul.report.facts import Curve, Facts, LayerFacts, Recovery, Report, recovery
from overhaul.report.figures import bar_chart, by_label, finite_points, heat_map, line_chart
from overhaul.report.numbers import as_duration, as_percent, as_quantity, as_size
from overhaul.report.sentences import step_sentence, verdict
from overhaul.report.tables import before_after

MOST_TABLE_ROWS = 50
"""The table beside a chart shows every n-th point beyond this; its CSV has them all."""


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
        return f"data:text/csv;charset=utf-8,{quote(self.csv)}"


def html_report(report: Report) -> str:
    """The page: verdict, before/after, recovery, curves, layers, generations, lineage, how to repeat it."""
    gap = recovery(report.facts)
    return (
        _environment()
        .get_template("template.html.j2")
        .render(
            report=report,
            verdict=verdict(report.facts),
            table=before_after(report.facts),
            recovery=recovery_figure(gap) if gap else None,
            charts=[curve_figure(group) for group in by_label(report.curves)],
            maps=layer_figures(report.facts),
            generations=side_by_side(report.facts),
            sentences=[step_sentence(step) for step in report.lineage],
        )
    )


def _environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
    )
    environment.filters.update(duration=as_duration, size=as_size)
    return environment


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
        csv=_csv(("model", "share"), [(name, repr(value)) for name, value in gap.shares]),
        file_name="recovery.csv",
    )


def curve_figure(curves: Sequence[Curve]) -> Figure:
    """The curves that share a y axis; the title says where the first one went."""
    first = curves[0]
    title = _course(first)
    xs = sorted({x for curve in curves for x in curve.x})
    at = [dict(zip(curve.x, curve.y, strict=True)) for curve in curves]
    header = (first.x_label, *(curve.name for curve in curves))
    every = max(1, math.ceil(len(xs) / MOST_TABLE_ROWS))
    rows = [(x, *(points.get(x) for points in at)) for x in xs]
    return Figure(
        title=title,
        caption=f"{first.y_label[0].upper()}{first.y_label[1:]} against {first.x_label}, {len(xs)} points.",
        svg=line_chart(curves, title=title),
        header=header,
        rows=tuple((f"{row[0]:g}", *(as_quantity(y) for y in row[1:])) for row in rows[::every]),
        csv=_csv(header, [[_raw(number) for number in row] for row in rows]),
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
    """A heat map of sparsity and one of error for each model that has them; equal ones are drawn once."""
    figures = []
    quantities: tuple[tuple[str, Callable[[LayerFacts], float | None], bool], ...] = (
        ("sparsity", lambda layer: layer.sparsity, True),
        ("error", lambda layer: layer.error, False),
    )
    for quantity, value, of_whole in quantities:
        owners: dict[tuple[object, ...], list[Facts]] = {}
        for one in facts:
            if any(value(layer) for layer in one.layers):
                key = tuple(entry for layer in one.layers for entry in (layer.name, value(layer)))
                owners.setdefault(key, []).append(one)
        # One scale for all models, so that their maps can be compared.
        highest = max((value(layer) or 0.0 for one in facts for layer in one.layers), default=0.0)
        figures += [
            _layer_figure(quantity, value, same, highest=1.0 if of_whole else highest, of_whole=of_whole)
            for same in owners.values()
        ]
    return figures


def _layer_figure(
    quantity: str,
    value: Callable[[LayerFacts], float | None],
    owners: Sequence[Facts],
    *,
    highest: float,
    of_whole: bool,
) -> Figure:
    layers = owners[0].layers
    known = [(number, layer.name) for layer in layers if (number := value(layer)) is not None]
    (low, low_name), (high, high_name) = min(known), max(known)
    text = as_percent if of_whole else (lambda number: as_quantity(number, digits=2))
    labels = ", ".join(one.label for one in owners) if len(owners) <= 3 else f"{len(owners)} models"
    if text(low) == text(high):
        finding = f"{quantity} is {text(low)} in every layer"
    elif of_whole:
        finding = f"{quantity} runs from {text(low)} ({low_name}) to {text(high)} ({high_name})"
    else:
        median = text(statistics.median(number for number, _ in known))
        finding = f"{quantity} is highest in {high_name}: {text(high)}, against {median} in the median layer"
    title = f"{labels}: {finding}"
    meaning = (
        "Share of zeros"
        if of_whole
        else "Norm of the change over the norm of the original (the output if the method read data, else the weights)"
    )
    return Figure(
        title=title,
        caption=f"{meaning}, per linear layer.",
        svg=heat_map(layers, value, text, highest=highest, title=title),
        header=("layer", quantity),
        rows=tuple((layer.name, text(value(layer))) for layer in layers),
        csv=_csv(("layer", quantity), [(layer.name, _raw(value(layer))) for layer in layers]),
        file_name=f"{quantity}-{'-'.join(one.label.replace(' ', '-') for one in owners)}.csv",
    )


def side_by_side(facts: Sequence[Facts]) -> list[tuple[str, list[tuple[str, str]]]]:
    """[(prompt, [(model's label, its text)])], in the order in which prompts first appear."""
    prompts = dict.fromkeys(prompt for one in facts for prompt, _ in one.generations)
    texts = [(one.label, dict(one.generations)) for one in facts]
    return [(prompt, [(label, by[prompt]) for label, by in texts if prompt in by]) for prompt in prompts]


def _raw(number: float | None) -> str:
    return "" if number is None else repr(number)


def _csv(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([header, *rows])
    return text.getvalue()
