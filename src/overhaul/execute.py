"""One step from a model directory to a new one: check, load, measure, change, measure, write."""

from __future__ import annotations

import importlib.util
import json
import os
import shlex
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from overhaul import artifact as artifacts
from overhaul import journal, machine, pretrained
from overhaul.artifact import Artifact
from overhaul.corpora import NO_CORPUS, Corpus, from_anywhere, open_several
from overhaul.data import Data
from overhaul.dry_run import say_plan
from overhaul.errors import Interrupted, UserError
from overhaul.fitting import refuse_two_networks, refuse_unfit
from overhaul.generation import longest
from overhaul.judge import Judge, without_text
from overhaul.lineage import DataUsed, LineageStep, Parent, flat_fields
from overhaul.method import Difference, Measure, Method, Pipeline, Training, Transform
from overhaul.options import PASSING_OPTIONS, Options
from overhaul.picture_rows import PictureCorpus
from overhaul.progress import say
from overhaul.recipe import Recipe, Step
from overhaul.report.facts import LOSS, LOSS_ON, PERPLEXITY, Facts
from overhaul.select import has_adapters
from overhaul.sharding import num_processes, wait_for_all
from overhaul.step_data import Given, as_seen, open_data, open_text, sequence_of
from overhaul.table import Table
from overhaul.task_data import TaskData
from overhaul.tasks import TaskSequence
from overhaul.text_task_data import TextTaskData
from overhaul.text_tasks import TextSequence
from overhaul.train import History, train
from overhaul.workspace import Workspace, finish
from overhaul.write import write_directory


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What a step made: the directory, and the facts of every model in its chain, the first one first."""

    path: Path
    facts: tuple[Facts, ...]


def run_step(step: Step, model: str, out: Path, *, command: str = "") -> Outcome | None:
    """Applies one method to a model and writes a new directory.

    Args:
        step: the method with its options.
        model: a named model, a directory or a hub name.
        out: the new directory; it must not exist, or be empty, or hold an unfinished run to be resumed.
        command: what was typed, for the record.

    Returns:
        The outcome; None after a dry run, and on all processes but the first of several.

    Raises:
        UserError: the input is wrong; nothing was written.
        Interrupted: Ctrl-C while training; a checkpoint was written.
    """
    path = pretrained.resolve(model)
    step = replace(step, method=step.method.at(path))
    options, method = step.options, step.method
    for read in (path, *map(pretrained.resolve, method.others())):
        artifacts.check_out(out, parent=read, resume=options.resume)
    device = machine.pick_device(options.device)
    dtype = machine.compute_dtype(options.dtype, device)
    needs_data = method.reads_data()
    others = _others(method)
    sequence = sequence_of(method, options)
    _refuse_unread(step)
    corpus = open_data(options, method, artifacts.kind_at(path)) if needs_data or options.data else None
    beside, watched = _further(method, options, corpus)
    whole = method.whole_corpora()
    for note in (note for text in (corpus, sequence, *beside.values(), *whole) if text for note in text.notes):
        say(f"note: {note}")
    parent = artifacts.load(model, device=device, dtype=machine.weights_dtype(dtype), kinds=method.kinds)
    refuse_unfit(method, parent)
    parent = method.opened(parent)
    # A pipeline sees what was given even where it reads none of it: private data in the wrong place is worth a word.
    sees_all = isinstance(method, Pipeline) or method.brings_text
    text = (corpus or NO_CORPUS) if sees_all else corpus if needs_data else None
    data = as_seen(method, parent, options, dtype, sequence=sequence, text=text, beside=beside)
    handed: Any = data  # each method gets what it reads: text, pictures, or tasks
    method.check(parent.model, handed)
    left = method.left_bytes(parent.model) if isinstance(method, Training) else 0
    artifacts.refuse_full_disk(
        out, left + 2 * method.networks * sum(p.numel() * parent.dtype.itemsize for p in parent.model.parameters())
    )
    if options.dry_run:
        say_plan(step, parent, data, out, longest=longest(parent.model), dtype=dtype)
        return None
    # What a pipeline has no use for is not read by the back door either: --evaluate can still name it.
    is_held_out = method.holds_out and not options.whole
    judged = None if (isinstance(method, Pipeline) and not needs_data) or not is_held_out else corpus
    assert not isinstance(judged, PictureCorpus), "a method that reads pictures holds none out"
    options = without_text(options, parent, learns_tasks=sequence is not None)
    judge = Judge.of(options, judged, parent.processor, dtype, (*beside.values(), *watched), whole)
    before = judge.chain(parent)
    changed, notes, history = _change(step, parent, others, data, dtype, out, judge, command)
    if not is_main_process():
        return None
    after = judge.after(
        changed, before, notes.layers, step.entry.verb, step.entry.name, answering=notes.answering_as_written
    )
    after = replace(after, metrics=(*after.metrics, *notes.metrics))
    facts = (*before, after)
    facts = write_directory(changed, out, facts=facts, history=history, judge=judge, notes=notes)
    return Outcome(path=out, facts=facts)


def _refuse_unread(step: Step) -> None:
    """`UserError` where training has no text, or where what is said of the text is of no use."""
    trains_on_data = isinstance(step.method, Training) and step.method.reads_data()
    if trains_on_data and step.options.data is None:
        raise UserError(
            f"{step.entry.verb} {step.entry.name} needs --data",
            allowed="a corpus name, a file or a directory",
            hint="--data sample, or overhaul data list",
        )
    if step.options.whole and not trains_on_data:
        raise UserError(f"--whole is of training on --data, and {step.entry.verb} {step.entry.name} does not")


def measured_by(step: Step, model: str) -> tuple[str, ...]:
    """The metrics of a step's result: the method's own, or held-out perplexity and loss, and losses on other text.

    Args:
        step: the method with its options.
        model: that it is applied to, or that such a one is made from.

    Raises:
        UserError: one of the corpora cannot be opened.
    """
    method, options = step.method, step.options
    reads = method.reads_data()
    kind = artifacts.kind_at(pretrained.resolve(model))
    beside, watched = _further(method, options, open_data(options, method, kind) if reads or options.data else None)
    names = (*method.whole_names(), *(text.name for text in (*beside.values(), *watched)))
    on_text = [] if options.evaluate == "none" or method.measures() else [PERPLEXITY, LOSS]
    return (*method.measures(), *on_text, *(f"{LOSS_ON} {name}" for name in names))


def _further(
    method: Method, options: Options, corpus: Corpus | PictureCorpus | None
) -> tuple[dict[str, Corpus], tuple[Corpus, ...]]:
    """The corpora that a method reads beside that of --data, and those that are only watched."""
    read = [corpus.name] if corpus else []
    beside = open_several(method.texts(), taken=read)
    own = [corpus] if isinstance(corpus, Corpus) and options.data in options.watch else []
    only = [path for path in options.watch if path not in beside and not (own and path == options.data)]
    watched = open_several(only, taken=[*read, *(one.name for one in beside.values())])
    return beside, (*own, *watched.values())


def _change(
    step: Step,
    parent: Artifact,
    others: tuple[Parent, ...],
    data: Given | None,
    dtype: torch.dtype,
    out: Path,
    judge: Judge,
    command: str,
) -> tuple[Artifact, journal.Notes, History | None]:
    """Runs the method; the time and memory it takes are its own, without loading and measuring."""
    options, method = step.options, step.method
    needs_data = method.reads_data()
    machine.seed_everything(options.seed)
    machine.reset_peak_rss()
    began = time.perf_counter()
    history = None
    with journal.recording() as notes:
        if isinstance(method, Transform):
            stream = None
            if method.needs_data and isinstance(data, Data):
                settings: Any = method
                most = min(longest(parent.model), settings.seq_len)
                stream = data.calibration(samples=settings.samples, seq_len=most, batch_size=4)
            with torch.no_grad():
                model = method.apply(parent.model, stream)
            tokens = stream.tokens() or 0 if stream else 0
        elif isinstance(method, Pipeline):
            assert isinstance(data, Data)
            work = Workspace(data=data, dtype=dtype, path=parent.path, weights_sha256=parent.weights_sha256)
            model = method.run(parent.model, work)
            tokens = notes.num_tokens
        else:
            assert isinstance(method, Training)
            assert data is not None
            model, history = _train(method, parent, others, data, dtype, out, options, judge)
            tokens = notes.num_tokens or history.tokens
    seen = {drawn.name: drawn.tokens for drawn in history.ledger} if history else {}
    lineage = LineageStep(
        verb=step.entry.verb,
        method=step.entry.name,
        fields=_fields(method, others),
        non_default=tuple(flat_fields(method.model_dump(mode="json", exclude_defaults=True))),
        parents=(Parent(path=_called(parent.name, parent.path), hash=parent.weights_sha256), *others),
        data=_data_used(data.corpus, seen.get(data.corpus.name, 0 if seen else tokens))
        if data and (needs_data or isinstance(data, TaskData | TextTaskData))
        else None,
        beside=tuple(_data_used(text, seen.get(text.name, 0)) for text in (data.beside.values() if data else ())),
        seed=options.seed,
        options=_recorded(options),
        # A resumed run counts what it had taken before it was stopped.
        seconds=round(max(time.perf_counter() - began, history.seconds if history else 0.0), 3),
        peak_rss_bytes=machine.peak_rss_bytes(),
        trainable_parameters=history.trainable_parameters if history else None,
        optimizer_bytes=history.optimizer_bytes if history else None,
        versions=machine.versions(),
        hardware=machine.hardware(next(model.parameters()).device),
        command=command,
        date=machine.now(),
    )
    return parent.changed(model, lineage), notes, history


def _train(
    method: Training,
    parent: Artifact,
    others: tuple[Parent, ...],
    data: Given,
    dtype: torch.dtype,
    out: Path,
    options: Options,
    judge: Judge,
) -> tuple[nn.Module, History]:
    """Runs the method's plans through the loop, one after the other, each with its finish."""
    processes = num_processes()
    method = data.steps_for(method, processes=processes)
    if method.checkpoint_activations:
        inner: Any = parent.model
        inner.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if method.in_parts() and processes > 1:
        raise UserError("a method that trains part after part runs on one process", hint="without accelerate launch")
    if options.track:
        _refuse_track(options.track, method)
    asked = {
        "model": parent.weights_sha256,
        "data": data.corpus.fingerprint,
        "beside": [text.fingerprint for text in data.beside.values()],
        "dtype": str(dtype),
        "processes": processes,
        "others": [other.hash for other in others],
        **flat_fields(method.model_dump(mode="json")),
    }
    histories, stored, changed = [], next(parent.model.parameters()).dtype, parent.model
    handed: Any = data
    for number, plan in enumerate(method.stages(changed, handed), 1):
        try:
            history = train(
                plan,
                method,
                seed=options.seed,
                dtype=dtype,
                state_dir=out / artifacts.STATE / (f"stage-{number:03d}" if method.in_stages() else ""),
                resume=options.resume,
                goes_on=method.in_stages(),
                asked=asked,
                # A part of a model predicts no tokens.
                evaluate=None if method.in_parts() else judge.probe,
                track=options.track,
                quiet=method.in_parts(),
            )
        except Interrupted as stopped:
            raise _resumable(stopped, method, out) from None
        made = finish(plan)
        changed = made if plan.model is changed else changed
        histories.append(history)
    if not has_adapters(changed):
        # What is measured from here on is what will be written.
        changed.to(stored)
    return changed, History.joined(histories, in_parts=method.in_parts())


def _resumable(stopped: Interrupted, method: Training, out: Path) -> Interrupted:
    """What to tell after Ctrl-C."""
    if not method.save_every and not (out / artifacts.STATE).exists():
        return Interrupted(f"{stopped}; nothing of this step was written")
    words = [*(word for word in sys.argv[1:] if word != "--resume"), "--resume"]
    launch = ["accelerate", "launch", "...", "-m"] if "WORLD_SIZE" in os.environ else []
    typed = shlex.join([*launch, "overhaul", *words])
    return Interrupted(f"{stopped}; a checkpoint is in {out / artifacts.STATE}. Go on with:\n  {typed}")


def _called(name: str, path: Path) -> str:
    """A directory by its absolute path, others by their name, so that the record can be replayed from anywhere."""
    is_directory = name not in pretrained.NAMED and Path(name).expanduser().is_dir()
    return str(path.resolve()) if is_directory else name


def _others(method: Method) -> tuple[Parent, ...]:
    """The models that the method reads beside the one it changes, each with the hash of its weights.

    Raises:
        UserError: there is no such model.
    """
    named = [(name, pretrained.resolve(name)) for name in method.others()]
    return tuple(Parent(path=_called(name, path), hash=artifacts.weights_sha256(path)) for name, path in named)


def _recorded(options: Options) -> dict[str, Any]:
    """What the record keeps of the options: files by their absolute path."""
    kept = options.model_dump(mode="json", exclude_defaults=True, exclude=PASSING_OPTIONS)
    kept |= {name: from_anywhere(kept[name]) for name in ("data", "evaluate") if name in kept}
    return kept | ({"watch": [from_anywhere(path) for path in kept["watch"]]} if "watch" in kept else {})


def _fields(method: Method, others: tuple[Parent, ...]) -> dict[str, Any]:
    """Every setting by its dotted name; other models and corpora as the record calls them."""
    called = dict(zip(method.others(), (other.path for other in others), strict=True))
    called |= {path: from_anywhere(path) for path in (*method.texts(), *method.references())}
    fields = flat_fields(method.model_dump(mode="json"))
    return {name: _with_names(value, called) for name, value in fields.items()}


def _with_names(value: Any, called: Mapping[str, str]) -> Any:
    """A setting with models and corpora as the record calls them: alone, in a list, or with a share behind `=`."""
    if isinstance(value, list | tuple):
        return [_with_names(one, called) for one in value]
    if not isinstance(value, str):
        return value
    name, sign, share = value.rpartition("=")
    return called.get(value) or f"{called.get(name, name)}{sign}{share}"


def _refuse_track(tracker: str, method: Training) -> None:
    """Raises `UserError` for a tracker that is not installed, or has nothing to follow."""
    if importlib.util.find_spec(tracker) is None:
        raise UserError(f"--track {tracker}: the package is not installed", hint=f"pip install {tracker}")
    if method.in_stages():
        raise UserError(
            "--track follows one training; this one is several, one after the other",
            hint="metrics.jsonl has every point",
        )


def _data_used(corpus: Corpus | PictureCorpus | TaskSequence | TextSequence, tokens: int) -> DataUsed:
    unit = corpus.unit if isinstance(corpus, TaskSequence | PictureCorpus) else "tokens"
    return DataUsed(name=corpus.name, fingerprint=corpus.fingerprint, tokens=tokens, licence=corpus.licence, unit=unit)


def run_recipe(plan: Recipe, *, command: str = "", told: Callable[[Outcome], None] = lambda _: None) -> Outcome | None:
    """Runs every step of a recipe; step N goes to `out/NN-verb-method`, and what was finished before is kept.

    Args:
        plan: the recipe.
        command: what was typed, for the record.
        told: called with the outcome of each step.
    """
    model, outcome = plan.model, None
    if not plan.options.resume:
        artifacts.check_out(plan.out)
    for number, step in enumerate(plan.steps, 1):
        out = directory_of(plan, number)
        if plan.options.resume and (out / artifacts.RECORD).is_file():
            _refuse_other_step(out, step, model)
            say(f"{out} is finished")
        else:
            say(f"step {number} of {len(plan.steps)}: {step.entry.verb} {step.entry.name}")
            outcome = run_step(step, model, out, command=command)
            if outcome is None and step.options.dry_run:
                say("the steps after it depend on its output")
                return None
            if outcome:
                told(outcome)
        wait_for_all(machine.pick_device(step.options.device))
        model = str(out)
    return outcome


def directory_of(plan: Recipe, number: int) -> Path:
    """Where step `number` of a recipe, counted from 1, is written."""
    entry = plan.steps[number - 1].entry
    return plan.out / f"{number:02d}-{entry.verb}-{entry.name}"


def _refuse_other_step(out: Path, step: Step, model: str) -> None:
    """A finished directory is kept by --resume only if it is what the recipe would make."""
    last = artifacts.read_record(out)["lineage"][-1]
    path = pretrained.resolve(model)
    method = step.method.at(path)
    others = _others(method)
    parents = [artifacts.weights_sha256(path), *(other.hash for other in others)]
    fields, options = _fields(method, others), _recorded(step.options)
    asked = (step.entry.verb, step.entry.name, fields, step.options.seed, options, parents)
    hashes = [parent["hash"] for parent in last["parents"]]
    made = *(last[key] for key in ("verb", "method", "fields", "seed", "options")), hashes
    if list(made) != json.loads(json.dumps(asked)):
        raise UserError(
            f"{out} was made with other settings than the recipe has now",
            hint="another out, or without --resume",
        )


def measure(method: Measure, models: Sequence[str], options: Options) -> Table:
    """Runs a measure on several models, one in memory at a time; of differences, the first model is the base.

    Raises:
        UserError: a model cannot be read, or there is no other one than the base.
    """
    if isinstance(method, Difference):
        if len(models) < 2:
            raise UserError(f"{models[0]} alone has no difference", hint="the base first, then what was made of it")
        return sum((method.between(models[0], tuned) for tuned in models[1:]), Table(()))
    device = machine.pick_device(options.device)
    dtype = machine.compute_dtype(options.dtype, device)
    corpus = open_text(options) if method.needs_corpus else NO_CORPUS
    table = Table(())
    for name in models:
        how: dict[str, Any] = {"device": device, "dtype": machine.weights_dtype(dtype), "kinds": method.kinds}
        made = artifacts.load(name, **how, with_library=True)
        refuse_two_networks(method, made)
        table += method.measure(made.model, Data(corpus, made.processor, options.seed, name, dtype))
    return table


def is_main_process() -> bool:
    """Whether this is the only process, or the first of several."""
    return int(os.environ.get("RANK", "0")) == 0
