"""What happens to the loss on other text while a model learns: the stability gap (Guo et al., 2024; De Lange, 2022).

At first it rises steeply, then part of that comes back: who looks only at the end sees neither.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from overhaul.journal import TableNote

RECOVERED = 0.9
"""Share of the way back from the highest loss to the last one after which a gap is over."""


class Gap(NamedTuple):
    """A rise of the loss on one text, and what came back of it.

    Attributes:
        depth: highest loss less that before the first step, in nats a token.
        at: tokens trained on until then.
        length: tokens until `RECOVERED` of the way back to the last loss; None where the last is the highest.
        area: over that last loss, or that before where it is higher: nats a token, times tokens trained on.
        final: last loss less that before.
    """

    depth: float
    at: int
    length: int | None
    area: float
    final: float


def gap(points: Sequence[tuple[int, float]]) -> Gap:
    """The gap in a curve.

    Args:
        points: (tokens trained on, loss), in order, that before the first step first; two or more.
    """
    tokens, losses = (np.array(axis, dtype=float) for axis in zip(*points, strict=True))
    top = int(losses.argmax())
    before, last, highest = losses[0], losses[-1], losses[top]
    if not top:
        return Gap(0.0, 0, 0, 0.0, float(last - before))
    back = [place for place in range(top, len(losses)) if losses[place] <= highest - RECOVERED * (highest - last)]
    over = np.maximum(losses - max(before, last), 0.0)
    return Gap(
        depth=float(highest - before),
        at=int(tokens[top]),
        length=int(tokens[back[0]]) if highest > last else None,
        area=float(np.trapezoid(over, tokens)),
        final=float(last - before),
    )


def gaps_note(points: Sequence[Mapping[str, float]], before: Mapping[str, float], prefix: str) -> TableNote | None:
    """A table of the gaps in a training history; None where nothing was looked at on the way.

    Args:
        points: of the history.
        before: losses before the first step, by text.
        prefix: how the losses' names begin in the points.
    """
    rows = []
    for name, start in before.items():
        seen = [(int(point["tokens"]), point[prefix + name]) for point in points if prefix + name in point]
        if not seen or not all(math.isfinite(loss) for _, loss in [(0, start), *seen]):
            continue
        found = gap([(0, start), *seen])
        back = f"{found.length:,}" if found.length is not None else "not yet"
        rows.append((name, f"{start:.3f}", f"{found.depth:+.3f}", f"{found.at:,}", back, f"{found.final:+.3f}",
                     f"{found.area:,.0f}"))  # fmt: skip
    if not rows:
        return None
    columns = ("text", "loss before", "highest above it", "after tokens", f"{RECOVERED:.0%} of the way back after",
               "last above it", "area of the gap, nats x tokens")  # fmt: skip
    return TableNote(title="What happened to other text on the way.", columns=columns, rows=tuple(rows))
