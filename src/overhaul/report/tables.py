"""The before/after table: one content, shown in a terminal, in Markdown, in HTML and as JSON."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

from overhaul.method import TO_FORGET
from overhaul.report.facts import BITS_PER_BYTE, LOSS_ON, TASK_LOSS, Facts, same_tokens
from overhaul.report.numbers import (
    MISSING,
    as_count,
    as_duration,
    as_percent,
    as_quantity,
    as_size,
    as_speed,
    interval_ends,
)
from overhaul.report.pareto import SIZE, SPEED_NOISE, fronts_of
from overhaul.table import Row

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

Better = Literal["less", "more"]

DIRECTION: Mapping[str, Better] = {
    "perplexity": "less",
    BITS_PER_BYTE: "less",
    "loss": "less",
    "error": "less",
    TASK_LOSS: "less",
    "accuracy": "more",
}
"""Which way a metric improves, by its name up to the first slash; other metrics are never marked."""


MOST_SIDE_BY_SIDE = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """One entry: its text, the interval under it, whether it is worse than the reference's, whether it may wrap."""

    text: str
    ends: str = ""
    worse: bool = False
    wraps: bool = False

    def __str__(self) -> str:
        return f"{self.text} {self.ends}".rstrip()


@dataclass(frozen=True, slots=True, kw_only=True)
class BeforeAfter:
    """Column titles, and one row of cells per model; the first cell of a row is the model's label."""

    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    note: str


@dataclass(frozen=True, slots=True, kw_only=True)
class _Column:
    title: str
    number: Callable[[Facts], float | None]
    text: Callable[[float | None], str]
    better: Better | None = None
    tolerance: float = 0.0  # relative, for numbers that have no interval

    def cell(self, facts: Facts, reference: Facts) -> Cell:
        number, at_reference = self.number(facts), self.number(reference)
        worse = False
        if self.better and number is not None and at_reference is not None:
            excess = number - at_reference if self.better == "less" else at_reference - number
            worse = excess > self.tolerance * at_reference
        return Cell(text=self.text(number), worse=worse)


@dataclass(frozen=True, slots=True, kw_only=True)
class _MetricColumn:
    title: str
    row: Callable[[Facts], Row | None]
    better: Better | None
    compares: Callable[[Facts, Facts], bool] = lambda _one, _other: True

    def cell(self, facts: Facts, reference: Facts) -> Cell:
        row, at_reference = self.row(facts), self.row(reference)
        if row is None:
            return Cell(text=MISSING)
        return Cell(
            text=as_quantity(row.value),
            ends=interval_ends(row),
            worse=self.compares(facts, reference) and is_worse(row, at_reference, self.better),
        )


def is_worse(row: Row, reference: Row | None, better: Better | None) -> bool:
    """Whether a value lies beyond the reference's interval on the bad side."""
    if reference is None or better is None:
        return False
    return row.value > reference.high if better == "less" else row.value < reference.low


def _columns(facts: Sequence[Facts], *, is_comparison: bool) -> list[_Column | _MetricColumn]:
    metrics = dict.fromkeys(row.metric for one in facts for row in one.metrics)
    is_language = _is_language(facts)
    perplexity = _MetricColumn(title="perplexity", row=lambda one: one.perplexity, better="less", compares=same_tokens)
    in_blocks = _Column(title="non-zero (blocks)", number=lambda one: one.nonzero_share_blocks, text=as_percent)
    columns: list[_Column | _MetricColumn] = [
        *([perplexity] if is_language else ()),
        *(_metric_column(metric) for metric in metrics),
        *([in_blocks] if is_language else ()),
        _Column(title="non-zero (all)", number=lambda one: one.nonzero_share_all, text=as_percent),
        _Column(
            title="parameters",
            number=lambda one: one.parameters,
            text=as_count,
            better="less",
            tolerance=0.001,
        ),
        _Column(title="size", number=lambda one: one.bytes, text=as_size, better="less", tolerance=0.001),
    ]
    speeds = [
        _Column(
            title="prefill tokens/s",
            number=lambda one: one.tokens_per_second,
            text=as_speed,
            better="more",
            tolerance=SPEED_NOISE,
        ),
        _Column(
            title="decode tokens/s",
            number=lambda one: one.decode_tokens_per_second,
            text=as_speed,
            better="more",
            tolerance=SPEED_NOISE,
        ),
    ]
    columns += speeds if is_language else []
    if is_comparison and all(one.stored_bytes is None for one in facts):
        return columns
    if is_comparison:
        columns.append(_Column(title="trained", number=lambda one: one.trainable_parameters, text=as_count))
        columns.append(_Column(title="beside the base", number=lambda one: one.stored_bytes, text=as_size))
    # Peak memory and time belong to what made a directory: costs, not qualities, so never marked.
    columns.append(_Column(title="peak memory", number=lambda one: one.peak_rss_bytes, text=as_size))
    columns.append(_Column(title="time", number=lambda one: one.seconds, text=as_duration))
    if not is_comparison and any(one.trainable_share is not None for one in facts):
        columns.append(_Column(title="trained", number=lambda one: one.trainable_share, text=as_percent))
    if not is_comparison and any(one.optimizer_bytes is not None for one in facts):
        columns.append(_Column(title="optimizer state", number=lambda one: one.optimizer_bytes, text=as_size))
    return columns


def _measured(facts: Sequence[Facts], *, is_comparison: bool) -> list[_Column | _MetricColumn]:
    """The columns in which some model has a value: what nobody was asked for says nothing."""
    columns = _columns(facts, is_comparison=is_comparison)
    return [column for column in columns if any(column.cell(one, facts[0]).text != MISSING for one in facts)]


def _is_language(facts: Sequence[Facts]) -> bool:
    """Whether one of the models is a language model: classifiers have no perplexity, and generate nothing."""
    return not all(one.kind for one in facts)


def _metric_column(metric: str) -> _MetricColumn:
    is_loss = metric.startswith(f"{LOSS_ON} ") and not metric.endswith(f" ({TO_FORGET})")
    return _MetricColumn(
        title=metric,
        row=lambda one: next((row for row in one.metrics if row.metric == metric), None),
        better="less" if is_loss else DIRECTION.get(metric.split("/")[0]),
    )


def before_after(facts: Sequence[Facts], *, is_comparison: bool = False) -> BeforeAfter:
    """The table's content; `facts[0]` is what the others are compared with.

    In a comparison a last column says against what no other model is a better trade (see `pareto`). What making a
    model cost is said where its steps since the reference were added up, which a comparison of adaptations does.

    Columns that no model has a value for are left out.

    A metric is worse when its value lies beyond the reference's 95% interval; parameters and size when they
    grew; tokens/s when it fell by more than a quarter: such timings vary from run to run.
    """
    reference, columns = facts[0], _measured(facts, is_comparison=is_comparison)
    rows = [(Cell(text=one.label), *(column.cell(one, reference) for column in columns)) for one in facts]
    titles = ["model", *(column.title for column in columns)]
    if is_comparison and _is_language(facts):
        rows = [
            (*row, Cell(text=", ".join(on) or "-", wraps=True)) for row, on in zip(rows, fronts_of(facts), strict=True)
        ]
        titles.append("on the front")
    return BeforeAfter(columns=tuple(titles), rows=tuple(rows), note=_note(facts, is_comparison=is_comparison))


def _note(facts: Sequence[Facts], *, is_comparison: bool) -> str:
    sentences = []
    measured = next((one for one in facts if one.perplexity), None)
    if measured and measured.perplexity:
        corpus = f"of {measured.corpus}" if measured.corpus else "of held-out text"
        windows = f" in windows of {measured.seq_len}" if measured.seq_len else ""
        sentences.append(f"Perplexity over {measured.perplexity.count:,} tokens {corpus}{windows}, 95% interval.")
    if is_language := _is_language(facts):
        sentences.append("Non-zero share of the blocks' linear layers, and of all parameters.")
        if any(one.tokens_per_second or one.decode_tokens_per_second for one in facts):
            sentences.append("Prefill: a forward pass over the windows. Decode: greedy, one text at a time.")
    else:
        sentences.append("Accuracy over the held-out examples of all tasks, 95% interval.")
    if task := next((row for one in facts for row in one.metrics if row.metric == TASK_LOSS), None):
        sentences.append(
            f"Task loss over {task.count:,} tokens; task gain and forgetting are differences from {facts[0].label}, on "
            "the task's text and on that of the perplexity, in nats a token. Costs: of all steps since the reference."
        )
    if is_comparison and is_language:
        sentences.append("On the front: no other model is both better and, in the quantity named, cheaper or faster.")
    elif not is_comparison:
        sentences.append("Peak memory and time: of the step that made the model.")
    return " ".join(sentences)


def before_after_table(facts: Sequence[Facts], *, is_comparison: bool = False) -> Table:
    """The table for a terminal; what is worse than in the first model is marked with an asterisk.

    Up to four models stand side by side, which fits 80 columns; more are listed below each other.
    """
    from rich import box
    from rich.table import Table
    from rich.text import Text

    heading, *rows = _oriented(before_after(facts, is_comparison=is_comparison))
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for index, title in enumerate(heading):
        table.add_column(Text(title.text), justify="right" if index else "left", no_wrap=index == 0)
    for row in rows:
        table.add_row(
            row[0].text,
            *(Text(_marked(cell, between="\n"), style="yellow" if cell.worse else "") for cell in row[1:]),
        )
    if any(cell.worse for row in rows for cell in row):
        table.caption = Text(f"* worse than {facts[0].label}")
        table.caption_justify = "left"
    return table


def _oriented(content: BeforeAfter) -> list[tuple[Cell, ...]]:
    """Heading and rows: one column per model up to four models, one row per model beyond."""
    heading = tuple(Cell(text=title) for title in content.columns)
    rows = [heading, *content.rows]
    return list(zip(*rows, strict=True)) if len(content.rows) <= MOST_SIDE_BY_SIDE else rows


def _marked(cell: Cell, *, between: str = " ") -> str:
    # The blank keeps the digits of marked and unmarked cells of a column under each other.
    mark = "*" if cell.worse else " "
    return f"{cell.text}{mark}{between}{cell.ends} " if cell.ends and between == "\n" else f"{cell}{mark}"


def print_before_after(facts: Sequence[Facts], console: Console, *, is_comparison: bool = False) -> None:
    """Prints the table: fitted to a terminal; elsewhere in full width as plain aligned text."""
    if console.is_terminal:
        console.print(before_after_table(facts, is_comparison=is_comparison))
    else:
        console.file.write(plain_table(facts, is_comparison=is_comparison))


def plain_table(facts: Sequence[Facts], *, is_comparison: bool = False) -> str:
    """The same as aligned text without colours or wrapping, ending in a newline."""
    rows = _oriented(before_after(facts, is_comparison=is_comparison))
    lines = aligned([[_marked(cell) for cell in row] for row in rows])
    if any(cell.worse for row in rows for cell in row):
        lines.append(f"* worse than {facts[0].label}")
    return "\n".join(lines) + "\n"


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines with columns under each other, the first to the left and the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            text.rjust(width) if index else text.ljust(width)
            for index, (text, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def markdown_table(facts: Sequence[Facts]) -> str:
    """The table in GitHub's Markdown, ending in a newline; worse entries say so."""
    content = before_after(facts)
    lines = [
        _markdown_row(content.columns),
        _markdown_row([":--", *["--:"] * (len(content.columns) - 1)]),
        *(_markdown_row([f"{cell} (worse)" if cell.worse else str(cell) for cell in row]) for row in content.rows),
    ]
    return "\n".join(lines) + "\n"


def _markdown_row(texts: Sequence[str]) -> str:
    escaped = (text.replace("|", "\\|") for text in texts)
    return f"| {' | '.join(escaped)} |"


def json_rows(facts: Sequence[Facts]) -> list[dict[str, Any]]:
    """Per model its facts without layers and generations.

    `worse` names the columns that got worse, `pareto` is whether no other model is both smaller and better, and
    `fronts` names all quantities of which that is so.
    """
    content = before_after(facts, is_comparison=True)
    rows = []
    for one, cells, on in zip(facts, content.rows, fronts_of(facts), strict=True):
        row = {key: value for key, value in asdict(one).items() if key not in ("layers", "generations")}
        worse = [column for column, cell in zip(content.columns, cells, strict=True) if cell.worse]
        rows.append({**row, "worse": worse, "pareto": SIZE.name in on, "fronts": list(on)})
    return rows
