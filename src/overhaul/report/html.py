"""One self-contained HTML file: no script is needed to read it, and nothing is loaded from anywhere."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from overhaul.report.facts import Facts, Report, recovery
from overhaul.report.findings import (
    as_csv,
    csv_url,
    curve_figures,
    layer_figures,
    map_figures,
    recovery_figure,
    trade_figures,
)
from overhaul.report.numbers import MISSING, as_duration, as_interval, as_size
from overhaul.report.sentences import comparison_sentence, measured_sentence, step_sentence, verdict
from overhaul.report.tables import before_after
from overhaul.report.tasks import (
    MEANINGS,
    MOST_BESIDE,
    Learnt,
    average_figures,
    called,
    cost_notes,
    costs_note,
    course_figure,
    kept_notes,
    matrix_figure,
    metric_rows,
    metrics_note,
    points_ends,
    runs_note,
    sentence,
)
from overhaul.table import Row, Table
from overhaul.task_record import TaskRecord


def html_report(report: Report) -> str:
    """The page: verdict, before/after, recovery, curves, layers, generations, lineage, how to repeat it."""
    gap = None if report.is_comparison else recovery(report.facts)
    return (
        _environment()
        .get_template("report.html.j2")
        .render(
            report=report,
            title=report.title,
            verdict=comparison_sentence(report.facts) if report.is_comparison else verdict(report.facts),
            table=before_after(report.facts, is_comparison=report.is_comparison),
            tasks=_tasks(report.tasks) if report.tasks else None,
            trades=trade_figures(report.facts) if report.is_comparison else [],
            recovery=recovery_figure(gap) if gap else None,
            charts=curve_figures(report.curves),
            maps=layer_figures(report.facts),
            generations=side_by_side(report.facts),
            sentences=[step_sentence(step) for step in report.lineage],
        )
    )


def _tasks(record: TaskRecord) -> dict[str, Any]:
    """The pictures and tables of a run of tasks."""
    return {
        "are_many": len(record.tasks) > MOST_BESIDE,
        "maps": [matrix_figure(record.matrices[kind], kind) for kind in MEANINGS],
        "charts": [course_figure(record.matrices[kind], kind) for kind in MEANINGS],
        "tables": [metrics_note(record), costs_note(record)],
    }


def html_learnt(methods: Sequence[Learnt], *, command: str, environment: Mapping[str, str]) -> str:
    """The page of runs of tasks side by side.

    Args:
        methods: at least one, all of the same tasks.
        command: what to type to write it again.
        environment: versions.
    """
    names, rows = [called(one) for one in methods], metric_rows(methods)
    header = ("metric", *(f"{one.label}{end}" for one in methods for end in ("", " low", " high")))
    numbers = [
        (name, *(text for row in found for text in (map(repr, (row.value, row.low, row.high)) if row else ("",) * 3)))
        for name, found, _ in rows
    ]
    what = names[0] if len(names) == 1 else f"{len(names)} methods"
    return (
        _environment()
        .get_template("learnt.html.j2")
        .render(
            title=f"{what} on {len(methods[0].runs[0].tasks)} tasks",
            verdict=sentence(methods),
            columns=["", *names, "better"],
            rows=[
                (
                    name,
                    [(f"{row.value:.1%}" if row else MISSING, points_ends(row) if row else "") for row in found],
                    better,
                )
                for name, found, better in rows
            ],
            csv_url=csv_url(as_csv(header, numbers)),
            averages=average_figures(methods),
            maps=[matrix_figure(one.matrix(kind), kind, one.label) for one in methods for kind in MEANINGS],
            are_many=len(methods[0].runs[0].tasks) > MOST_BESIDE,
            costs=[*cost_notes(methods), *kept_notes(methods)],
            runs=runs_note(methods),
            has_seeds=any(len(one.runs) > 1 for one in methods),
            command=command,
            environment=environment,
        )
    )


def html_measured(
    table: Table, *, title: str, command: str, environment: Mapping[str, str], called: Mapping[str, str] | None = None
) -> str:
    """The page of a measure: the finding, the numbers with a row for each model, the pictures.

    Args:
        table: with at least one row.
        called: what to call models whose names in the table are long; its CSV keeps those.
        title: above the finding.
        command: what to type to measure it again.
        environment: versions and hardware.
    """
    named = called or {}
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
            verdict=measured_sentence([replace(row, model=named.get(row.model, row.model)) for row in table.rows]),
            columns=["model", *metrics],
            rows=[
                [named.get(model, model), *(as_interval(rows.get(metric)) for metric in metrics)]
                for model, rows in by_model.items()
            ],
            csv_url=csv_url(as_csv(names, [[str(getattr(row, name)) for name in names] for row in table.rows])),
            charts=curve_figures(table.curves),
            maps=map_figures(table.maps),
            details=_details(table, named),
            notes=table.notes,
            command=command,
            environment=environment,
        )
    )


def _details(table: Table, called: Mapping[str, str]) -> dict[str, Any] | None:
    """Titles, rows and CSV of the records; lists in a cell are written with semicolons, models are called shortly."""
    if not table.details:
        return None
    names = list(table.details[0])
    rows = [[_cell(detail[name]) for name in names] for detail in table.details]
    shown = [[called.get(text, text) for text in row] for row in rows]
    return {"columns": names, "rows": shown, "csv_url": csv_url(as_csv(names, rows))}


def _cell(value: Any) -> str:
    if isinstance(value, Mapping):
        return " ".join(f"{name} {_cell(one)}" for name, one in value.items())
    if isinstance(value, Sequence) and not isinstance(value, str):
        return "; ".join(map(_cell, value))
    return f"{value:.4g}" if isinstance(value, float) else str(value)


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
