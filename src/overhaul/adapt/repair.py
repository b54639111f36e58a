"""Scaling intruder dimensions down (Shuttleworth et al., 2024, section 5): less forgetting, without training."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple, Self

from pydantic import Field, PrivateAttr

from overhaul.method import NonNegative, Positive, Share, Transform

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor, nn

    from overhaul.data import Data
    from overhaul.interop.peft import PlainLoRA
    from overhaul.spectra import Cache
    from overhaul.stored import Stored
    from overhaul.stream import Stream


class Repair(Transform):
    """Scale down the singular directions of a tuned model that its base does not know; needs no data."""

    paper: ClassVar[str] = (
        "Reece Shuttleworth, Jacob Andreas, Antonio Torralba, Pratyusha Sharma: LoRA vs Full Fine-tuning: An Illusion "
        "of Equivalence, 2024, arXiv:2410.21228"
    )

    base: str | None = Field(
        None, description="Model that it was tuned from; none means an adapter's base, or where its lineage began."
    )
    scale: NonNegative = Field(
        0.75, description="Factor of the intruders, lambda in the paper: 0 removes them, 1 leaves them, more amplifies."
    )
    k: Positive = Field(10, description="Largest singular vectors of each tuned matrix that are examined.")
    eps: Share = Field(0.5, description="Cosine below which a tuned vector is unlike a base vector.")
    vectors: Literal["left", "right", "both"] = Field(
        "left", description="Singular vectors compared; with both, an intruder is one on the left and on the right."
    )
    control: Literal["intruders", "others", "random"] = Field(
        "intruders",
        description="What is scaled: the intruders; as many other vectors of the nearest ranks; or random "
        "directions, by a change of the same norm.",
    )
    _path: Path | None = PrivateAttr(None)

    def at(self, path: Path) -> Self:
        """The same for the model in a directory, with its base.

        Raises:
            UserError: the directory does not say what its model was made from, or that is gone or was changed.
        """
        from overhaul.errors import UserError
        from overhaul.stored import base_of

        base = self.base or base_of(str(path))
        if base is None:
            raise UserError(
                f"{path} does not say what it was tuned from, or that is no longer there as it was", hint="--base MODEL"
            )
        settled = self.model_copy(update={"base": base})
        settled._path = path
        return settled

    def others(self) -> tuple[str, ...]:
        """The base."""
        return (self.base,) if self.base else ()

    def check(self, model: nn.Module, data: Data | None) -> None:
        """The base fits, and an adapter is one that can be made again from its product.

        Raises:
            UserError: it does not; or the adapter is no plain LoRA.
        """
        from overhaul.errors import UserError
        from overhaul.interop.peft import CONFIG, plain_lora, why_not_plain
        from overhaul.stored import refuse_other_base

        base, tuned = self._opened()
        refuse_other_base(base, tuned)
        if not (tuned.path / CONFIG).is_file():
            return
        if why := why_not_plain(tuned.path):
            raise UserError(
                f"{tuned.name} is no plain LoRA ({why}): its product cannot be factored into such an adapter again",
                allowed="LoRA of one rank and one alpha, with or without rank-stabilised scaling, or a whole model",
                hint="merge it, then adapt repair with --base; measure spectra reads it as it is",
            )
        if others := [name for name in plain_lora(tuned.path).factors if name not in base.shapes]:
            raise UserError(
                f"{tuned.name} adapts {others[0]}, which is no linear layer of the blocks of {base.name}",
                allowed="adapters of the blocks' linear layers",
                hint="merge it, then adapt repair with --base",
            )

    def apply(self, model: nn.Module, calib: Stream | None) -> nn.Module:
        """Changes the weights of a whole model; puts new factors over the base's weights for an adapter."""
        from overhaul.interop.peft import CONFIG, plain_lora
        from overhaul.journal import note_table
        from overhaul.progress import Bar, say
        from overhaul.spectra import Cache, clamping

        base, tuned = self._opened()
        for note in clamping([min(shape) for shape in base.shapes.values()], self.k):
            say(note)
        lora = plain_lora(tuned.path) if (tuned.path / CONFIG).is_file() else None
        cache, rows = Cache(), list[_Scaled]()
        with Bar("repairing", len(base.shapes)) as bar:
            for name in base.shapes if lora is None else lora.factors:
                weight_OI = tuned.read(name)
                correction_OI, count = self._correction(base, name, weight_OI, cache)
                if lora is None:
                    lost = _change(model, name, weight_OI + correction_OI) if count else 0.0
                else:
                    lost = _readapt(model, name, base.read(name), lora, correction_OI if count else None)
                if count:
                    rows.append(_Scaled(name, count, float(correction_OI.norm() / weight_OI.norm()), lost))
                bar.step(name)
        _tell(rows, self, len(base.shapes), is_adapter=lora is not None)
        note_table(
            f"{sum(row.count for row in rows)} directions were scaled by {self.scale:g}",
            ("layer", "directions", "change / weight", "lost by the rank"),
            [(row.name, str(row.count), f"{row.share:.3g}", f"{row.lost:.3g}") for row in rows],
        )
        return model

    def _opened(self) -> tuple[Stored, Stored]:
        """Base and tuned model."""
        from overhaul.stored import stored

        assert self.base is not None
        assert self._path is not None
        return stored(self.base), stored(str(self._path))

    def _correction(self, base: Stored, name: str, weight_OI: Tensor, cache: Cache) -> tuple[Tensor, int]:
        """What is to be added to a tuned weight, and how many directions it scales."""
        from overhaul.spectra import compared, known, known_vectors, sides, singular

        # As many again, for others of the nearest ranks.
        triplets = singular(weight_OI, min(2 * self.k, *weight_OI.shape))
        count = known(triplets.values_R)
        near_SK = [
            compared(known_vectors(lambda: base.read(name), side, cache), triplets.side(side)[:, :count])[1]
            for side in sides(self.vectors)
        ]
        is_new = [all(near_K[place] < self.eps for near_K in near_SK) for place in range(len(near_SK[0]))]
        places = [place for place, new in enumerate(is_new[: self.k]) if new]
        if self.control == "others":
            places = _nearest([place for place, new in enumerate(is_new) if not new], places)
        left_OC, values_C, right_IC = (
            triplets.left_OK[:, places], triplets.values_R[places], triplets.right_IK[:, places],
        )  # fmt: skip
        if self.control == "random":
            left_OC, right_IC = _random_directions(left_OC), _random_directions(right_IC)
        return (self.scale - 1) * (left_OC * values_C) @ right_IC.t(), len(places)


class _Scaled(NamedTuple):
    """One layer: directions scaled, norm of the correction over that of the weight, and what the rank left out."""

    name: str
    count: int
    share: float
    lost: float


def _change(model: nn.Module, name: str, weight_OI: Tensor) -> float:
    """Sets a weight; what was pruned stays zero. Nothing is lost."""
    from overhaul.layers.masked import MaskedLinear

    layer: Any = model.get_submodule(name)
    layer.weight.copy_(weight_OI)
    if isinstance(layer, MaskedLinear):
        layer.enforce()
    return 0.0


def _readapt(model: nn.Module, name: str, base_OI: Tensor, lora: PlainLoRA, correction_OI: Tensor | None) -> float:
    """Takes a merged layer apart into the base's weight and factors again; returns what their rank left out."""
    from overhaul.layers import swap
    from overhaul.layers.lora import LoRALinear, factored

    (A_RI, B_OR), lost = lora.factors[name], 0.0
    if correction_OI is not None:
        A_RI, B_OR, lost = factored(B_OR @ A_RI + correction_OI / lora.scale, lora.rank)
    layer: Any = model.get_submodule(name)
    layer.weight.copy_(base_OI)
    swap(model, [name], lambda old: LoRALinear(old, A_RI, B_OR, lora.scale * lora.rank))
    return lost


def _nearest(candidates: list[int], places: list[int]) -> list[int]:
    """For each place the candidate nearest to it that is not taken yet, as long as there are any."""
    left, taken = list(candidates), []
    for place in places[: len(candidates)]:
        taken.append(min(left, key=lambda candidate: abs(candidate - place)))
        left.remove(taken[-1])
    return sorted(taken)


def _random_directions(vectors_DC: Tensor) -> Tensor:
    """As many orthonormal vectors, drawn from torch's generator."""
    import torch

    return torch.linalg.qr(torch.randn_like(vectors_DC)).Q


def _tell(rows: list[_Scaled], how: Repair, num_matrices: int, *, is_adapter: bool) -> None:
    from overhaul.progress import say

    if not rows:
        say("no matrix has an intruder: the result is what was read")
        return
    what = {"intruders": "intruders", "others": "other directions", "random": "random directions"}[how.control]
    say(f"scaled {sum(row.count for row in rows)} {what} in {len(rows)} of {num_matrices} matrices by {how.scale:g}")
    if is_adapter:
        worst = max(row.lost for row in rows)
        say(f"the adapter's rank leaves out up to {worst:.1%} of a matrix's change (norms)")
