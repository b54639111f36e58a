"""A memory of examples: a uniform sample of all that was seen, whatever its length (Vitter, 1985, algorithm R)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from overhaul.errors import UserError
from overhaul.stream import Stream, named, part

MEMORY = "memory"
"""How the tensors of a batch are called that come from the memory: `memory/labels`; of a second draw `memory2/...`."""
OFFERED = "offered"
"""How they are called that the memory is offered, where what is trained on is something else, such as augmented."""


class Reservoir:
    """Examples of which each that was ever offered is here with the same probability, `size / seen`.

    Examples are kept as they are given: inputs before any augmentation, labels, and whatever else was known of them
    then, such as the logits of the pass in which they were trained on.

    Args:
        size: examples that it holds.
        seed: of its choices.
    """

    def __init__(self, size: int, *, seed: int) -> None:
        self.size, self.seen, self.held = size, 0, dict[str, Tensor]()
        self._dice = np.random.default_rng(seed)

    def __len__(self) -> int:
        return min(self.seen, self.size)

    def insert(self, examples: Mapping[str, Tensor]) -> None:
        """Offers examples, one after the other.

        Args:
            examples: tensors `(B, ...)`, the same names every time. A tensor may be wider in its last axis than
                before, as logits are when a head has grown: those that are there are filled up with zeros.
        """
        examples = {name: tensor.detach().cpu() for name, tensor in examples.items()}
        if self.held and set(examples) != set(self.held):
            raise ValueError(f"the memory holds {sorted(self.held)}, and was given {sorted(examples)}")
        examples = {name: self._of_one_width(name, tensor) for name, tensor in examples.items()}
        rows: dict[int, int] = {}
        for row in range(len(next(iter(examples.values())))):
            # Of all numbers up to the count of what was seen before, this one included: Vitter's rule.
            slot = self.seen if self.seen < self.size else int(self._dice.integers(0, self.seen, endpoint=True))
            self.seen += 1
            if slot < self.size:
                rows[slot] = row  # of two with one slot the later stays
        if rows:
            slots, kept = torch.tensor(list(rows)), torch.tensor(list(rows.values()))
            for name, tensor in examples.items():
                self.held[name][slots] = tensor[kept]

    def _of_one_width(self, name: str, tensor: Tensor) -> Tensor:
        """The tensor, as wide as what is held under its name, or that filled up to its width."""
        if name not in self.held:
            self.held[name] = tensor.new_zeros((self.size, *tensor.shape[1:]))
        there = self.held[name]
        if tensor.ndim == 1 or tensor.shape[-1] == there.shape[-1]:
            return tensor  # the whole memory would be copied otherwise
        self.held[name] = pad(there, (0, max(tensor.shape[-1] - there.shape[-1], 0)))
        return pad(tensor, (0, max(there.shape[-1] - tensor.shape[-1], 0)))

    def draw(self, count: int) -> dict[str, Tensor]:
        """Examples at random, each at most once; all of them where fewer are there."""
        chosen = self._dice.choice(len(self), size=min(count, len(self)), replace=False)
        return {name: tensor[torch.from_numpy(chosen)] for name, tensor in self.held.items()}

    def state_dict(self) -> dict[str, Any]:
        """Everything needed to go on from here."""
        held = {name: tensor[: len(self)].clone() for name, tensor in self.held.items()}
        return {"seen": self.seen, "held": held, "dice": self._dice.bit_generator.state}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes over what `state_dict` returned."""
        self.seen, self._dice.bit_generator.state = state["seen"], state["dice"]
        self.held = {}
        for name, tensor in state["held"].items():
            self.held[name] = tensor.new_zeros((self.size, *tensor.shape[1:]))
            self.held[name][: len(tensor)] = tensor

    @property
    def nbytes(self) -> int:
        """Bytes of the examples that are there."""
        return sum(tensor[: len(self)].nbytes for tensor in self.held.values())


class WithMemory(Stream):
    """Batches of a source, each with examples from a memory beside it: `memory/labels` and the like.

    Without anything in the memory a batch comes alone.

    Args:
        source: batches.
        memory: of examples; whoever trains puts them in.
        count: examples of a draw.
        draws: independent ones; the second is called `memory2`.

    Raises:
        UserError: `count` is more than the memory holds.
    """

    def __init__(self, source: Stream, memory: Reservoir, *, count: int, draws: int = 1) -> None:
        if count > memory.size:
            raise UserError(
                f"a draw of {count} examples from a memory of {memory.size}",
                hint=f"a draw of {memory.size} at most, or a larger memory",
            )
        self.sources, self.memory, self.count, self.draws = (source,), memory, count, draws

    def __next__(self) -> dict[str, Tensor]:
        batch = dict(next(self.sources[0]))
        for number in range(1, self.draws + 1) if len(self.memory) else ():
            batch |= named(drawn(number), self.memory.draw(self.count))
        return batch

    def own_state(self) -> dict[str, Any]:
        return {"memory": self.memory.state_dict()}

    def load_own_state(self, state: Mapping[str, Any]) -> None:
        self.memory.load_state_dict(state["memory"])

    def label(self) -> str:
        return f"memory({self.memory.size}, draws of {self.count} x {self.draws})"


def drawn(number: int) -> str:
    """What the tensors of a draw are called, before the slash: draws are counted from 1."""
    return MEMORY if number == 1 else f"{MEMORY}{number}"


def remembered(batch: Mapping[str, Tensor], number: int = 1) -> dict[str, Tensor]:
    """A draw of a batch as a batch of its own; empty where there is none."""
    return part(batch, drawn(number))


def with_offered(batch: Mapping[str, Tensor], read: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A batch that is trained on, with what the memory is offered in its place.

    Args:
        batch: with draws from the memory beside it, as in `WithMemory`.
        read: the same as it was before it was made into what is trained on.
    """
    return {**batch, **named(OFFERED, _own(read))}


def offered(batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What of a batch the memory is offered: what was put there for it, else all but the draws."""
    return part(batch, OFFERED) or _own(batch)


def _own(batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in batch.items() if "/" not in name}
