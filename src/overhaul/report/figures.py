"""Small SVG charts, coloured by the page's style sheet, so that they follow light and dark.

Lengths are in units of the SVG's view box; a chart scales with its column. Series are told apart by colour,
by dash pattern and by the legend; every chart has a title for screen readers.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from markupsafe import Markup, escape

from overhaul.report.numbers import as_percent, as_place, as_tokens
from overhaul.table import TOKENS, Curve, Span

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MOST_POINTS = 500
"""A line with more points is drawn through the extremes of groups of points; the CSV has them all."""

Scale = Callable[[float], float]
"""From a value to a place in a picture."""

DASHES = ("", "6 3", "2 3", "8 3 2 3", "1 2", "10 4")


def ticks(low: float, high: float, wanted: int = 5) -> list[float]:
    """Round numbers (1, 2 or 5 times a power of ten apart) within [low, high], `wanted` of them or so."""
    if high <= low:
        return [low]
    raw = (high - low) / wanted
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(step * power for step in (1, 2, 5, 10) if step * power >= 0.8 * raw)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [index * step for index in range(first, last + 1)]


def thinned(points: Sequence[tuple[float, float]], most: int = MOST_POINTS) -> list[tuple[float, float]]:
    """About `most` of `points`: the lowest and the highest of each group, so that no spike is lost."""
    if len(points) <= most:
        return list(points)
    size = math.ceil(2 * len(points) / most)
    kept: list[tuple[float, float]] = []
    for start in range(0, len(points), size):
        group = points[start : start + size]
        kept += sorted({min(group, key=lambda point: point[1]), max(group, key=lambda point: point[1])})
    return kept


def finite_points(curve: Curve) -> list[tuple[float, float]]:
    """The points of a curve that can be drawn."""
    return [(x, y) for x, y in zip(curve.x, curve.y, strict=True) if math.isfinite(x) and math.isfinite(y)]


def line_chart(curves: Sequence[Curve], *, title: str) -> Markup:
    """Curves with common axes: 480 wide, y ticks left, x ticks below, a legend when there are several.

    Args:
        curves: at least one, all with the labels of the first.
        title: for screen readers; the page prints it above.
    """
    width, right, bottom = 480, 16, 38
    names = [curve.name for curve in curves] if len(curves) > 1 else []
    legend, top = _legend(names, taken=7 * len(curves[0].y_label), right_edge=width - right)
    height = top + 186 + bottom
    lines = [thinned(finite_points(curve)) for curve in curves]
    xs, ys = ([point[axis] for line in lines for point in line] or [0.0, 1.0] for axis in (0, 1))
    x_low, x_high = 0.0 if curves[0].x_label == TOKENS else min(xs), max(xs)
    y_low, y_high = _padded(min(ys), max(ys))
    written_y = {y: f"{y:.6g}" for y in ticks(y_low, y_high)}
    left = max(52, 10 + 7 * max(map(len, written_y.values())))

    def at_x(x: float) -> float:
        return left + (width - left - right) * (x - x_low) / ((x_high - x_low) or 1)

    def at_y(y: float) -> float:
        return height - bottom - (height - top - bottom) * (y - y_low) / (y_high - y_low)

    marks = []
    for y, text in written_y.items():
        marks.append(f'<line class="grid" x1="{left}" x2="{width - right}" y1="{at_y(y):.1f}" y2="{at_y(y):.1f}"/>')
        marks.append(text_mark(left - 7, at_y(y) + 4, text, anchor="end"))
    written = as_tokens if curves[0].x_label == TOKENS else as_place
    whole = all(x == round(x) for x in xs)
    for x in ticks(x_low, x_high):
        if whole and abs(x - round(x)) > 1e-9:  # there is no step 1.5
            continue
        marks.append(text_mark(at_x(x), height - bottom + 16, written(x), anchor="middle"))
    marks.append(text_mark((left + width - right) / 2, height - 4, curves[0].x_label, anchor="middle"))
    marks.append(text_mark(0, 12, curves[0].y_label))
    for index, line in enumerate(lines):
        path = " ".join(f"{at_x(x):.1f},{at_y(y):.1f}" for x, y in line)
        marks.append(f'<polyline class="line s{index % 6}"{_dash(index)} points="{path}"/>')
        if len(line) == 1:
            cx, cy = at_x(line[0][0]), at_y(line[0][1])
            marks.append(f'<circle class="dot s{index % 6}" cx="{cx:.1f}" cy="{cy:.1f}" r="3"/>')
    for index, curve in enumerate(curves):
        for span in curve.spans:
            marks += _span(index, span, at_x, at_y, room=width - right - at_x(span.x))
    return svg_of(width, height, [*marks, *legend], title=title)


def _dash(index: int) -> str:
    """The pattern of a series: the seventh has the first one's colour, and another pattern."""
    pattern = DASHES[(index + index // 6) % 6]
    return f' stroke-dasharray="{pattern}"' if pattern else ""


def _span(index: int, span: Span, at_x: Scale, at_y: Scale, *, room: float) -> list[str]:
    """A line down from the highest point to the level of the beginning, which is dotted; its text where there is room.

    Args:
        index: of the curve.
        span: what is marked.
        at_x, at_y: places in the picture.
        room: to the right of it.
    """
    x, low, high, start = at_x(span.x), at_y(span.low), at_y(span.high), at_x(0.0)
    kind = f'class="span s{index % 6}"'
    aside, anchor = (6, "start") if room > 6 + 7 * len(span.text) else (-6, "end")
    return [
        f'<line {kind} stroke-dasharray="1 3" x1="{start:.1f}" x2="{x:.1f}" y1="{low:.1f}" y2="{low:.1f}"/>',
        f'<line {kind} x1="{x:.1f}" x2="{x:.1f}" y1="{low:.1f}" y2="{high:.1f}"/>',
        text_mark(x + aside, (low + high) / 2 + 4, span.text, anchor=anchor, strong=True, halo=True),
    ]


def _legend(names: Sequence[str], *, taken: float, right_edge: float) -> tuple[list[str], int]:
    """Names with their lines, on the right, and where what is below them begins.

    Args:
        names: shortened where they are longer than a row.
        taken: of the first row's width, by the label of the y axis: where they do not fit beside it, they go below.
        right_edge: where rows end.
    """
    names = [shortened(name, 54) for name in names]
    widths = [36 + 7 * len(name) for name in names]
    rows: list[list[int]] = [[]] if sum(widths) <= max(right_edge - taken, 0) else [[], []]
    for index, width in enumerate(widths):
        if rows[-1] and sum(widths[place] for place in rows[-1]) + width > right_edge:
            rows.append([])
        rows[-1].append(index)
    marks = []
    for number, row in enumerate(rows):
        x, y = right_edge - sum(widths[index] for index in row), 8 + 16 * number
        for index in row:
            marks.append(
                f'<line class="line s{index % 6}"{_dash(index)} x1="{x:.1f}" x2="{x + 18:.1f}" y1="{y}" y2="{y}"/>'
            )
            marks.append(text_mark(x + 23, y + 4, names[index]))
            x += widths[index]
    return marks, 26 + 16 * (len(rows) - 1)


def bar_chart(bars: Sequence[tuple[str, float]], *, title: str, full: str) -> Markup:
    """Horizontal bars of shares from 0 to 1; a bar beyond 1 runs past the line that marks 1.

    Args:
        bars: (label, share); a share below 0 shows no bar.
        title: for screen readers.
        full: what a share of 1 means.
    """
    labels = [shortened(label, 24) for label, _ in bars]
    width, right, row, top = 600, 50, 30, 22
    left = 16 + 7 * max(map(len, labels))
    height = top + row * len(bars) + 4
    longest = max(1.0, *(share for _, share in bars))

    def at(share: float) -> float:
        return left + (width - left - right) * share / longest

    marks = [text_mark(at(1), 12, full, anchor="end" if longest < 1.15 else "middle")]
    for index, (label, (_, share)) in enumerate(zip(labels, bars, strict=True)):
        y = top + row * index
        shown = max(share, 0.0)
        marks.append(text_mark(0, y + 17, label, strong=True))
        marks.append(f'<rect class="track" x="{left}" y="{y + 4}" width="{at(1) - left:.1f}" height="18"/>')
        marks.append(f'<rect class="bar" x="{left}" y="{y + 4}" width="{at(shown) - left:.1f}" height="18"/>')
        marks.append(text_mark(max(at(shown), at(1)) + 8, y + 17, as_percent(share, digits=2), strong=True))
    marks.append(f'<line class="axis" x1="{at(1):.1f}" x2="{at(1):.1f}" y1="{top}" y2="{height - 4}"/>')
    return svg_of(width, height, marks, title=title)


def placed(name: str) -> tuple[str, str]:
    """(block, projection) of a layer: its first number and what follows; ("", name) without a number."""
    match = re.match(r"(?:.*?\.)?(\d+)\.(.+)$", name)
    return (match[1], match[2]) if match else ("", name)


def heat_map(
    values: Sequence[tuple[str, float | None]],
    text: Callable[[float | None], str],
    *,
    highest: float,
    title: str,
    across: str = "block",
) -> Markup:
    """Blocks from left to right, projections from top to bottom; the darker, the higher.

    Args:
        values: (layer, number from 0 to `highest`) in the model's order; None is drawn as an empty cell.
        text: how a value is written, in the tooltips and the scale.
        highest: the value at full strength.
        title: for screen readers.
        across: what the blocks are called below.
    """
    cells = [(*placed(name), name, number) for name, number in values]
    blocks = list(dict.fromkeys(block for block, _, _, _ in cells))
    rows = list(dict.fromkeys(row for _, row, _, _ in cells))
    left, top, side = 8 + 7 * max(map(len, [*rows, across])), 4, 18
    step = min(40.0, max(10.0, 560 / len(blocks)))
    right, bottom = left + step * len(blocks), top + side * len(rows)
    marks = [text_mark(left - 8, top + side * index + 13, row, anchor="end") for index, row in enumerate(rows)]
    for block, row, name, number in cells:
        x, y = left + step * blocks.index(block), top + side * rows.index(row)
        strength = 0.0 if number is None or not highest else min(max(number / highest, 0.0), 1.0)
        tip = f"<title>{escape(name)}: {escape(text(number))}</title>"
        kind = "cell none" if number is None else "cell"
        marks.append(
            f'<rect class="{kind}" x="{x:.1f}" y="{y}" width="{step - 1.5:.1f}" height="{side - 1.5}" '
            f'fill-opacity="{strength:.3f}">{tip}</rect>'
        )
    every = max(1, math.ceil(len(blocks) / 10))
    for index in range(0, len(blocks), every):
        marks.append(text_mark(left + step * (index + 0.5), bottom + 14, blocks[index], anchor="middle"))
    marks.append(text_mark(left - 8, bottom + 14, across, anchor="end"))
    marks += _scale(left, bottom + 30, text(0.0), text(highest))
    return svg_of(max(right, left + 200) + 4, bottom + 46, marks, title=title)


def grid_map(
    values_RC: Sequence[Sequence[float | None]], rows: Sequence[str], columns: Sequence[str], *, title: str, corner: str
) -> Markup:
    """A matrix of shares with its numbers in percent; the darker, the higher.

    Args:
        values_RC: from 0 to 1; None leaves the place empty.
        rows: what stands left of each.
        columns: what stands above each; where one does not fit, all are numbered, as rows should be then.
        title: for screen readers.
        corner: what stands left of the columns' names.
    """
    names = [shortened(row, 26) for row in rows]
    left, top, side = 12 + 7 * max(map(len, [*names, corner])), 22, 22
    step = min(56.0, max(30.0, 400 / len(columns)))
    fit = all(7 * len(column) < step for column in columns)
    marks = [text_mark(left - 8, 14, corner, anchor="end")]
    for place, column in enumerate(columns):
        marks.append(text_mark(left + step * (place + 0.5), 14, column if fit else str(place + 1), anchor="middle"))
    for number, (row, values) in enumerate(zip(rows, values_RC, strict=True)):
        y = top + side * number
        marks.append(text_mark(left - 8, y + 15, names[number], anchor="end"))
        for place, value in enumerate(values):
            if value is None:
                continue
            x = left + step * place
            tip = f"<title>{escape(row)}, {escape(columns[place])}: {escape(as_percent(value))}</title>"
            marks.append(
                f'<rect class="cell" x="{x:.1f}" y="{y}" width="{step - 1.5:.1f}" height="{side - 1.5}" '
                f'fill-opacity="{value:.3f}">{tip}</rect>'
            )
            # Which text can be read on a cell differs between light and dark pages only where the cell is darkest.
            kind = "on" if value > 0.85 else "middle" if value > 0.5 else "strong"
            marks.append(
                f'<text class="{kind}" x="{x + step / 2:.1f}" y="{y + 15}" '
                f'text-anchor="middle" pointer-events="none">{100 * value:.0f}</text>'
            )
    return svg_of(left + step * len(columns) + 4, top + side * len(rows) + 4, marks, title=title)


def _scale(left: float, y: float, lowest: str, highest: str) -> list[str]:
    start = left + 8 * len(lowest) + 6
    steps = [
        f'<rect class="cell" x="{start + 14 * index:.1f}" y="{y}" width="14" height="10" '
        f'fill-opacity="{index / 8:.3f}"/>'
        for index in range(9)
    ]
    return [text_mark(left, y + 9, lowest), *steps, text_mark(start + 14 * 9 + 6, y + 9, highest)]


def curves_png(curves: Sequence[Curve], path: Path) -> None:
    """Writes the charts of `line_chart` side by side into a PNG; `curves` has at least one."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    # Not `savefig`, which draws everything twice.
    FigureCanvasAgg(drawn(curves)).print_png(path)


def drawn(curves: Sequence[Curve]) -> Figure:
    """The charts of `curves_png`, for matplotlib; each is 4.2 inches wide, between margins of one size.

    A layout that fits margins to the labels takes longer than all the rest of drawing.
    """
    from matplotlib.figure import Figure

    charts = by_label(curves)
    width, height, left, right = 5.2 * len(charts), 3.2, 0.82, 0.18
    figure = Figure(figsize=(width, height), dpi=150)
    margins = {"left": left / width, "right": 1 - right / width, "bottom": 0.56 / height, "top": 1 - 0.36 / height}
    between = (left + right) / (5.2 - left - right)
    places = figure.subplots(1, len(charts), squeeze=False, gridspec_kw=margins | {"wspace": between})
    for axes, group in zip(places[0], charts, strict=True):
        for curve in group:
            (line,) = axes.plot(curve.x, curve.y, label=curve.name, linewidth=1.4)
            for span in curve.spans:
                axes.vlines(span.x, span.low, span.high, colors=line.get_color(), linestyles="dotted")
                axes.annotate(span.text, (span.x, (span.low + span.high) / 2), (4, 0), textcoords="offset points")
        axes.set(xlabel=group[0].x_label, title=group[0].y_label)
        if group[0].x_label == TOKENS:
            axes.set_xlim(left=0)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        if len(group) > 1:
            axes.legend(frameon=False)
    return figure


def by_label(curves: Sequence[Curve]) -> list[list[Curve]]:
    """Curves in groups of the same `y_label`, in the order of their first."""
    labels = dict.fromkeys(curve.y_label for curve in curves)
    return [[curve for curve in curves if curve.y_label == label] for label in labels]


def _padded(low: float, high: float) -> tuple[float, float]:
    """A little room above and below; a flat line gets a tenth of its height."""
    room = 0.05 * (high - low) or abs(high) * 0.1 or 1.0
    # A quantity that is never negative gets no negative axis.
    return (max(low - room, 0.0) if low >= 0 else low - room), high + room


def shortened(label: str, most: int) -> str:
    """The label, cut to `most` letters."""
    return label if len(label) <= most else f"{label[: most - 1]}…"


def text_mark(x: float, y: float, text: str, *, anchor: str = "start", strong: bool = False, halo: bool = False) -> str:
    """A text; with a halo it can be read on top of lines."""
    names = [name for name, wanted in (("strong", strong), ("halo", halo)) if wanted]
    kind = f' class="{" ".join(names)}"' if names else ""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{kind}>{escape(text)}</text>'


def svg_of(width: float, height: float, marks: Sequence[str], *, title: str) -> Markup:
    """A picture of that size, which scales with its column."""
    label = escape(title)
    return Markup(
        f'<svg role="img" aria-label="{label}" viewBox="0 0 {width:.0f} {height:.0f}" '
        f'style="max-width:{width * 1.15:.0f}px">{"".join(marks)}</svg>'
    )
