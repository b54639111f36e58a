"""Several models side by side: found in folders, compared with the first.

Language models are measured on one held-out text. Of classifiers their records say what they know of tasks.

overhaul compare smollm2-135m runs/            # every model directory below runs/, against the named one
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from overhaul import adaptation, machine, pretrained
from overhaul import artifact as artifacts
from overhaul.adaptation import Cost, Losses, Trial
from overhaul.corpora import open_several
from overhaul.delta import Change
from overhaul.errors import UserError
from overhaul.journal import TableNote
from overhaul.judge import Judge
from overhaul.kinds import Kind, kind_of
from overhaul.layers import LinearLike, Packed
from overhaul.learn_report import alone, learnt_in, tasks_differ
from overhaul.lineage import LineageStep, Parent
from overhaul.options import DEFAULT_CORPUS, Options
from overhaul.report.facts import ACCURACY_OF, Facts, Report, labels_of
from overhaul.report.numbers import as_quantity
from overhaul.report.tasks import Learnt, accuracy_rows, metrics_table
from overhaul.stored import base_of
from overhaul.task_record import TASKS

_MARKS = ("config.json", "adapter_config.json")
"""Either of them makes a directory a model."""


@dataclass(frozen=True, slots=True)
class Comparison:
    """What `compare` found.

    Attributes:
        report: facts of every model, the reference first.
        changes: for every model but the reference, which tensors differ from the reference's.
        spectra: if asked for, what tuning did to the singular vectors of every model whose base is there.
        learnt: of classifiers that learnt the same tasks, what they know of them.
    """

    report: Report
    changes: tuple[Mapping[str, Any], ...]
    spectra: tuple[Mapping[str, Any], ...] = ()
    learnt: tuple[Learnt, ...] = ()


def models_of(refs: Sequence[str]) -> list[str]:
    """The models that are meant, each once: a folder stands for every model directory below it.

    The first is the reference. Where a folder is named first, it is the model that most of them were made from, as
    far as it is still there as it was.

    Raises:
        UserError: a folder holds no model, or there are fewer than two in all.
    """
    found: dict[Path, str] = {}
    for ref in refs:
        if _is_folder(ref):
            for path in _models_below(Path(ref).expanduser()):
                found.setdefault(path.resolve(), str(path))
        else:
            found.setdefault(pretrained.resolve(ref).resolve(), ref)
    if refs and _is_folder(refs[0]) and (origin := _origin(found)):
        path, name = origin
        found = {path: found.pop(path, name), **found}
    if len(found) < 2:
        raise UserError(
            f"compare needs at least two models; got {', '.join(found.values()) or 'none'}",
            hint="overhaul compare smollm2-135m DIR",
        )
    return list(found.values())


def _is_folder(ref: str) -> bool:
    """Whether it is a directory that is no model itself."""
    path = Path(ref).expanduser()
    return ref not in pretrained.NAMED and path.is_dir() and not _is_model(path)


def _is_model(path: Path) -> bool:
    return any((path / name).is_file() for name in _MARKS)


def _models_below(folder: Path) -> list[Path]:
    """The model directories below a folder, in natural order: not those in hidden folders or inside a model.

    Raises:
        UserError: there are none.
    """
    found, seen = [], set[Path]()

    def look(at: Path) -> None:
        for entry in sorted(at.iterdir(), key=_natural):
            # What is hidden is unfinished or somebody else's; a link may lead back to a folder above.
            if not entry.is_dir() or entry.name.startswith(".") or entry.resolve() in seen:
                continue
            seen.add(entry.resolve())
            if _is_model(entry):
                found.append(entry)
            else:
                look(entry)

    look(folder)
    if not found:
        raise UserError(
            f"{folder} is no model, and no directory below it is one",
            allowed=f"a model directory (it holds {' or '.join(_MARKS)}), or a folder of such directories",
        )
    return found


def _natural(path: Path) -> list[tuple[int, str]]:
    """Sorts `run-9` before `run-10`."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", path.name)]


def _origin(models: Iterable[Path]) -> tuple[Path, str] | None:
    """Directory and name of the model that most chains began with; None where it is gone or was changed."""
    begun: Counter[Parent] = Counter()
    for path in models:
        record = artifacts.read_record(path) if (path / artifacts.RECORD).is_file() else {}
        if lineage := record.get("lineage"):
            begun[Parent(**lineage[0]["parents"][0])] += 1
    for parent, _ in begun.most_common():
        if path := artifacts.unchanged(parent):
            return path.resolve(), parent.path
    return None


def compare(refs: Sequence[str], options: Options, *, task: str | None = None, spectra: bool = False) -> Comparison:
    """Measures models on one held-out text, and says which tensors differ from the reference's.

    Perplexity and texts come from a directory's record where it holds them for the same text; speeds are measured
    now, for all models alike. Classifiers are not measured: what they know of the tasks that they learnt is recorded.

    Args:
        refs: as `models_of` returns them, the reference first.
        options: which text, and how much of it.
        task: a corpus that the models were adapted to: what they won on it, lost elsewhere and cost is measured too.
        spectra: also look at the singular vectors; a minute for each base, which is kept, and less for each model.

    Raises:
        UserError: one of them cannot be read, or they are of several kinds; said before any is measured. Or with a
            task, their tokenizers differ.
    """
    device = machine.pick_device(options.device)
    dtype = machine.compute_dtype(options.dtype, device)
    for ref in refs:  # not after minutes of measuring the others
        artifacts.check_files(ref)
    if (kind := _kind_of_all(refs)) is not Kind.CAUSAL_LM:
        if task is not None or spectra or options.evaluate not in (None, "none", DEFAULT_CORPUS):
            given = "--task" if task is not None else "--spectra" if spectra else f"--data {options.evaluate}"
            raise UserError(f"{given} is of language models", hint=f"without it: these are {kind.value}s")
        return _classifiers(refs, kind, device, dtype)
    facts: list[Facts] = []
    losses: list[Losses] = []
    judges: list[Judge] = []
    changes: list[dict[str, Any]] = []
    lineages: list[tuple[LineageStep, ...]] = []
    reference: dict[str, Tensor] = {}
    kept = adaptation.weights_of(refs[0]) if task is not None else {}
    watched = tuple(open_several(options.watch).values())
    for ref, label in zip(refs, labels_of(refs), strict=True):
        made = artifacts.load(ref, device=device, dtype=machine.weights_dtype(dtype))
        judge = Judge.of(options, None, made.processor, dtype, watched)
        known = judge.timed(judge.of_directory(made), made.model)
        size = artifacts.size_on_disk(made.path)
        facts.append(replace(known, label=label, path=ref, bytes=size, tokenizer=judge.tokenizer))
        judges.append(judge)
        lineages.append(made.lineage)
        if task is not None:
            adaptation.refuse_other_tokens([one.tokenizer for one in judges], [one.label for one in facts])
            losses.append(_trial(task, judge).losses(made.model))
            spent = adaptation.cost(made, lineages[0], kept)
            facts[-1] = _adapted(facts[-1], spent, losses)
        if reference:
            changes.append({"model": ref, **difference(reference, made.model)})
        else:
            reference = dict(dense_tensors(made.model))
    warnings: tuple[str, ...] = ()
    if len({judge.tokenizer for judge in judges}) > 1:
        facts = [judge.with_bits_per_byte(one) for judge, one in zip(judges, facts, strict=True)]
        warnings = (_other_tokens(facts),)
    found = spectra_of(refs) if spectra else ()
    report = Report(
        title=f"{len(facts) - 1} model{'s' if len(facts) > 2 else ''} compared with {facts[0].label}",
        facts=tuple(facts),
        is_comparison=True,
        tables=(*_chains(facts, lineages), *_spectra_table(found)),
        environment={**machine.versions(), "hardware": machine.hardware(device)},
        warnings=warnings,
    )
    return Comparison(report, tuple(changes), found)


def _kind_of_all(refs: Sequence[str]) -> Kind:
    """The kind of all models.

    Raises:
        UserError: two of them are of different kinds.
    """
    kinds = [kind_of(json.loads((artifacts.directories(ref)[1] / "config.json").read_text())) for ref in refs]
    for ref, kind in zip(refs, kinds, strict=True):
        if kind is not kinds[0]:
            raise UserError(
                f"{refs[0]} and {ref} are models of different kinds: {kinds[0].value} and {kind.value}",
                allowed="models of one kind: no measure is of both",
            )
    return kinds[0]


def _classifiers(refs: Sequence[str], kind: Kind, device: torch.device, dtype: torch.dtype) -> Comparison:
    """Classifiers: sizes, which tensors differ, and what they know of the same tasks, as far as their records say it.

    Raises:
        UserError: a model cannot be read, or its `tasks.json` is damaged.
    """
    labels, judge = labels_of(refs), Judge(None, None, None, dtype)
    learnt, warnings = _learnt(refs, labels)
    facts: list[Facts] = []
    changes: list[dict[str, Any]] = []
    lineages: list[tuple[LineageStep, ...]] = []
    reference: dict[str, Tensor] = {}
    for ref, label in zip(refs, labels, strict=True):
        made = artifacts.load(ref, device=device, dtype=machine.weights_dtype(dtype), kinds=(kind,))
        known = judge.of_directory(made)
        # The record has them without the tasks that they are of, which may be others here.
        others = tuple(row for row in known.metrics if not row.metric.startswith(ACCURACY_OF))
        metrics = (*others, *(accuracy_rows(learnt[ref]) if ref in learnt else ()))
        size = artifacts.size_on_disk(made.path)
        facts.append(replace(known, label=label, path=ref, bytes=size, metrics=metrics))
        lineages.append(made.lineage)
        if reference:
            changes.append({"model": ref, **difference(reference, made.model)})
        else:
            reference = dict(dense_tensors(made.model))
    found = tuple(learnt.values())
    report = Report(
        title=f"{len(facts) - 1} {kind.value}{'s' if len(facts) > 2 else ''} compared with {facts[0].label}",
        facts=tuple(facts),
        is_comparison=True,
        tables=(*_chains(facts, lineages), *([metrics_table(found)] if found else ())),
        environment={**machine.versions(), "hardware": machine.hardware(device)},
        warnings=warnings,
    )
    return Comparison(report, tuple(changes), learnt=found)


def _learnt(refs: Sequence[str], labels: Sequence[str]) -> tuple[dict[str, Learnt], tuple[str, ...]]:
    """What is known of tasks by the models that learnt some, where all learnt the same; and what is not compared."""
    paths = {ref: artifacts.directories(ref)[0] for ref in refs}
    runs = {ref: learnt_in(str(path)) for ref, path in paths.items() if (path / TASKS).is_file()}
    called = dict(zip(refs, labels, strict=True))
    if not runs:
        return {}, (f"No model has a {TASKS}: what they know is not compared.",)
    first, *others = runs
    for other in others:
        if told := tasks_differ(runs[first], runs[other]):
            return {}, (
                f"Accuracies are not compared: {called[first]} and {called[other]} learnt different tasks: {told}.",
            )
    without = [called[ref] for ref in refs if ref not in runs]
    warnings = (f"Without a {TASKS}, and so without accuracies: {', '.join(without)}.",) if without else ()
    return {ref: alone(run, called[ref]) for ref, run in runs.items()}, warnings


_SPECTRA = {
    "intruders": "intruders",
    "per 1,000": "intruders per 1,000 vectors",
    "stable rank": "stable rank of the change, median",
    "entropy rank": "entropy rank of the change, median",
}
"""What a line of spectra shows, by the metrics of `measure spectra`."""


def spectra_of(refs: Sequence[str]) -> tuple[dict[str, Any], ...]:
    """Intruders and rank of the change of every model whose base is known and there, with layers of the same shapes."""
    from overhaul.measure.spectra import MeasureSpectra

    found = []
    for ref in refs:
        if (base := base_of(ref)) is not None:
            rows = {row.metric: row.value for row in MeasureSpectra.model_validate({}).between(base, ref).rows}
            found.append({"model": ref, "base": base, **{name: rows.get(metric) for name, metric in _SPECTRA.items()}})
    return tuple(found)


def _spectra_table(found: Sequence[Mapping[str, Any]]) -> tuple[TableNote, ...]:
    if not found:
        return ()
    rows = tuple((one["model"], one["base"], *(as_quantity(one[name]) for name in _SPECTRA)) for one in found)
    title = "Singular directions that the base does not know, and the rank of the change"
    return (TableNote(title=title, columns=("model", "base", *_SPECTRA), rows=rows),)


def _trial(task: str, judge: Judge) -> Trial:
    if judge.windows is None:
        raise UserError("--task needs other text to see what was forgotten", hint="--data sample")
    return Trial.of(task, judge.processor, judge.windows, judge.dtype)


def _adapted(facts: Facts, spent: Cost, losses: Sequence[Losses]) -> Facts:
    """The facts with what the model won, lost and cost since the reference."""
    return replace(
        facts,
        metrics=(*facts.metrics, *adaptation.metrics(facts.label, losses[-1], losses[0])),
        seconds=spent.seconds,
        peak_rss_bytes=spent.peak_rss_bytes,
        trainable_parameters=spent.trainable_parameters,
        stored_bytes=spent.stored_bytes,
    )


def _other_tokens(facts: Sequence[Facts]) -> str:
    others = [one.label for one in facts if one.tokenizer != facts[0].tokenizer]
    return (
        f"Perplexity is per token, and {', '.join(others)} cut{'s' if len(others) == 1 else ''} the text into other "
        f"tokens than {facts[0].label}: perplexities do not compare there, bits per byte do."
    )


def _chains(facts: Sequence[Facts], lineages: Sequence[Sequence[LineageStep]]) -> tuple[TableNote, ...]:
    """How each model was made; nothing where no record says so."""
    if not any(lineages):
        return ()
    steps = [" → ".join(f"{step.verb} {step.method}" for step in lineage) or "as it came" for lineage in lineages]
    rows = tuple((one.label, made, one.path) for one, made in zip(facts, steps, strict=True))
    return (TableNote(title="How each model was made", columns=("model", "steps", "directory"), rows=rows),)


@runtime_checkable
class _Dense(Protocol):
    """A packed module that can give its weight back in floating point."""

    def dense(self) -> Tensor:
        """The dequantized weight."""
        ...


def dense_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Every tensor under the name and in the form it has in a dense model: packed weights are dequantized.

    Packed modules without a dense form keep their tensors as they lie on disk.
    """
    unpacked = {name: module for name, module in model.named_modules() if _has_dense_form(module)}
    for name, module in unpacked.items():
        assert isinstance(module, _Dense)
        yield f"{name}.weight", module.dense().detach()
        if isinstance(module, LinearLike) and module.bias is not None:
            yield f"{name}.bias", module.bias.detach()
    for name, tensor in model.state_dict().items():
        if not any(name.startswith(f"{inside}.") for inside in unpacked):
            yield name, tensor


def _has_dense_form(module: nn.Module) -> bool:
    return isinstance(module, Packed) and isinstance(module, _Dense)


def difference(reference: Mapping[str, Tensor], model: nn.Module) -> dict[str, Any]:
    """How many tensors differ from the reference's, and the five with the largest relative change.

    Args:
        reference: the first model's `dense_tensors`.
        model: the other one.

    Returns:
        `tensors` of the model; `changed_tensors` of those that both have in one shape; `other_tensors` that one of
        them lacks or has in another shape; `change_bytes` that the changes take; `most_changed` as text.
    """
    sizes: dict[str, float] = {}
    names: set[str] = set()
    num_common = change_bytes = 0
    for name, tensor in dense_tensors(model):
        names.add(name)
        before = reference.get(name)
        if before is None or before.shape != tensor.shape:
            continue
        num_common += 1
        if not before.is_floating_point() and before.ndim == 0:
            continue  # of batches that were seen: no weight
        change = Change.of(tensor.float() - before.float())
        if change.values.any():
            norm = float(before.float().norm())
            sizes[name] = float(change.values.norm()) / norm if norm else 0.0
            change_bytes += change.bytes
    most = sorted(sizes, key=lambda name: sizes[name], reverse=True)[:5]
    return {
        "tensors": len(names),
        "changed_tensors": len(sizes),
        "other_tensors": len(names | reference.keys()) - num_common,
        "change_bytes": change_bytes,
        # What was zero has no relative change, and is named last.
        "most_changed": [f"{name} ({f'{sizes[name]:.2g}' if sizes[name] else 'zero before'})" for name in most],
    }
