"""Perplexity over non-overlapping windows of held-out text."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from overhaul.method import Measure, Positive, SeqLen

if TYPE_CHECKING:
    from torch import nn

    from overhaul.data import Data
    from overhaul.table import Table


class MeasurePerplexity(Measure):
    """Perplexity on held-out text, with a 95% interval."""

    reads_logits_alone: ClassVar[bool] = True

    seq_len: SeqLen = 512
    windows: Positive | None = Field(None, description="Score the first windows only; none means all.")
    batch_size: Positive = Field(2, description="Windows scored at once.")

    def measure(self, model: nn.Module, data: Data) -> Table:
        """exp(mean negative log-likelihood) of the corpus's held-out part; `count` is tokens scored."""
        from dataclasses import asdict

        from overhaul import evaluate
        from overhaul.table import Row, Table

        windows_NT = data.windows("heldout", seq_len=self.seq_len, limit=self.windows)
        scored = evaluate.perplexity(model, windows_NT, dtype=data.dtype, batch_size=self.batch_size)
        return Table((Row(model=data.model, metric="perplexity", **asdict(scored.estimate)),))
