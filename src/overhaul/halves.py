"""Which half of a model's matrices is trained, balanced over what they are for (Half Fine-Tuning, arXiv:2404.18466).

    half = train_half(model, Halves(), seed=0, draw=3)
    optimizer = adamw(half.parameters, lr=1e-5)

Any method can train a half like this: the rest is frozen, without gradients and without optimizer states.

Importing this module does not import torch: the methods' fields are declared here.
"""

from __future__ import annotations

import hashlib
import math
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal, TypeVar

from pydantic import Field

from overhaul.errors import UserError
from overhaul.interop import attention
from overhaul.method import Settings

if TYPE_CHECKING:
    from torch import nn

    from overhaul.matrices import Listed

Item = TypeVar("Item")
Key = TypeVar("Key", bound=Hashable)
Level = Literal["category", "layer", "model"]

_FUSED = (*attention.FUSED_ALONE, "gate_up_proj")
"""What modules are called that hold several of the matrices of other models in one."""


class Halving(Settings):
    """How many matrices are drawn, and what is balanced."""

    share: Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)] = Field(
        0.5, description="Share of the blocks' matrices that is drawn; 1 is all of them."
    )
    level: Level = Field(
        "category",
        description="category: that share of attention, MLP and norms each; layer: whole blocks; model: any matrices.",
    )


class Halves(Halving):
    """What is trained: matrices that are drawn, and what lies outside of the blocks."""

    freeze_embeddings: bool = Field(False, description="Leave the embeddings as they are, and a head tied to them.")
    freeze_head: bool = Field(
        False, description="Leave the output embedding as it is, where it is a matrix of its own."
    )
    freeze_final_norm: bool = Field(False, description="Leave the norms outside of the blocks as they are.")


@dataclass(frozen=True, slots=True)
class Matrix:
    """One matrix of a block, or the weight of a norm, with the bias that follows it.

    Attributes:
        name: of its parameter.
        members: the names of all its parameters.
        category: attention, mlp or norm.
        block: the number of its block.
    """

    name: str
    members: tuple[str, ...]
    category: str
    block: int


@dataclass(frozen=True, slots=True)
class Half:
    """What was drawn, and marked as trainable.

    Attributes:
        parameters: those that are trained, in the model's order.
        names: their names.
        rest: the names of the blocks' parameters that were not drawn.
        counts: category -> matrices that were drawn, and matrices in all.
        share: of the model's parameters that is trained.
    """

    parameters: list[nn.Parameter]
    names: frozenset[str]
    rest: frozenset[str]
    counts: dict[str, tuple[int, int]]
    share: float

    def told(self) -> str:
        """The realised share as a clause: matrices are drawn, and they are not of one size."""
        drawn, of = (sum(numbers) for numbers in zip(*self.counts.values(), strict=True))
        return f"{drawn} of {of} matrices of the blocks, {self.share:.1%} of all parameters"


def matrices(listed: Iterable[Listed]) -> tuple[Matrix, ...]:
    """The blocks' matrices in the model's order, each with its bias; experts count one by one."""
    in_blocks = [one for one in listed if one.block is not None]
    names = {one.name for one in in_blocks}
    members = _grouped(in_blocks, lambda one: _weight_of(one.name, names))
    return tuple(
        Matrix(name, tuple(one.name for one in group), group[0].category, group[0].block or 0)
        for name, group in members.items()
    )


def _weight_of(name: str, names: set[str]) -> str:
    """The matrix that a bias belongs to; any other parameter stands for itself."""
    weight = name.removesuffix("bias") + "weight" if name.endswith(".bias") else name.removesuffix("_bias")
    return weight if weight in names else name


def draw(found: Sequence[Matrix], choice: Halving, *, seed: int, number: int) -> list[Matrix]:
    """The matrices of draw `number`; the same for equal arguments, on every machine.

    By category, n matrices a block in L blocks: floor(share * n * L) are drawn, floor(share * n) in every block and
    one more in some blocks at random. With one half that is 2 of q, k, v, o; 2 of 3 MLP matrices in half of the blocks
    and 1 in the others, an odd block among these; 1 of 2 norms.

    Raises:
        UserError: the share is so small that a category, or the model, has nothing to train.
    """
    key = f"{seed}/{number}"
    if choice.level == "layer":
        blocks = _shuffled({matrix.block for matrix in found}, key)
        drawn = set(blocks[: _floor(choice.share * len(blocks))])
        chosen = [matrix for matrix in found if matrix.block in drawn]
    elif choice.level == "model":
        chosen = _shuffled(found, key)[: _floor(choice.share * len(found))]
    else:
        categories = _grouped(found, lambda matrix: matrix.category)
        chosen = [one for of in categories.values() for one in _balanced(of, choice.share, key)]
    if not chosen:
        raise UserError(f"--share {choice.share:g} of {len(found)} matrices is none at all", hint="a larger --share")
    return chosen


def _balanced(found: Sequence[Matrix], share: float, key: str) -> list[Matrix]:
    """Those of one category: as many in every block as go, and one more in some."""
    blocks = _grouped(found, lambda matrix: matrix.block)
    least = {block: _floor(share * len(of)) for block, of in blocks.items()}
    total, category = _floor(share * len(found)), found[0].category
    if not total:
        raise UserError(
            f"--share {share:g} trains none of the {len(found)} {category} matrices",
            allowed=f"from {math.ceil(1000 / len(found)) / 1000:g}",
            hint="a larger --share, or --level model",
        )
    roomy = [block for block, of in blocks.items() if least[block] < share * len(of) - 1e-9]
    more = set(_shuffled(roomy, f"{key}/{category}")[: total - sum(least.values())])
    return [one for block, of in blocks.items() for one in _shuffled(of, key)[: least[block] + (block in more)]]


def select(listed: Sequence[Listed], choice: Halving, *, seed: int, number: int) -> frozenset[str]:
    """The names of the blocks' parameters that draw `number` takes.

    Raises:
        UserError: the blocks are not made of matrices that can be drawn at this level, or none would be.
    """
    if choice.level != "layer" and choice.share < 1:
        _refuse_fused(listed)
    found = matrices(listed)
    if choice.level == "category":
        _refuse_unknown(found)
    return frozenset(name for one in draw(found, choice, seed=seed, number=number) for name in one.members)


def outside(listed: Sequence[Listed], choice: Halves) -> frozenset[str]:
    """The names of the parameters outside of the blocks that are trained; position embeddings go with embeddings.

    Raises:
        UserError: a head that is tied to the embedding is to be frozen by itself.
    """
    if choice.freeze_head and not any(one.category == "head" for one in listed):
        raise UserError(
            "--freeze-head: this model's head is no matrix of its own; it is tied to the embedding",
            hint="--freeze-embeddings, which freezes both",
        )
    frozen = {"norm": choice.freeze_final_norm, "head": choice.freeze_head}
    beside = [one for one in listed if one.block is None]
    return frozenset(one.name for one in beside if not frozen.get(one.category, choice.freeze_embeddings))


def train_half(model: nn.Module, choice: Halves, *, seed: int, draw: int) -> Half:
    """Marks what draw number `draw` trains, and freezes the rest; what was frozen before stays frozen.

    To draw again, first make all of it trainable: `model.requires_grad_(True)`.

    Raises:
        UserError: see `select`; or with what was frozen before, nothing is left to train.
    """
    from overhaul.matrices import manifest

    listed = manifest(model)
    inside = select(listed, choice, seed=seed, number=draw)
    taken = inside | outside(listed, choice)
    for one in listed:
        one.parameter.requires_grad_(one.parameter.requires_grad and one.name in taken)
    trained = [one for one in listed if one.parameter.requires_grad]
    if not trained:
        raise UserError(
            "nothing is left to train: what was drawn is frozen already", hint="another seed, or less frozen"
        )
    names = frozenset(one.name for one in trained)
    of = _grouped(matrices(listed), lambda matrix: matrix.category)
    return Half(
        parameters=[one.parameter for one in trained],
        names=names,
        rest=frozenset(one.name for one in listed if one.block is not None) - inside,
        counts={category: (sum(one.name in names for one in all_of), len(all_of)) for category, all_of in of.items()},
        share=sum(one.parameter.numel() for one in trained) / sum(one.parameter.numel() for one in listed),
    )


def _refuse_fused(listed: Iterable[Listed]) -> None:
    """A parameter is trained or frozen as a whole, so several matrices in one cannot be told apart."""
    for one in listed:
        if one.block is not None and (one.module.rpartition(".")[2] in _FUSED or one.parameter.ndim > 2):
            raise UserError(
                f"{one.name} holds several matrices in one tensor, which is trained as a whole or not at all",
                hint="--level layer",
            )


def _refuse_unknown(found: Sequence[Matrix]) -> None:
    """Without attention or MLP in every block there is nothing to balance."""
    if not found:
        raise UserError("the model's blocks have no parameters")
    for block, of in _grouped(found, lambda matrix: matrix.block).items():
        if missing := {"attention", "mlp"} - {one.category for one in of}:
            raise UserError(
                f"block {block} has no {' and no '.join(sorted(missing))} matrices; it has "
                + ", ".join(one.name for one in of),
                hint="--level model, which draws from all of them alike",
            )


def _floor(number: float) -> int:
    """Rounded down, where 0.7 * 10 is 7."""
    return math.floor(number + 1e-9)


def _shuffled(items: Iterable[Item], key: str) -> list[Item]:
    """In an order that is random, yet follows from the key alone: by the hash of each item."""

    def place(item: Item) -> bytes:
        return hashlib.sha256(f"{key}/{item.name if isinstance(item, Matrix) else item}".encode()).digest()

    return sorted(items, key=place)


def _grouped(items: Iterable[Item], key: Callable[[Item], Key]) -> dict[Key, list[Item]]:
    """The items by key, in the order in which the keys come first."""
    groups: dict[Key, list[Item]] = defaultdict(list)
    for item in items:
        groups[key(item)].append(item)
    return groups
