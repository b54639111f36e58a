"""An output directory: model, record, recipe, card, report, curves, all written aside and renamed at once."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import yaml
from safetensors.torch import save_file

from overhaul import artifact as artifacts
from overhaul import banks, catalog, checkpoint, ledger, models, packed, pretrained, recipe
from overhaul.artifact import Artifact
from overhaul.deletion import ensemble
from overhaul.journal import Notes, TableNote
from overhaul.judge import Judge
from overhaul.kinds import Kind, is_classifier
from overhaul.lineage import LineageStep, nested_fields
from overhaul.method import Method
from overhaul.report.card import (
    CardData,
    Relation,
    banked_snippet,
    model_card,
    overhaul_snippet,
    served_classes_snippet,
    served_images_snippet,
    snippet_of,
)
from overhaul.report.facts import HELDOUT, LOSS_ON, Facts, Report, curves_of_history
from overhaul.report.figures import curves_png
from overhaul.report.html import html_report
from overhaul.select import has_adapters
from overhaul.stability import gaps_note
from overhaul.table import Curve
from overhaul.task_record import TASKS, TaskRecord
from overhaul.train import History


def write_directory(
    made: Artifact,
    out: Path,
    *,
    facts: tuple[Facts, ...],
    history: History | None,
    judge: Judge,
    notes: Notes,
) -> tuple[Facts, ...]:
    """Writes everything that belongs to the result of a step.

    Args:
        made: the changed model with its lineage.
        out: where to.
        facts: of every model of the chain, the result last.
        history: of the training, if there was one.
        judge: under whose key the facts were measured.
        notes: what the method said about layers and parts.

    Returns:
        The facts with the result's path and size on disk.
    """
    with artifacts.stage(out) as directory:
        if has_adapters(made.model):
            from overhaul.interop.peft import write_adapter

            write_adapter(made.model, artifacts.directories(made.path)[1], directory)
            artifacts.copy_companions(made.path, directory)
        else:
            artifacts.write_model(made, directory)
        size = artifacts.size_on_disk(directory)
        facts = (*facts[:-1], replace(facts[-1], path=str(out), bytes=size))
        extra = {"facts_key": judge.key, "facts": [asdict(one) for one in facts]}
        told = _told_by(history, facts) if history else []
        if notes.parts:
            extra["reconstruction"] = [asdict(part) for part in notes.parts]
        if tables := [*notes.tables, *told]:
            extra["tables"] = [asdict(table) for table in tables]
        for beside in notes.tensors:
            (directory / beside.file).parent.mkdir(exist_ok=True)
            save_file(dict(beside.tensors), directory / beside.file, metadata=dict(beside.metadata))
        for beside in notes.files:
            beside.write(directory)
        for left in notes.states:
            checkpoint.save(left.state, directory / left.file)
        for records in notes.rows:
            lines = (json.dumps(row, ensure_ascii=False) for row in records.rows)
            (directory / records.file).write_text("\n".join(lines) + "\n")
        for record in notes.tasks:
            (directory / TASKS).write_text(json.dumps(record.to_json(), indent=1, ensure_ascii=False), "utf-8")
        for written in notes.texts:
            (directory / written.file).write_text(written.text, encoding="utf-8")
        last, step = made.lineage[-1], len(made.lineage)
        if history and last.verb != "learn":  # a memory gives documents again, and examples come alone
            how: dict[str, Any] = {"verb": last.verb, "method": last.method, "anew": history.starts_over}
            ledger.add(directory, history.seen, step=step, **how)
        artifacts.write_record(made, directory, extra)
        recipe_yaml = replay(made.lineage, out)
        if recipe_yaml:
            (directory / "recipe.yaml").write_text(recipe_yaml)
        curves = reconstruction_curves(notes) if notes.parts else _curves(history, facts)
        report = build_report(
            made.lineage, facts, curves, recipe_yaml, tables=notes.tables, training=told, tasks=notes.tasks
        )
        (directory / "report.html").write_text(html_report(report))
        if history:
            lines = (json.dumps(point) for point in history.points)
            (directory / "metrics.jsonl").write_text("\n".join(lines) + "\n")
            curves_png(report.curves, directory / "curves.png")
        (directory / "README.md").write_text(
            card(
                made,
                report,
                out,
                adapter=(directory / "adapter_config.json").exists(),
                tasks=banks.tasks_of(directory),
                deletable=ensemble.is_there(directory),
            )
        )
    return facts


def _told_by(history: History, facts: Sequence[Facts]) -> list[TableNote]:
    """What was read of a mixture, and what happened to the losses on other text on the way."""
    told = []
    if history.ledger:
        total = sum(drawn.tokens for drawn in history.ledger)
        rows = [
            (drawn.name, f"{drawn.tokens:,}", f"{drawn.asked / total:.2%}", f"{drawn.tokens / total:.2%}",
             "" if drawn.passes is None else f"{drawn.passes:.3g}")
            for drawn in history.ledger
        ]  # fmt: skip
        columns = ("text", "tokens", "share asked", "share read", "epochs")
        told.append(
            TableNote(title="The mixture: what was asked and what was read.", columns=columns, rows=tuple(rows))
        )
    gaps = gaps_note(history.points, losses_before(facts), f"{HELDOUT}/")
    return told + ([gaps] if gaps else [])


def losses_before(facts: Sequence[Facts]) -> dict[str, float]:
    """Held-out losses of the model that the last one was made from, in nats a token, by corpus."""
    if len(facts) < 2:
        return {}
    parent, found = facts[-2], {}
    if parent.perplexity and parent.corpus == facts[-1].corpus:
        found[parent.corpus] = math.log(parent.perplexity.value)
    watched = [row for row in parent.metrics if row.metric.startswith(LOSS_ON)]
    return found | {row.metric.removeprefix(LOSS_ON).strip(): row.value for row in watched}


def _curves(history: History | None, facts: Sequence[Facts]) -> tuple[Curve, ...]:
    """What is drawn of a training; nothing without one."""
    if history is None:
        return ()
    return curves_of_history(history.points, before=losses_before(facts), judged=facts[-1].corpus, unit=history.unit)


def reconstruction_curves(notes: Notes) -> tuple[Curve, ...]:
    """The error of every reconstructed part, before and after."""
    x = tuple(float(number) for number in range(1, len(notes.parts) + 1))
    errors = {"before": [part.before for part in notes.parts], "after": [part.after for part in notes.parts]}
    return tuple(
        Curve(
            name=f"reconstruction error {when}",
            x=x,
            y=tuple(values),
            x_label="part",
            y_label="mean squared error",
        )
        for when, values in errors.items()
    )


def build_report(
    lineage: Sequence[LineageStep],
    facts: tuple[Facts, ...],
    curves: tuple[Curve, ...],
    recipe_yaml: str,
    *,
    tables: Sequence[TableNote] = (),
    training: Sequence[TableNote] = (),
    tasks: Sequence[TaskRecord] = (),
) -> Report:
    """The report on a chain of steps: see `Report`."""
    last = lineage[-1]
    return Report(
        title=f"{last.verb} {last.method}: {Path(facts[-1].path).name}",
        facts=facts,
        lineage=tuple(lineage),
        curves=curves,
        training=tuple(training),
        tables=tuple(tables),
        tasks=tasks[-1] if tasks else None,
        recipe_yaml=recipe_yaml,
        commands=tuple(dict.fromkeys(step.command for step in lineage if step.command)),
        environment={**last.versions, "hardware": last.hardware},
    )


def replay(lineage: Sequence[LineageStep], out: Path) -> str:
    """The recipe that makes the directory again from the model the chain began with.

    What was taken by a command that is no method can be in no recipe: it begins behind the last of these, and is empty
    where nothing came after.
    """
    behind = max((n for n, step in enumerate(lineage, 1) if not catalog.known(step.verb, step.method)), default=0)
    if behind == len(lineage):
        return ""
    base = lineage[behind].parents[0].path
    steps: list[tuple[str, str, dict[str, Any]]] = []
    for step in lineage[behind:]:
        # All fields, not only the chosen ones: a later version may have other defaults.
        steps.append((step.verb, step.method, {**nested_fields(step.fields), **step.options}))
    return recipe.to_yaml(base, steps, out=f"{out.name}-again")


def card(
    made: Artifact, report: Report, out: Path, *, adapter: bool, tasks: Sequence[str] = (), deletable: bool = False
) -> str:
    """The model card of the result.

    Args:
        made: the result.
        report: about it.
        out: where it is written to.
        adapter: whether it is one.
        tasks: those of its banks.
        deletable: whether it answers with adapters from which examples can be deleted.
    """
    base = made.lineage[0].parents[0].path
    named = pretrained.NAMED.get(base)
    read = (data for step in made.lineage for data in (step.data, *step.beside) if data)
    used = {data.name: data for data in read}
    methods = _methods(made.lineage)
    relation: Relation = "adapter" if adapter else "quantized" if packed.is_quantized(made.model) else "finetune"
    return model_card(
        report,
        name=out.name,
        license=named.license.lower() if named else inherited_license(made.path),
        base_model=named.base_model if named else base,
        relation=relation,
        datasets=[CardData(name=data.name, license=data.licence or "unknown") for data in used.values()],
        citations=[method.paper for method in methods if method.paper],
        use_snippet=_snippet(made, out.name, tasks, deletable=deletable),
    )


def _snippet(made: Artifact, name: str, tasks: Sequence[str], *, deletable: bool) -> str:
    """Python that uses the model where its card's own is not enough."""
    if not _is_stock(made):
        return overhaul_snippet(name)
    if deletable:
        if not is_classifier(made.model):
            return overhaul_snippet(name, with_library=True)
        of_images = made.kind is Kind.IMAGE_CLASSIFIER
        return served_images_snippet(name) if of_images else served_classes_snippet(name)
    if tasks:
        by_likeness = made.kind is Kind.CAUSAL_LM
        return overhaul_snippet(name, with_library=True) if by_likeness else banked_snippet(name, tasks[-1])
    return snippet_of(made.kind.value, name, own_code=True) if models.is_own(made.model) else ""


def _is_stock(made: Artifact) -> bool:
    """Whether plain transformers loads it."""
    if not packed.is_packed(made.model):
        return True
    model: Any = made.model
    stock = "quant_method" in model.config.quantization_config
    return stock and all(method.writes_stock for method in _methods(made.lineage))


def _methods(lineage: Sequence[LineageStep]) -> list[type[Method]]:
    """The methods of the steps, each once; commands that are none are left out."""
    entries = (catalog.known(step.verb, step.method) for step in lineage)
    return list(dict.fromkeys(entry.load() for entry in entries if entry))


def inherited_license(path: Path) -> str:
    """The licence in the front matter of the parent's card; `unknown` where it says nothing."""
    readme = path / "README.md"
    parts = readme.read_text(errors="replace").split("---", 2) if readme.is_file() else []
    if len(parts) < 3:
        return "unknown"
    try:
        front = yaml.safe_load(parts[1])
    except yaml.YAMLError:
        return "unknown"
    return str(front.get("license", "unknown")) if isinstance(front, dict) else "unknown"
