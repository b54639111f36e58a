"""Which layers a model can do without: by how little they change their input, or by what is lost without them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from overhaul import evaluate, journal
from overhaul.importance import Scores, highest
from overhaul.interop import decoder as decoders
from overhaul.progress import Bar

Criterion = Literal["block", "perplexity", "contiguous"]


@contextmanager
def skipping(model: nn.Module, layers: Iterable[int]) -> Iterator[None]:
    """Inside, the hidden states pass these layers as they are."""
    blocks = decoders.find(model).blocks
    skipped: list[Any] = [blocks[layer] for layer in layers]
    for block in skipped:
        block.forward = lambda hidden_states, *_, **__: hidden_states
    try:
        yield
    finally:
        for block in skipped:
            del block.forward  # uncovers the class's own


def rises_without(
    model: nn.Module,
    windows_NT: Tensor,
    ranges: Iterable[range],
    *,
    dtype: torch.dtype = torch.float32,
    title: str = "",
) -> Tensor:
    """How much the perplexity on these windows rises without each of the ranges of layers: fp32."""
    whole = evaluate.perplexity(model, windows_NT, dtype=dtype).estimate.value
    ranges, rises = list(ranges), []
    with Bar(title, len(ranges), quiet=not title) as bar:
        for skipped in ranges:
            with skipping(model, skipped):
                rises.append(evaluate.perplexity(model, windows_NT, dtype=dtype).estimate.value - whole)
            bar.step()
    return torch.tensor(rises)


class Depth:
    """Chooses the layers that stay, for any number of them; what has to be measured is measured once."""

    def __init__(
        self,
        model: nn.Module,
        scores: Scores,
        *,
        by: Criterion,
        windows: Callable[[], Tensor],
        dtype: torch.dtype = torch.float32,
    ) -> None:
        """Prepares to choose.

        Args:
            model: the source.
            scores: its scores.
            by: least block importance, least rise of perplexity, or the range with the least rise.
            windows: the text on which perplexity is taken, where it is.
            dtype: of matrix products.
        """
        self.model, self.scores, self.by, self.dtype = model, scores, by, dtype
        self._read_windows = windows
        self._windows_NT: Tensor | None = None
        self._ranges: dict[int, range] = {}

    def kept(self, count: int) -> Tensor:
        """The numbers of the `count` layers that stay, ascending."""
        total = len(self.scores.block_L)
        if count == total:
            return torch.arange(total)
        if self.by == "contiguous":
            gone = self._range(total - count)
            return torch.tensor([layer for layer in range(total) if layer not in gone])
        return highest(self.scores.block_L if self.by == "block" else self._rises(), count)

    def note(self, count: int) -> None:
        """Puts the layers into the report, if some of them went."""
        total = len(self.scores.block_L)
        if count == total:
            return
        stay = set(self.kept(count).tolist())
        rises_L = self.scores.skipped_L
        columns = [
            "layer",
            "block importance",
            *(["perplexity without it rises by"] if rises_L is not None else []),
            "",
        ]
        rows = []
        for layer in range(total):
            numbers = [f"{self.scores.block_L[layer]:.4f}"] + ([f"{rises_L[layer]:.3f}"] if rises_L is not None else [])
            rows.append([str(layer), *numbers, "stays" if layer in stay else "cut"])
        gone = ", ".join(str(layer) for layer in range(total) if layer not in stay)
        journal.note_table(f"The layers that matter least were cut: {gone}", columns, rows)

    def _rises(self) -> Tensor:
        if self.scores.skipped_L is None:
            each = [range(layer, layer + 1) for layer in range(len(self.scores.block_L))]
            self.scores = replace(self.scores, skipped_L=self._measured(each))
        assert self.scores.skipped_L is not None
        return self.scores.skipped_L

    def _range(self, length: int) -> range:
        if length not in self._ranges:
            starts = range(len(self.scores.block_L) - length + 1)
            ranges = [range(start, start + length) for start in starts]
            self._ranges[length] = ranges[int(self._measured(ranges).argmin())]
        return self._ranges[length]

    def _measured(self, ranges: list[range]) -> Tensor:
        if self._windows_NT is None:
            self._windows_NT = self._read_windows()
        return rises_without(self.model, self._windows_NT, ranges, dtype=self.dtype, title="skipping layers")
