"""The picture of a trade: models as points, quality against what it costs, and the front that no model lies beyond.

Better is always down: both coordinates may be on logarithmic axes, where they range over more than a factor.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from markupsafe import Markup, escape

from overhaul.report.figures import shortened, svg_of, text_mark, ticks

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 480.0, 320.0, 52.0, 28.0, 30.0, 42.0
LOG_FROM = 3.0
"""An axis is logarithmic when its largest value is this many times its smallest."""
LETTER, LINE, RADIUS = 6.8, 13.0, 4.5
"""Width of a letter, rather too much than too little; height of a line; radius of a point."""

Box = tuple[float, float, float, float]
"""Left, top, right, bottom."""
Place = tuple[Box, Literal["start", "middle", "end"]]
"""Where a name can stand, and which of its ends is fixed: the true width of its letters is not known here."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """A model: `y` is better when smaller; `low` and `high` are its interval."""

    label: str
    x: float
    y: float
    low: float
    high: float
    is_best: bool
    is_reference: bool = False


@dataclass(frozen=True, slots=True)
class _Axis:
    """Values to lengths, from `start` to `end`; `numbers` are where it is labelled."""

    low: float
    high: float
    start: float
    end: float
    is_log: bool

    @classmethod
    def over(cls, values: Sequence[float], start: float, end: float) -> _Axis:
        """An axis with a little room on both sides."""
        low, high = min(values), max(values)
        if low > 0 and high >= LOG_FROM * low:
            room = (high / low) ** 0.06
            return cls(low / room, high * room, start, end, True)
        room = 0.08 * (high - low) or abs(high) * 0.1 or 1.0
        return cls(max(low - room, 0.0) if low >= 0 else low - room, high + room, start, end, False)

    def at(self, value: float) -> float:
        if self.is_log:
            share = math.log(value / self.low) / math.log(self.high / self.low)
        else:
            share = (value - self.low) / (self.high - self.low)
        return self.start + (self.end - self.start) * share

    @property
    def numbers(self) -> list[float]:
        if not self.is_log:
            return ticks(self.low, self.high)
        powers = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
        for digits in ((1, 2, 3, 5, 7), (1, 2, 5), (1, 3), (1,)):
            numbers = [digit * 10.0**power for power in powers for digit in digits]
            inside = [number for number in numbers if self.low <= number <= self.high]
            if len(inside) <= 7:
                break
        return inside


def scatter_chart(
    points: Sequence[Point],
    *,
    x_label: str,
    y_label: str,
    is_cost: bool,
    number: Callable[[float], str],
    title: str,
) -> Markup:
    """Models as points with their names; those that another one beats are paler, the others joined by a step line.

    Args:
        points: at least one.
        x_label, y_label: of the axes.
        is_cost: whether less is better on the x axis too.
        number: how a number of the x axis is written.
        title: for screen readers; the page prints it above.
    """
    x_axis = _Axis.over([point.x for point in points], LEFT, WIDTH - RIGHT)
    y_axis = _Axis.over([y for point in points for y in (point.low, point.y, point.high)], HEIGHT - BOTTOM, TOP)
    marks = []
    for y in y_axis.numbers:
        marks.append(
            f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y_axis.at(y):.1f}" y2="{y_axis.at(y):.1f}"/>'
        )
        marks.append(text_mark(LEFT - 7, y_axis.at(y) + 4, f"{y:.6g}", anchor="end"))
    for x in x_axis.numbers:
        marks.append(text_mark(x_axis.at(x), HEIGHT - BOTTOM + 16, number(x), anchor="middle"))
    better = "smaller is better" if is_cost else "larger is better"
    x_title = f"{x_label}{', logarithmic' if x_axis.is_log else ''} ({better})"
    y_title = f"{y_label}{', logarithmic' if y_axis.is_log else ''} (lower is better)"
    marks += [text_mark((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 5, x_title, anchor="middle"), text_mark(0, 12, y_title)]
    at = [(x_axis.at(point.x), y_axis.at(point.y)) for point in points]
    marks.append(_front(points, at, is_cost=is_cost))
    for point, (x, y) in zip(points, at, strict=True):
        marks.append(_mark(point, x, y, y_axis, number))
    marks += _labels(points, at)
    return svg_of(WIDTH, HEIGHT, marks, title=title)


def _front(points: Sequence[Point], at: Sequence[tuple[float, float]], *, is_cost: bool) -> str:
    """The steps between the best points: right of or above a step lies what some model beats.

    From left to right quality rises where x is a cost and falls where it is not; either way a step keeps to the
    worse side of both.
    """
    best = sorted((x, y) for point, (x, y) in zip(points, at, strict=True) if point.is_best)
    if not best:
        return ""
    path = f"M{best[0][0]:.1f},{best[0][1]:.1f}"
    for x, y in best[1:]:
        path += f" H{x:.1f} V{y:.1f}" if is_cost else f" V{y:.1f} H{x:.1f}"
    return f'<path class="line front" d="{path}"/>'


def _mark(point: Point, x: float, y: float, y_axis: _Axis, number: Callable[[float], str]) -> str:
    kind = "best" if point.is_best else "beaten"
    tip = f"<title>{escape(point.label)}: {point.y:.4g}, {escape(number(point.x))}</title>"
    ring = f'<circle class="ring" cx="{x:.1f}" cy="{y:.1f}" r="{RADIUS + 3.5}"/>' if point.is_reference else ""
    return (
        f'<line class="whisker {kind}" x1="{x:.1f}" x2="{x:.1f}" '
        f'y1="{y_axis.at(point.low):.1f}" y2="{y_axis.at(point.high):.1f}"/>'
        f'{ring}<circle class="point {kind}" cx="{x:.1f}" cy="{y:.1f}" r="{RADIUS}">{tip}</circle>'
    )


def _labels(points: Sequence[Point], at: Sequence[tuple[float, float]]) -> list[str]:
    """A name beside every point, where it covers least of the points and of the names before it; best ones first."""
    taken: list[Box] = [(x - RADIUS, y - RADIUS, x + RADIUS, y + RADIUS) for x, y in at]
    marks = []
    for index in sorted(range(len(points)), key=lambda index: not points[index].is_best):
        label, (x, y) = shortened(points[index].label, 26), at[index]
        others = [box for other, box in enumerate(taken) if other != index]
        box, anchor = min(_places(x, y, LETTER * len(label)), key=lambda place: _cost(place[0], others))
        taken.append(box)
        fixed = {"start": box[0], "middle": (box[0] + box[2]) / 2, "end": box[2]}[anchor]
        marks.append(text_mark(fixed, box[3] - 3, label, anchor=anchor, strong=points[index].is_best, halo=True))
    return marks


def _places(x: float, y: float, width: float) -> list[Place]:
    """Beside a point, the best place first: right, left, above, below, then further off."""
    near = RADIUS + 4

    def beside(middle: float, *, right: bool) -> Place:
        left = x + near if right else x - near - width
        return (left, middle - LINE / 2, left + width, middle + LINE / 2), "start" if right else "end"

    def over(top: float) -> Place:
        return (x - width / 2, top, x + width / 2, top + LINE), "middle"

    return [
        beside(y, right=True),
        beside(y, right=False),
        over(y - near - LINE),
        over(y + near),
        *(beside(y + lines * LINE, right=right) for lines in (-1, 1, -2, 2, -3, 3) for right in (True, False)),
    ]


def _cost(box: Box, others: Sequence[Box]) -> float:
    """What a name covers, and what of it lies outside the chart, which is worse."""
    inside = _shared(box, (LEFT, TOP - 8, WIDTH - 2, HEIGHT - BOTTOM))
    area = (box[2] - box[0]) * (box[3] - box[1])
    return sum(_shared(box, other) for other in others) + 10 * (area - inside)


def _shared(one: Box, other: Box) -> float:
    width = min(one[2], other[2]) - max(one[0], other[0])
    height = min(one[3], other[3]) - max(one[1], other[1])
    return max(width, 0.0) * max(height, 0.0)
