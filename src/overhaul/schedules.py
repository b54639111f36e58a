"""Learning rates over a run as pure functions: share of the run in [0, 1] -> factor of the peak rate.

Every schedule is a chain of pieces, each of which begins where the one before it ended: there is no jump by
construction, and the next run can begin where this one ended.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

Schedule = Callable[[float], float]
"""Share of the run -> factor of the peak learning rate."""
Shape = Literal["linear", "cosine", "inverse-sqrt", "one-minus-sqrt", "exponential"]

_INVERSE_SQRT = 10.0
"""How much of the inverse square root's fall lies at its beginning (Ibrahim et al., 2024)."""


class Piece(NamedTuple):
    """A part of a schedule.

    Attributes:
        until: share of the run where it ends; one that would have no length is left out, and changes nothing.
        to: factor of the peak rate there.
        shape: how it goes there.
    """

    until: float
    to: float
    shape: Shape = "linear"


def chain(pieces: Sequence[Piece], *, start: float) -> Schedule:
    """One piece after the other.

    Args:
        pieces: in order; after the last one, its factor stays.
        start: factor at the beginning of the first.

    Raises:
        ValueError: a piece would end before it begins.
    """
    spans: list[tuple[float, float, Piece]] = []
    began, last = 0.0, start
    for piece in pieces:
        if piece.until < began:
            raise ValueError(f"a piece of the schedule ends at {piece.until:g} of the run and begins at {began:g}")
        if piece.until > began:
            spans.append((began, last, piece))
            began, last = piece.until, piece.to

    def factor(share: float) -> float:
        for began, value, piece in spans:
            if share < piece.until:
                return _between(value, piece.to, (share - began) / (piece.until - began), piece.shape)
        return last

    return factor


def _between(start: float, end: float, share: float, shape: Shape) -> float:
    if shape == "exponential":
        return start * (end / start) ** share
    gone = {
        "linear": share,
        "cosine": 0.5 * (1 - math.cos(math.pi * share)),
        "inverse-sqrt": _inverse_sqrt(share) / _inverse_sqrt(1.0),
        "one-minus-sqrt": math.sqrt(share),
    }[shape]
    return start + (end - start) * gone


def _inverse_sqrt(share: float) -> float:
    return 1 / math.sqrt(1 + _INVERSE_SQRT * share) - 1


def schedule(
    name: Literal["linear", "cosine", "constant", "thirds", "restarts"],
    warmup: float,
    floor: float = 0.0,
    *,
    start: float = 0.0,
) -> Schedule:
    """A linear warm-up over the first `warmup` share of the run, then linear or cosine decay to `floor`, or none.

    Two have jumps: `thirds` has in each third of the run a tenth of the rate of the third before, and `restarts` is a
    cosine decay in each half (SGDR, Loshchilov and Hutter, 2017).

    Args:
        name: what follows the warm-up.
        warmup: its share of the run.
        floor: factor at the end of a decay.
        start: factor at the beginning of a warm-up.
    """
    if name == "thirds":
        rising = schedule("constant", warmup, start=start)
        return lambda share: rising(share) * 0.1 ** min(int(3 * share), 2)
    if name == "restarts":
        rising, falling = schedule("constant", warmup, start=start), schedule("cosine", 0.0, floor)
        return lambda share: rising(share) * falling(2 * share % 1 if share < 1 else 1.0)
    after = Piece(1.0, 1.0) if name == "constant" else Piece(1.0, floor, name)
    return chain((Piece(warmup, 1.0), after), start=start if warmup else 1.0)


def warmup_stable_decay(
    warmup: float, decay: float, floor: float, *, shape: Shape = "linear", start: float = 0.0
) -> Schedule:
    """A warm-up, the peak rate, and a decay at the end (Hu et al., 2024, MiniCPM).

    Args:
        warmup: its share of the run.
        decay: share of the run at its end in which the rate falls to `floor`.
        floor: factor at the end.
        shape: of the decay.
        start: factor at the beginning of a warm-up.

    Raises:
        ValueError: warm-up and decay are longer than the run.
    """
    # 1 - 0.9 is a little below 0.1.
    ends = max(1 - decay, warmup) if math.isclose(1 - decay, warmup) else 1 - decay
    stable = Piece(ends, 1.0)
    return chain((Piece(warmup, 1.0), stable, Piece(1.0, floor, shape)), start=start if warmup else 1.0)


def infinite(
    warmup: float,
    cooldown: float,
    constant: float,
    *,
    shape: Literal["cosine", "inverse-sqrt"] = "cosine",
    start: float = 0.0,
) -> Schedule:
    """A warm-up, a fall to a rate that can be kept for ever, and that rate (Ibrahim et al., 2024, section 7.4).

    The next run goes on at `constant`, without warming up again; `annealing` makes something to be used of it.

    Args:
        warmup, cooldown: their shares of the run; without a cooldown the rate stays at its peak.
        constant: factor of the rate that is kept.
        shape: of the cooldown.
        start: factor at the beginning of a warm-up.

    Raises:
        ValueError: warm-up and cooldown are longer than the run.
    """
    last = constant if cooldown else 1.0
    pieces = (Piece(warmup, 1.0), Piece(warmup + cooldown, constant, shape), Piece(1.0, last))
    return chain(pieces, start=start if warmup else 1.0)


def annealing(floor: float, *, start: float = 1.0) -> Schedule:
    """An exponential fall over the whole run (Ibrahim et al., 2024, section 7.4).

    Args:
        floor: factor at the end, above 0.
        start: factor at the beginning.
    """
    return chain((Piece(1.0, floor, "exponential"),), start=start)


def part_of(rate: Schedule, begins: float, ends: float) -> Schedule:
    """The rates of a part of a run, from one share of the whole to another."""
    return lambda share: rate(begins + share * (ends - begins))
