"""Emergent outlier features of the hidden states (Dettmers et al., 2022, section 4)."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from overhaul.method import Fraction, Measure, Positive, Rate, SeqLen

if TYPE_CHECKING:
    from torch import Tensor, nn

    from overhaul.data import Data
    from overhaul.outliers import Seen
    from overhaul.table import Curve, LayerMap, Row, Table


class MeasureOutliers(Measure):
    """Dimensions of the hidden states with large values in many layers, and what is lost without them."""

    paper: ClassVar[str] = (
        "Tim Dettmers, Mike Lewis, Younes Belkada, Luke Zettlemoyer: LLM.int8(): 8-bit Matrix Multiplication for "
        "Transformers at Scale, 2022, arXiv:2208.07339"
    )

    threshold: Rate = Field(6.0, description="Magnitude from which on a value is an outlier.")
    layers: Fraction = Field(0.25, description="Share of the layers in which an emergent dimension has one.")
    positions: Fraction = Field(0.06, description="Share of the positions at which it has one, in those layers.")
    ablation: bool = Field(False, description="Also perplexity without those dimensions, and without as many others.")
    windows: Positive = Field(16, description="Held-out windows read.")
    seq_len: SeqLen = 512

    def measure(self, model: nn.Module, data: Data) -> Table:
        """Counts, shares, quartiles and signs of the outliers, a map over the layers, and the ablation if asked for."""
        from overhaul import machine
        from overhaul.outliers import look
        from overhaul.table import Table

        windows_NT = data.windows("heldout", seq_len=self.seq_len, limit=self.windows)
        device = next(model.parameters()).device
        with machine.autocast(device, data.dtype):
            seen = look(model, windows_NT, self.threshold)
        dimensions = seen.emergent(layers=self.layers, positions=self.positions)
        rows = [*_rows(seen, dimensions, data.model)]
        if self.ablation:
            rows += _ablated(model, data, windows_NT, dimensions)
        return Table(tuple(rows), curves=_curves(seen, dimensions, data.model), maps=_maps(seen, data.model))


def _rows(seen: Seen, dimensions: list[int], model: str) -> list[Row]:
    """What is to be told of the emergent dimensions, or of all outliers where the paper counts values."""
    import torch

    hits_LE = seen.hits[:, dimensions]
    num_layers, num_tokens, hits = len(seen.names), seen.num_tokens, int(hits_LE.sum())
    rows = [
        _row(model, "emergent dimensions", len(dimensions), seen.hits.shape[1]),
        _row(model, "dimensions with an outlier", int((seen.hits.sum(0) > 0).sum()), seen.hits.shape[1]),
        _row(model, "share of values in 16 bit", int(seen.sixteen.sum()) / (num_layers * seen.num_values),
             num_layers * seen.num_values),
    ]  # fmt: skip
    if not dimensions:
        return rows
    magnitudes = torch.cat([torch.cat(seen.magnitudes[dimension]) for dimension in dimensions])
    first, median, third = (float(q) for q in _quartiles(magnitudes))
    positive_E = seen.positive[:, dimensions].sum(0) / hits_LE.sum(0)
    one_sided = torch.maximum(positive_E, 1 - positive_E).mean()
    rows += [
        _row(model, "share of layers with an emergent outlier", float(hits_LE.any(1).double().mean()), num_layers),
        _row(model, "share of positions, mean over layers", float(hits_LE.double().mean()) / num_tokens, num_tokens),
        _row(model, "magnitude, first quartile", first, hits),
        _row(model, "magnitude, median", median, hits),
        _row(model, "magnitude, third quartile", third, hits),
        _row(model, "one-sided share", float(one_sided), hits),
    ]
    for dimension, layers_hit in zip(dimensions, (hits_LE > 0).double().mean(0).tolist(), strict=True):
        rows.append(_row(model, f"layers/{dimension}", layers_hit, num_layers))
    return rows


def _quartiles(magnitudes: Tensor) -> Tensor:
    import torch

    from overhaul.outliers import LARGEST_SAMPLE

    return torch.quantile(magnitudes[:LARGEST_SAMPLE], torch.tensor([0.25, 0.5, 0.75], device=magnitudes.device))


def _ablated(model: nn.Module, data: Data, windows_NT: Tensor, dimensions: list[int]) -> list[Row]:
    """Perplexity as it is, without the emergent dimensions, and without as many drawn from the others."""
    from dataclasses import asdict

    import torch

    from overhaul import evaluate
    from overhaul.outliers import inputs_of, without
    from overhaul.progress import say
    from overhaul.table import Row

    if not dimensions:
        say("no dimension is an emergent outlier: there is nothing to leave out")
        return []
    width = next(iter(inputs_of(model).values())).get_parameter("weight").numel()
    others = torch.tensor([dimension for dimension in range(width) if dimension not in dimensions])
    draw = torch.randperm(len(others), generator=torch.Generator().manual_seed(data.seed))
    random = others[draw[: len(dimensions)]].tolist()
    cases = {"as it is": [], "without emergent dimensions": dimensions, "without as many others": random}
    rows = []
    for name, left_out in cases.items():
        with without(model, left_out):
            scored = evaluate.perplexity(model, windows_NT, dtype=data.dtype, seed=data.seed)
        rows.append(Row(model=data.model, metric=f"perplexity, {name}", **asdict(scored.estimate)))
    return rows


def _row(model: str, metric: str, value: float, count: int) -> Row:
    from overhaul.table import Row

    return Row(model=model, metric=metric, value=value, low=value, high=value, count=count)


def _maps(seen: Seen, model: str) -> tuple[LayerMap, ...]:
    """The share of dimensions with an outlier and of values in 16 bit, for every input."""
    from overhaul.table import LayerMap

    columns_L = (seen.hits > 0).sum(1).tolist()
    shares_L = (seen.sixteen / seen.num_values).tolist()
    return (
        LayerMap(
            model=model,
            quantity="dimensions with an outlier",
            values=tuple(zip(seen.names, map(float, columns_L), strict=True)),
            meaning="Dimensions in which some token reaches the threshold",
        ),
        LayerMap(
            model=model,
            quantity="share of values in 16 bit",
            values=tuple(zip(seen.names, shares_L, strict=True)),
            meaning="Values in columns that LLM.int8() multiplies in 16 bit, window by window",
            is_share=True,
        ),
    )


def _curves(seen: Seen, dimensions: list[int], model: str) -> tuple[Curve, ...]:
    """The share of tokens that reach the threshold, input after input, for each emergent dimension."""
    from overhaul.table import Curve

    x = tuple(float(number) for number in range(1, len(seen.names) + 1))
    return tuple(
        Curve(
            name=f"{model}, dimension {dimension}",
            x=x,
            y=tuple((seen.hits[:, dimension] / seen.num_tokens).tolist()),
            x_label="layer input",
            y_label="share of tokens",
            title="Where the emergent dimensions reach the threshold",
        )
        for dimension in dimensions
    )
