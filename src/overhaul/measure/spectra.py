"""Intruder dimensions (Shuttleworth et al., 2024): singular directions that tuning brought in."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from overhaul.method import Difference, Positive, Share

if TYPE_CHECKING:
    from collections.abc import Sequence

    from overhaul.spectra import Matrix
    from overhaul.table import Curve, LayerMap, Row, Table

EPS_SWEEP = tuple(tenth / 10 for tenth in range(1, 10))


class MeasureSpectra(Difference):
    """Singular directions of tuned models that their base does not know, and the rank of the change."""

    paper: ClassVar[str] = (
        "Reece Shuttleworth, Jacob Andreas, Antonio Torralba, Pratyusha Sharma: LoRA vs Full Fine-tuning: An Illusion "
        "of Equivalence, 2024, arXiv:2410.21228"
    )

    k: Positive = Field(10, description="Largest singular vectors of each tuned matrix that are examined.")
    eps: Share = Field(0.5, description="Cosine below which a tuned vector is unlike a base vector.")
    vectors: Literal["left", "right", "both"] = Field(
        "left", description="Singular vectors compared; with both, an intruder is one on the left and on the right."
    )

    def between(self, base: str, tuned: str) -> Table:
        """Totals of a tuned model, a record for each matrix, sweeps over eps and k, and maps.

        Raises:
            UserError: the models have other layers, or the tuned one is an adapter of another base.
        """
        from overhaul.progress import Bar
        from overhaul.spectra import look
        from overhaul.stored import refuse_other_base, stored
        from overhaul.table import Table

        whole, other = stored(base), stored(tuned)
        refuse_other_base(whole, other)
        found: list[Matrix] = []
        with Bar(f"spectra of {tuned}", len(whole.shapes)) as bar:
            for matrix in look(whole, other, k=self.k, vectors=self.vectors):
                found.append(matrix)
                bar.step(matrix.name)
        return Table(
            rows=tuple(_rows(found, self.eps, tuned)),
            curves=_curves(found, self.eps, tuned),
            maps=_maps(found, self.eps, tuned),
            details=tuple(_record(matrix, self, base, tuned) for matrix in found),
            notes=_notes(found, self.k, tuned),
        )


def _rows(found: Sequence[Matrix], eps: float, model: str) -> list[Row]:
    from statistics import median

    from overhaul.spectra import critical_strength, entropy_rank, stable_rank
    from overhaul.table import Row

    counts = [len(matrix.intruders(eps)) for matrix in found]
    examined = sum(matrix.examined for matrix in found)
    changed = [matrix for matrix in found if matrix.change_R[0] > 0]
    energies = [sum(one.energy for one in matrix.intruders(eps)) for matrix in found]
    strong = sum(matrix.strength > critical_strength(eps) for matrix in found)

    def row(metric: str, value: float, count: int) -> Row:
        return Row(model=model, metric=metric, value=value, low=value, high=value, count=count)

    rows = [
        row("intruders", sum(counts), examined),
        row("intruders per 1,000 vectors", 1000 * sum(counts) / max(examined, 1), examined),
        row("matrices with an intruder", sum(count > 0 for count in counts), len(found)),
        row("energy share of the intruders, mean", sum(energies) / len(found), len(found)),
        row("matrices changed", len(changed), len(found)),
        row("matrices above the critical strength", strong, len(found)),
    ]
    if changed:
        rows += [
            row("stable rank of the change, median", median(stable_rank(m.change_R) for m in changed), len(changed)),
            row("entropy rank of the change, median", median(entropy_rank(m.change_R) for m in changed), len(changed)),
        ]
    if beside := [matrix for matrix in changed if matrix.base_norm]:  # there is no ratio to a base of zeros
        rows += [
            row("change / base, median of norms", median(m.relative_change for m in beside), len(beside)),
            row("change / base, largest singular value, median", median(m.strength for m in beside), len(beside)),
        ]
    return rows


def _record(matrix: Matrix, how: MeasureSpectra, base: str, tuned: str) -> dict[str, Any]:
    """Everything that is known of one matrix."""
    from dataclasses import asdict

    from overhaul.spectra import critical_strength, entropy_rank, stable_rank

    intruders = matrix.intruders(how.eps)
    return {
        "name": matrix.name,
        "model": tuned,
        "base": base,
        "shape": list(matrix.shape),
        "k": matrix.examined,
        "eps": how.eps,
        "vectors": how.vectors,
        "count": len(intruders),
        "intruders": [asdict(one) for one in intruders],
        "stable_rank": stable_rank(matrix.change_R),
        "entropy_rank": entropy_rank(matrix.change_R),
        "relative_change": _finite(matrix.relative_change),
        "strength": _finite(matrix.strength),
        "critical_strength": critical_strength(how.eps),
        "base_sha256": matrix.base_sha256,
        "tuned_sha256": matrix.tuned_sha256,
    }


def _notes(found: Sequence[Matrix], k: int, tuned: str) -> tuple[str, ...]:
    import torch

    from overhaul import artifact
    from overhaul.spectra import clamping

    notes = list(clamping([matrix.examined for matrix in found], k))
    if all(matrix.base_sha256 == matrix.tuned_sha256 for matrix in found):
        notes.append(f"{tuned} has the weights of its base in every matrix: nothing was trained")
    elif (dtype := artifact.stored_dtype(tuned)) not in (None, torch.float32):
        notes.append(
            f"{tuned} is stored in {str(dtype).removeprefix('torch.')}: rounding alone gives its change many small "
            "directions, which the entropy rank counts; the stable rank hardly does"
        )
    return tuple(notes)


def _finite(value: float) -> float | None:
    """None, which JSON and pictures know, for the ratio to a base that is zero."""
    return value if math.isfinite(value) else None


def _curves(found: Sequence[Matrix], eps: float, model: str) -> tuple[Curve, ...]:
    """Intruders over eps at this k, and over k at this eps."""
    from overhaul.table import Curve

    most = max(1, *(matrix.examined for matrix in found))
    over_eps = [sum(len(matrix.intruders(one)) for matrix in found) for one in EPS_SWEEP]
    over_k = [sum(len(matrix.intruders(eps, k)) for matrix in found) for k in range(1, most + 1)]
    return (
        Curve(name=model, x=EPS_SWEEP, y=tuple(map(float, over_eps)), x_label="eps",
              y_label=f"intruders among the first {most}", title="Intruders by the cosine that makes one"),
        Curve(name=model, x=tuple(map(float, range(1, most + 1))), y=tuple(map(float, over_k)), x_label="k",
              y_label=f"intruders below {eps:g}", title="Intruders by how many vectors are examined"),
    )  # fmt: skip


def _maps(found: Sequence[Matrix], eps: float, model: str) -> tuple[LayerMap, ...]:
    """Where the intruders are, how strong the change is, and all cosines of the matrix with the most intruders."""
    from overhaul.spectra import critical_strength
    from overhaul.table import LayerMap

    most = max(found, key=lambda matrix: (len(matrix.intruders(eps)), matrix.relative_change))
    cosines = tuple(
        (f"{place + 1}.base {row + 1}", cosine)
        for row, cosines_K in enumerate(most.similar_KK.tolist())
        for place, cosine in enumerate(cosines_K)
    )
    return (
        LayerMap(
            model=model,
            quantity="intruders",
            values=tuple((matrix.name, float(len(matrix.intruders(eps)))) for matrix in found),
            meaning=f"Tuned singular vectors whose cosine with every base vector is below {eps:g}",
        ),
        LayerMap(
            model=model,
            quantity="strength of the change",
            values=tuple((matrix.name, _finite(matrix.strength)) for matrix in found),
            meaning="Largest singular value of the change over that of the base; a new direction of rank one becomes "
            f"an intruder from {critical_strength(eps):.3g} on",
        ),
        LayerMap(
            model=f"{model}, {most.name}",
            quantity="cosine",
            values=cosines,
            meaning="Absolute cosines of the base's first singular vectors, from top to bottom, with the tuned ones",
            is_share=True,
            across="tuned",
        ),
    )
