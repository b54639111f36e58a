"""Which slice an example is in: decided by its content, or a column, and a seed, whatever other examples there are.

So the others stay where they are when one is taken out of the data, and all copies of an example are in one slice.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from overhaul.errors import UserError

Cell = tuple[int, int]
"""A shard and a slice of it, each counted from 0."""


class Example(Protocol):
    """What can be divided: a text, or a picture."""

    @property
    def id(self) -> str:
        """Hash of the content."""
        ...

    @property
    def tags(self) -> tuple[tuple[str, str], ...]:
        """Columns with values that are no content."""
        ...


@dataclass(frozen=True, slots=True)
class Member:
    """An example of a slice.

    Attributes:
        row: its content, an `Example`.
        copies: how often the data has it.
        tags: the columns that it can be asked for by, of all copies.
    """

    row: Any
    copies: int
    tags: tuple[tuple[str, str], ...]


def cell_of(name: str, num_shards: int, num_slices: int, seed: int) -> Cell:
    """Where what goes by a name is: each slice with the same probability, over seeds."""
    drawn = int.from_bytes(hashlib.sha256(f"{seed}\n{name}".encode()).digest()[:8], "big")
    return drawn % num_shards, drawn // num_shards % num_slices


def divided(
    rows: Iterable[Example], num_shards: int, num_slices: int, *, seed: int, together: str | None = None
) -> Mapping[Cell, Sequence[Member]]:
    """The examples of every slice, each slice in an order of its own that does not depend on the data's.

    Args:
        rows: all of them.
        num_shards, num_slices: how many shards, and slices of each.
        seed: of the division.
        together: a column among the rows' tags: examples with one value of it are in one slice, copies with several
            values in that of the first by name. One without a value is where its content says.

    Raises:
        UserError: a slice has no example.
    """
    copies: dict[str, list[Example]] = {}
    for row in rows:
        copies.setdefault(row.id, []).append(row)
    found: dict[Cell, list[Member]] = {(shard, place): [] for shard in range(num_shards) for place in range(num_slices)}
    for _, alike in sorted(copies.items()):
        tags = tuple(dict.fromkeys(tag for row in alike for tag in row.tags))
        name = min((f"{column}={value}" for column, value in tags if column == together), default=alike[0].id)
        found[cell_of(name, num_shards, num_slices, seed)].append(Member(alike[0], len(alike), tags))
    if empty := [cell for cell, members in found.items() if not members]:
        raise UserError(
            f"{len(copies)} different examples in {num_shards} shards of {num_slices} slices leave "
            f"slice {empty[0][1]} of shard {empty[0][0]} without any",
            allowed="several examples for each slice: more data, or fewer shards and slices"
            + (f"; and more values of {together} than slices" if together else ""),
        )
    return found
