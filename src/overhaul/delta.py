"""A change as a thing: what must be added to a model to get another, with the fingerprint of the model it fits.

    delta = Delta.between(base, tuned)      # tuned == base + delta, bit for bit
    delta.scale(0.5).add(other).apply(base)

Each tensor is stored as what is smallest: nothing where it did not change, positions and values where little
changed, all values otherwise.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from overhaul.errors import UserError

State = Mapping[str, Tensor]


@dataclass(frozen=True, slots=True)
class Change:
    """The change of one tensor, in fp32.

    Attributes:
        shape: of the tensor.
        values: all of them in order, or only those at `positions`.
        positions: indices into the flattened tensor, int64; None means every position.
    """

    shape: tuple[int, ...]
    values: Tensor
    positions: Tensor | None = None

    @classmethod
    def of(cls, difference: Tensor) -> Change:
        """The smaller of the two codings: a sparse value costs 12 bytes, a dense one 4."""
        flat = difference.float().flatten()
        positions = flat.nonzero().squeeze(1)
        if 3 * len(positions) < len(flat):
            return cls(tuple(difference.shape), flat[positions], positions)
        return cls(tuple(difference.shape), flat)

    def dense(self) -> Tensor:
        """The change as a full fp32 tensor."""
        if self.positions is None:
            return self.values.view(self.shape)
        flat = torch.zeros(self.shape).flatten()
        return flat.index_copy_(0, self.positions, self.values).view(self.shape)

    @property
    def bytes(self) -> int:
        """What it takes to store."""
        return self.values.nbytes + (0 if self.positions is None else self.positions.nbytes)


@dataclass(frozen=True, slots=True)
class Delta:
    """Changes by tensor name, and the fingerprint of the base they belong to."""

    base: str
    changes: Mapping[str, Change]

    @classmethod
    def between(cls, base: State, tuned: State) -> Delta:
        """What turns `base` into `tuned`; tensors that are equal are left out.

        Raises:
            UserError: the two do not have the same tensors.
        """
        odd = sorted(name for name in base.keys() | tuned.keys() if not _alike(base.get(name), tuned.get(name)))
        if odd:
            raise UserError(f"the models differ in more than values: {odd[0]} and {len(odd) - 1} more tensors")
        changes = {
            name: Change.of(tuned[name].float() - tensor.float())
            for name, tensor in base.items()
            if not torch.equal(tuned[name], tensor)
        }
        return cls(fingerprint(base), changes)

    @property
    def bytes(self) -> int:
        """What it takes to store."""
        return sum(change.bytes for change in self.changes.values())

    def scale(self, factor: float) -> Delta:
        """The change times a factor; -1 undoes it."""
        scaled = {n: Change(c.shape, c.values * factor, c.positions) for n, c in self.changes.items()}
        return Delta(self.base, scaled)

    def add(self, other: Delta) -> Delta:
        """Both changes; they must belong to one base."""
        if other.base != self.base:
            raise UserError("the two changes belong to different base models", hint="changes of one model")
        summed = dict(self.changes)
        for name, change in other.changes.items():
            own = summed.get(name)
            summed[name] = change if own is None else Change.of(own.dense() + change.dense())
        return Delta(self.base, summed)

    def apply(self, base: State) -> dict[str, Tensor]:
        """New tensors: `base` plus the change, in the base's types.

        Raises:
            UserError: `base` is not the model that the change belongs to.
        """
        if fingerprint(base) != self.base:
            raise UserError("the change belongs to another base model", hint="the model it was taken from")
        return {
            name: (tensor.float() + self.changes[name].dense()).to(tensor.dtype) if name in self.changes else tensor
            for name, tensor in base.items()
        }

    def save(self, path: Path) -> None:
        """Writes one safetensors file."""
        tensors = {f"{name}/values": change.values.contiguous() for name, change in self.changes.items()}
        tensors |= {f"{n}/positions": c.positions for n, c in self.changes.items() if c.positions is not None}
        shapes = {name: list(change.shape) for name, change in self.changes.items()}
        save_file(tensors, path, metadata={"base": self.base, "shapes": json.dumps(shapes)})

    @classmethod
    def load(cls, path: Path) -> Delta:
        """Reads what `save` wrote."""
        with safe_open(path, framework="pt") as stored:
            metadata = stored.metadata()
            names = set(stored.keys())
            changes = {
                name: Change(
                    tuple(shape),
                    stored.get_tensor(f"{name}/values"),
                    stored.get_tensor(f"{name}/positions") if f"{name}/positions" in names else None,
                )
                for name, shape in json.loads(metadata["shapes"]).items()
            }
        return cls(metadata["base"], changes)


def fingerprint(state: State) -> str:
    """Hash of names, types, shapes and values."""
    digest = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _alike(one: Tensor | None, other: Tensor | None) -> bool:
    return one is not None and other is not None and one.shape == other.shape
