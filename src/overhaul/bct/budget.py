"""Which tensors get 8 bits when the directory may have so many bytes: the embedding, then where a byte helps most."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from overhaul.bct.blocks import decode, encode
from overhaul.bct.model import Stored
from overhaul.bct.scheme import Scheme, block_of
from overhaul.errors import UserError


@dataclass(frozen=True, slots=True)
class Choice:
    """One tensor in the two widths.

    Attributes:
        name: of its module.
        bytes: with 4 and with 8 bits.
        errors: squared norm of the error over that of the tensor, with 4 and with 8 bits: for inputs that are not
            correlated, the same share of the output.
        is_embedding: whether words are looked up in it.
    """

    name: str
    bytes: tuple[int, int]
    errors: tuple[float, float]
    is_embedding: bool = False

    @property
    def gain(self) -> float:
        """How much error a byte takes away."""
        return (self.errors[0] - self.errors[1]) / (self.bytes[1] - self.bytes[0])


def measured(matrices: Sequence[Stored], scheme: Scheme) -> list[Choice]:
    """Size and error of every tensor in both widths."""
    found = []
    for stored in matrices:
        sizes = (stored.bytes(4, scheme), stored.bytes(8, scheme))
        errors = (_error(stored, 4, scheme), _error(stored, 8, scheme))
        found.append(Choice(stored.name, sizes, errors, stored.is_embedding))
    return found


def widths_within(choices: Sequence[Choice], other_bytes: int, budget_bytes: int) -> dict[str, int]:
    """Bits of each tensor: all 4, and then 8 for one after the other while the sum stays within the budget.

    The embedding comes first: every other layer reads what it gave, and where it is the head too its error goes into
    the logits as it is, while those of the layers average out.

    Args:
        choices: the tensors.
        other_bytes: of what stays float.
        budget_bytes: for everything.

    Raises:
        UserError: 4 bits for every tensor are more than the budget.
    """
    total = other_bytes + sum(choice.bytes[0] for choice in choices)
    refuse_less(total, budget_bytes)
    widths = {choice.name: 4 for choice in choices}
    for choice in sorted(choices, key=lambda choice: (not choice.is_embedding, -choice.gain, choice.name)):
        extra = choice.bytes[1] - choice.bytes[0]
        if total + extra <= budget_bytes:
            total += extra
            widths[choice.name] = 8
    return widths


def refuse_less(least_bytes: int, budget_bytes: int) -> None:
    """Raises `UserError` for a budget below what 4 bits for every tensor take."""
    if least_bytes > budget_bytes:
        raise UserError(
            f"the budget is {budget_bytes:,} bytes; with 4 bits for every tensor there are {least_bytes:,}",
            hint="a larger --budget, or larger blocks",
        )


def _error(stored: Stored, bits: int, scheme: Scheme) -> float:
    weight_RC = stored.weight.float()
    block = block_of(stored.block, (weight_RC.shape[0], weight_RC.shape[1]))
    encoded = encode(weight_RC, block, bits, scheme.scale)
    difference_RC = decode(encoded.values, encoded.scale, block).sub_(weight_RC)
    return float(difference_RC.square().sum() / weight_RC.square().sum().clamp_min(1e-30))
