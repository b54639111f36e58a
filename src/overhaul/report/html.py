"""One self-contained HTML file: no script is needed to read it, and nothing is loaded from anywhere."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from overhaul.report.facts import Facts, Report, recovery
from overhaul.report.findings import as_csv, csv_url, curve_figures, layer_figures, map_figures, recovery_figure
from overhaul.report.numbers import as_duration, as_interval, as_size
from overhaul.report.sentences import measured_sentence, step_sentence, verdict
from overhaul.report.tables import before_after
from overhaul.table import Row, Table


def html_report(report: Report) -> str:
    """The page: verdict, before/after, recovery, curves, layers, generations, lineage, how to repeat it."""
    gap = recovery(report.facts)
    return (
        _environment()
        .get_template("report.html.j2")
        .render(
            report=report,
            title=report.title,
            verdict=verdict(report.facts),
            table=before_after(report.facts),
            recovery=recovery_figure(gap) if gap else None,
            charts=curve_figures(report.curves),
            maps=layer_figures(report.facts),
            generations=side_by_side(report.facts),
            sentences=[step_sentence(step) for step in report.lineage],
        )
    )


def html_measured(table: Table, *, title: str, command: str, environment: Mapping[str, str]) -> str:
    """The page of a measure: the finding, the numbers with a row for each model, the pictures.

    Args:
        table: with at least one row.
        title: above the finding.
        command: what to type to measure it again.
        environment: versions and hardware.
    """
    metrics = list(dict.fromkeys(row.metric for row in table.rows))
    by_model: dict[str, dict[str, Row]] = {}
    for row in table.rows:
        by_model.setdefault(row.model, {})[row.metric] = row
    names = ("model", "metric", "value", "low", "high", "count")
    return (
        _environment()
        .get_template("measured.html.j2")
        .render(
            title=title,
            verdict=measured_sentence(table.rows),
            columns=["model", *metrics],
            rows=[[model, *(as_interval(rows.get(metric)) for metric in metrics)] for model, rows in by_model.items()],
            csv_url=csv_url(as_csv(names, [[str(getattr(row, name)) for name in names] for row in table.rows])),
            charts=curve_figures(table.curves),
            maps=map_figures(table.maps),
            command=command,
            environment=environment,
        )
    )


def _environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
    )
    environment.filters.update(duration=as_duration, size=as_size)
    return environment


def side_by_side(facts: Sequence[Facts]) -> list[tuple[str, list[tuple[str, str]]]]:
    """[(prompt, [(model's label, its text)])], in the order in which prompts first appear."""
    prompts = dict.fromkeys(prompt for one in facts for prompt, _ in one.generations)
    texts = [(one.label, dict(one.generations)) for one in facts]
    return [(prompt, [(label, by[prompt]) for label, by in texts if prompt in by]) for prompt in prompts]
