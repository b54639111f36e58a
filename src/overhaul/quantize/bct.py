"""BCT: blockwise compression of transformers without retraining (Dong and Chen, 2023)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field, model_validator

from overhaul.bct.scheme import Scheme, is_clamped
from overhaul.method import Share, Transform

if TYPE_CHECKING:
    from torch import nn

    from overhaul.bct.model import Stored
    from overhaul.data import Data
    from overhaul.stream import Stream


class Bct(Scheme, Transform):
    """Store and compute everything in 8 or 4 bits with one scale per small block; needs no data.

    The paper's full text was not at hand: that all parts are compressed, blockwise and without retraining, is its
    abstract's; block format, products, tables and cache are this project's design.
    """

    paper: ClassVar[str] = (
        "Dong, Chen, Blockwise Compression of Transformer-based Models without Retraining, 2023, arXiv:2304.01483"
    )
    writes_stock: ClassVar[bool] = False

    budget: Share | None = Field(
        None, description="Most bytes on disk as a share of fp32; 8 bits where they help most, 4 elsewhere."
    )
    store: Literal["packed", "dense"] = Field(
        "packed", description="Integers, or in a32 modes the floats they stand for, which any tool loads."
    )

    @model_validator(mode="after")
    def _of_one_kind(self) -> Bct:
        if self.store == "dense" and self.computes:
            raise ValueError(f"store dense leaves of {self.mode} only the weights; mode {self.mode[:2]}a32 is that")
        if self.store == "dense" and self.budget is not None:
            raise ValueError("a budget counts packed bytes, and store dense writes a directory as large as the model's")
        if self.budget is not None and self.bits == 8:
            raise ValueError(f"a budget widens some tensors from 4 bits to 8: mode w4{self.mode[2:]}, not {self.mode}")
        return self

    def check(self, model: nn.Module, data: Data | None) -> None:
        """Refuses what `apply` would refuse.

        Raises:
            UserError: a model of another kind, an embedding that does more than look up, an activation without a table,
                NaN, blocks that save nothing, a budget that cannot be kept, or sums that could leave int32.
        """
        from overhaul.bct.budget import refuse_less

        matrices = self._matrices(model)
        if self.budget is not None:
            least = sum(matrix.bytes(4, self.scheme) for matrix in matrices)
            refuse_less(_other_bytes(model, matrices) + least, self._budget_bytes(model))

    def apply(self, model: nn.Module, calib: Stream | None) -> nn.Module:
        """Replaces the model's modules; with `store` dense its weights only.

        Raises:
            UserError: as `check`.
        """
        from overhaul.bct import model as blockwise
        from overhaul.bct.format import written_settings
        from overhaul.progress import say

        scheme, matrices = self.scheme, self._matrices(model)
        clamped = sorted({f"{m.block} of {m.name}" for m in matrices if is_clamped(m.block, _shape(m.weight))})
        if clamped:
            say(f"{len(clamped)} tensors are smaller than the block and become one as large as they are: {clamped[0]}")
        if self.store == "dense":
            blockwise.round_in_place(model, scheme)
            return model
        widths = self._widths(model, matrices)
        del matrices
        if flushed := blockwise.convert(model, scheme, widths):
            say(f"{flushed} blocks hold nothing above 2^-120 and became zero")
        inner: Any = model
        inner.config.quantization_config = written_settings(model, scheme)
        return model

    @property
    def scheme(self) -> Scheme:
        """What of these fields is stored with the model."""
        return Scheme.model_validate(self.model_dump(include=set(Scheme.model_fields)))

    def _matrices(self, model: nn.Module) -> list[Stored]:
        """What will be stored in blocks, after everything was looked at that may be refused."""
        from overhaul.bct import model as blockwise

        blockwise.refuse(model, self.scheme)
        matrices = list(blockwise.matrices(model, self.scheme))
        if self.store == "packed":
            blockwise.refuse_growth(matrices, self.scheme, blockwise.float_dtype(model))
        return matrices

    def _budget_bytes(self, model: nn.Module) -> int:
        assert self.budget is not None
        return int(self.budget * 4 * sum(parameter.numel() for parameter in model.parameters()))

    def _widths(self, model: nn.Module, matrices: list[Stored]) -> dict[str, int]:
        from overhaul.bct.budget import measured, widths_within
        from overhaul.journal import note_table

        if self.budget is None:
            return {}
        choices = measured(matrices, self.scheme)
        widths = widths_within(choices, _other_bytes(model, matrices), self._budget_bytes(model))
        note_table(
            f"{sum(bits == 8 for bits in widths.values())} of {len(widths)} tensors have 8 bits within the budget",
            ("tensor", "bits", "size", "error with 4 bits", "error with 8 bits"),
            [
                (c.name, str(widths[c.name]), f"{c.bytes[widths[c.name] == 8] / 1e3:.1f} kB",
                 f"{c.errors[0] ** 0.5:.3%}", f"{c.errors[1] ** 0.5:.3%}")
                for c in choices
            ],
        )  # fmt: skip
        return widths


def _other_bytes(model: nn.Module, matrices: list[Stored]) -> int:
    """Of what stays float, on disk."""
    from overhaul.bct.model import float_dtype

    kept = sum(parameter.numel() for parameter in model.parameters()) - sum(m.weight.numel() for m in matrices)
    return kept * float_dtype(model).itemsize


def _shape(weight_RC: Any) -> tuple[int, int]:
    return weight_RC.shape[0], weight_RC.shape[1]
