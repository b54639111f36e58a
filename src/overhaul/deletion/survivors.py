"""What deletions leave of the sequences of every shard (S3T, ICLR 2025): all of it follows from the slices hit."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from overhaul.deletion.sequences import Order


class Survivors:
    """Of each shard the sequences, and how much of each may still be used.

    Args:
        orders: the sequences of each shard, permutations of its slices.
        hit: pairs of a shard and a slice of it from which something was deleted before.
    """

    def __init__(self, orders: Sequence[Sequence[Order]], hit: Iterable[tuple[int, int]] = ()) -> None:
        self.orders = tuple(tuple(shard) for shard in orders)
        self._lengths = [[len(order) for order in shard] for shard in self.orders]
        self._left = sum(map(len, self.orders))
        self.hit: set[tuple[int, int]] = set()
        for shard, place in hit:
            self.delete(shard, place)

    def delete(self, shard: int, place: int) -> None:
        """Something of a slice is deleted: nothing that was trained with it or behind it may be used again.

        Args:
            shard: counted from 0.
            place: the slice, counted from 0.
        """
        if (shard, place) in self.hit:
            return
        self.hit.add((shard, place))
        lengths = self._lengths[shard]
        for number, order in enumerate(self.orders[shard]):
            if (before := order.index(place)) < lengths[number]:
                lengths[number] = before
                self._left -= before == 0

    def serving(self, shard: int) -> Order:
        """The longest beginning of a sequence that may still be used, the first of several; empty where none is."""
        lengths = self._lengths[shard]
        longest = max(lengths)
        return self.orders[shard][lengths.index(longest)][:longest]

    def stages(self, shard: int) -> frozenset[Order]:
        """All beginnings that may still be used: what is trained of each is kept."""
        return frozenset(
            order[:length]
            for order, left in zip(self.orders[shard], self._lengths[shard], strict=True)
            for length in range(1, left + 1)
        )

    def gone(self) -> tuple[int, ...]:
        """Shards of which nothing is left."""
        return tuple(shard for shard, lengths in enumerate(self._lengths) if not max(lengths))

    @property
    def is_gone(self) -> bool:
        """Whether nothing is left of any: the whole has to be trained again."""
        return not self._left
