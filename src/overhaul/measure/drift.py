"""Layer drift (Guo et al., 2024): how far each block of a tuned model has moved, and whether the bottom moved more."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from overhaul.method import Difference, Positive

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from overhaul.drift import Moved
    from overhaul.progress import Bar
    from overhaul.stored import Stored
    from overhaul.table import Curve, LayerMap, Row, Table

_OUTSIDE = {"embedding": "embedding", "head": "head", "norm": "final-norm", "other": "other"}
"""What is outside of the blocks, by what it is for."""


class MeasureDrift(Difference):
    """How far each block has moved from the base's weights, and the bottom blocks beside the top ones."""

    paper: ClassVar[str] = (
        "Yiduo Guo, Jie Fu, Huishuai Zhang, Dongyan Zhao, Yikang Shen: Efficient Continual Pre-training by Mitigating "
        "the Stability Gap, 2024, arXiv:2406.14833"
    )

    ends: Positive = Field(5, description="Blocks at the bottom, and at the top, that are averaged over.")

    def between(self, base: str, tuned: str) -> Table:
        """A row for each block, for both ends and their ratio, for each kind of matrix, and for what is outside.

        Raises:
            UserError: the models have other layers, or the tuned one is an adapter of another base.
        """
        from overhaul.drift import of_blocks, size_of_ends
        from overhaul.progress import Bar
        from overhaul.stored import listed, refuse_other_base, stored
        from overhaul.table import Table

        before, now = stored(base), stored(tuned)
        refuse_other_base(before, now)
        notes = [
            f"{name} is left out: it has the shape {before.others.get(name, 'missing')} in {base} and "
            f"{now.others.get(name, 'missing')} in {tuned}"
            for name in dict.fromkeys([*before.others, *now.others])
            if before.others.get(name) != now.others.get(name)
        ]
        with Bar(f"drift of {tuned}", len(before.shapes) + len(before.others)) as bar:
            found = list(_moved(before, now, bar))
        num_blocks = 1 + max(one.block for one in listed(base) if one.block is not None)
        size = size_of_ends(num_blocks, self.ends)
        if size < self.ends:
            notes.append(
                f"{base} has {num_blocks} blocks: {size} at the bottom and {size} at the top are averaged over"
            )
        if not any(one.change for one in found):
            notes.append(f"{tuned} has the weights of its base: nothing was trained, and there is no ratio")
        rows, left_out = _rows(found, size, tuned)
        return Table(
            rows=tuple(rows),
            curves=_curves(of_blocks(found), tuned),
            maps=_maps(found, tuned),
            details=tuple(_record(one, base, tuned) for one in found),
            notes=(*notes, *left_out),
        )


def _moved(before: Stored, now: Stored, bar: Bar) -> Iterator[Moved]:
    """Every parameter that both have, one after the other; no more than two are in memory at once."""
    from overhaul.drift import moved
    from overhaul.stored import listed

    for one in listed(before.name):
        layer = one.name.removesuffix(".weight")
        name = layer if layer in before.shapes else one.name
        if name in before.shapes or before.others[name] == now.others.get(name):
            yield moved(one, before.read(name), now.read(name))
        bar.step(name)


def _rows(found: Sequence[Moved], size: int, model: str) -> tuple[list[Row], list[str]]:
    """The numbers, and what is said of those that are none: relative to weights that were zero."""
    from overhaul.drift import BOTTOM, RATIO, TOP, bottom_and_top, of_blocks, relative
    from overhaul.table import Row

    blocks = of_blocks(found)
    bottom, top = bottom_and_top(blocks, size)
    counts = [sum(one.count for one in found if one.block == number) for number in range(len(blocks))]
    told = [(f"drift/block-{number:02d}", value, counts[number]) for number, value in enumerate(blocks)]
    told += [(BOTTOM, bottom, size), (TOP, top, size)]
    if top:
        told.append((RATIO, bottom / top, 2 * size))
    groups: dict[str, list[Moved]] = {}
    for one in found:
        groups.setdefault(_OUTSIDE[one.category] if one.block is None else f"kind/{one.kind}", []).append(one)
    inside_first = sorted(groups, key=lambda name: not name.startswith("kind/"))
    told += [(f"drift/{name}", relative(groups[name]), sum(one.count for one in groups[name])) for name in inside_first]
    rows = [
        Row(model=model, metric=metric, value=value, low=value, high=value, count=count)
        for metric, value, count in told
        if math.isfinite(value)
    ]
    zero = [metric for metric, value, _ in told if not math.isfinite(value)]
    return rows, [f"no {', '.join(zero)}: the base's weights there are all zero"] if zero else []


def _curves(blocks: Sequence[float], model: str) -> tuple[Curve, ...]:
    from overhaul.table import Curve

    points = [(float(number), value) for number, value in enumerate(blocks) if math.isfinite(value)]
    return (
        Curve(name=model, x=tuple(x for x, _ in points), y=tuple(y for _, y in points), x_label="block",
              y_label="change / base", title="How far each block has moved"),
    )  # fmt: skip


def _maps(found: Sequence[Moved], model: str) -> tuple[LayerMap, ...]:
    """Every matrix of the blocks."""
    from overhaul.drift import relative
    from overhaul.table import LayerMap

    matrices = [one for one in found if one.block is not None and one.category != "norm"]
    values = tuple((one.name.removesuffix(".weight"), _finite(relative([one]))) for one in matrices)
    return (
        LayerMap(model=model, quantity="drift", values=values, meaning="Norm of the change over the norm of the base"),
    )


def _record(one: Moved, base: str, tuned: str) -> dict[str, object]:
    """Everything that is known of one tensor."""
    from dataclasses import asdict

    from overhaul.drift import relative

    return {"model": tuned, "base": base, **asdict(one), "relative": _finite(relative([one]))}


def _finite(value: float) -> float | None:
    """None, which JSON and pictures know, for the ratio to a base that is zero."""
    return value if math.isfinite(value) else None
