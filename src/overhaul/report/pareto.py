"""Which models are worth having: those that no other beats in both quality and what quality is paid with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from overhaul.report.facts import FORGETTING, TASK_LOSS, Facts, metric, quality
from overhaul.report.numbers import as_count, as_duration, as_size, as_speed


@dataclass(frozen=True, slots=True, kw_only=True)
class Trade:
    """A quantity that is traded for quality.

    Attributes:
        name: in tables and JSON.
        label: of its axis.
        value: None is "not measured".
        is_cost: whether less of it is better.
        better: what a model with a better value is, or does.
        noise: relative difference below which two values count as equal.
        text: how a value is written.
    """

    name: str
    label: str
    value: Callable[[Facts], float | None]
    is_cost: bool
    better: str
    noise: float = 0.0
    text: Callable[[float | None], str] = as_size


SPEED_NOISE = 0.25
"""Two speeds that are nearer, as shares, may be one: they are short timings on a machine that others use too."""
SIZE = Trade(name="size", label="weights on disk", value=lambda one: one.bytes, is_cost=True, better="smaller")
TRADES = (
    SIZE,
    Trade(
        name="prefill",
        label="prefill tokens/s",
        value=lambda one: one.tokens_per_second,
        is_cost=False,
        better="faster in prefill",
        noise=SPEED_NOISE,
        text=as_speed,
    ),
    Trade(
        name="decode",
        label="decode tokens/s",
        value=lambda one: one.decode_tokens_per_second,
        is_cost=False,
        better="faster in decoding",
        noise=SPEED_NOISE,
        text=as_speed,
    ),
)
ADAPTATION_TRADES = (
    Trade(
        name="forgetting",
        label="forgetting, nats a token",
        value=lambda one: metric(one, FORGETTING),
        is_cost=True,
        better="less forgetful",
        text=lambda nats: f"{nats:.3f}",
    ),
    Trade(
        name="trained",
        label="trained numbers",
        value=lambda one: one.trainable_parameters,
        is_cost=True,
        better="of fewer trained numbers",
        text=as_count,
    ),
    Trade(
        name="stored",
        label="bytes beside the base",
        value=lambda one: one.stored_bytes,
        is_cost=True,
        better="smaller to keep",
    ),
    Trade(
        name="memory",
        label="peak memory",
        value=lambda one: one.peak_rss_bytes,
        is_cost=True,
        better="made in less memory",
    ),
    Trade(
        name="time",
        label="time to make",
        value=lambda one: one.seconds,
        is_cost=True,
        better="made sooner",
        noise=SPEED_NOISE,
        text=as_duration,
    ),
)
"""What is paid for the gain on a task; where that is known, these are what models are compared by."""


def trades_of(facts: Sequence[Facts]) -> tuple[Trade, ...]:
    """What is traded between these models."""
    return ADAPTATION_TRADES if any(metric(one, TASK_LOSS) is not None for one in facts) else TRADES


def front(points: Sequence[tuple[float, float]], noise: float = 0.0) -> list[bool]:
    """For each point whether no other is at most as large in both coordinates and smaller in one.

    Points that are equal do not beat each other, nor do those that differ in the first coordinate alone, by `noise`.
    """
    return [not any(_beats(other, point, noise) for other in points) for point in points]


def _beats(one: tuple[float, float], other: tuple[float, float], noise: float) -> bool:
    at_most = one[0] <= other[0] and one[1] <= other[1]
    return at_most and (one[1] < other[1] or abs(one[0] - other[0]) > noise * abs(other[0]))


def on_front(facts: Sequence[Facts], trade: Trade) -> list[bool]:
    """For each model whether no other is as good or better in both quality and the trade; never where unmeasured."""
    points = {index: point for index, one in enumerate(facts) if (point := _point(one, trade))}
    best = dict(zip(points, front(list(points.values()), trade.noise), strict=True))
    return [best.get(index, False) for index in range(len(facts))]


def _point(facts: Facts, trade: Trade) -> tuple[float, float] | None:
    """Both coordinates as costs."""
    row, value = quality(facts), trade.value(facts)
    return None if row is None or value is None else (value if trade.is_cost else -value, row.value)


def fronts_of(facts: Sequence[Facts]) -> list[tuple[str, ...]]:
    """For each model the names of the trades on whose front it is."""
    on = {trade.name: on_front(facts, trade) for trade in trades_of(facts)}
    return [tuple(name for name, best in on.items() if best[index]) for index in range(len(facts))]
