"""One recipe under many settings, each run on a small model and ranked by what its last step measures.

The surrogate tuning of Llama-3-SynE (Chen et al., 2024, arXiv:2407.18743): mixtures and curricula were tried on a model
of 1.1 billion parameters, and the best of them was moved to one of 8 billion.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import math
import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from overhaul import artifact as artifacts
from overhaul import disk, machine, pretrained
from overhaul import recipe as recipes
from overhaul.errors import UserError
from overhaul.execute import directory_of, measured_by, run_recipe
from overhaul.judge import read_facts
from overhaul.progress import say
from overhaul.recipe import Recipe
from overhaul.report.facts import LOSS, LOSS_ON, PERPLEXITY, Facts
from overhaul.report.html import html_measured
from overhaul.score import Score
from overhaul.sharding import num_processes
from overhaul.table import Curve, Row, Table

FILE, PAGE, VERSION = "sweep.json", "sweep.html", 1
_ELSEWHERE = {
    "model": "--model MODEL", "out": "-o OUT", "resume": "--resume", "dry_run": "--dry-run", "track": "no tracker",
}  # fmt: skip
"""What is no setting of a sweep, and what to type for it."""
_EXAMPLE = "steps.1.lr=1e-4,3e-4,1e-3"


@dataclass(frozen=True, slots=True)
class Setting:
    """One combination.

    Attributes:
        number: counted from 1, in the order of the grid; its runs are in a directory called so.
        values: by field, as a recipe reads them.
        overrides: `FIELD=VALUE` as typed.
    """

    number: int
    values: Mapping[str, Any]
    overrides: tuple[str, ...]

    @property
    def label(self) -> str:
        """How tables call it."""
        return f"{self.number:02d} {' '.join(self.overrides)}"


@dataclass(slots=True)
class Tried:
    """What became of a setting.

    Attributes:
        setting: the combination.
        path: the last step's directory; empty where there is none.
        metrics: of the last step's model, by name.
        judged: for each metric, a hash of the text that it was measured on.
        seconds: of the last step.
        reason: why there are no metrics.
    """

    setting: Setting
    path: str = ""
    metrics: dict[str, Row] = field(default_factory=dict)
    judged: dict[str, str] = field(default_factory=dict)
    seconds: float | None = None
    reason: str = ""

    def to_json(self) -> dict[str, Any]:
        """As it stands in `sweep.json`."""
        return dataclasses.asdict(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class Swept:
    """A sweep so far.

    Attributes:
        asked: recipe, and what has to be the same where it is resumed: its hash, model, hash of the model's weights,
            fields with their values.
        by: what is ranked by.
        tried: in the order of the grid.
        before: metrics of the model that all began with.
    """

    asked: Mapping[str, Any]
    by: Score
    tried: tuple[Tried, ...]
    before: Mapping[str, Row]

    @property
    def ranked(self) -> tuple[tuple[float, Tried], ...]:
        """Score and setting, the best first; without those that have no finite score."""
        scored = [(self.by.value(one.metrics), one) for one in self.tried]
        finite = [(score, one) for score, one in scored if score is not None and math.isfinite(score)]
        return tuple(sorted(finite, key=lambda pair: pair[0]))

    @property
    def failed(self) -> tuple[tuple[str, Tried], ...]:
        """Reason and setting of the others."""
        ranked = {one.setting.number for _, one in self.ranked}
        reason = f"{self.by.text} was not measured, or is not finite"
        return tuple((one.reason or reason, one) for one in self.tried if one.setting.number not in ranked)

    @property
    def command(self) -> str:
        """What runs the best setting on the recipe's own model; empty where there is none, or it is doubtful."""
        if not self.ranked or self.notes:
            return ""
        return shlex.join(["overhaul", "run", str(self.asked["recipe"]), *self.ranked[0][1].setting.overrides])

    @property
    def notes(self) -> tuple[str, ...]:
        """What makes a ranking doubtful."""
        texts = {m: {one.judged[m] for _, one in self.ranked if m in one.judged} for m in self.by.metrics}
        return tuple(
            f"{metric} was not measured on the same tokens in all settings: they cannot be ranked by it"
            for metric, hashes in texts.items()
            if len(hashes) > 1
        )

    def to_json(self) -> dict[str, Any]:
        """Everything, with what follows from it."""
        ranked = [{"number": one.setting.number, "score": score} for score, one in self.ranked]
        return {
            "version": VERSION,
            **self.asked,
            "by": self.by.text,
            "before": {name: dataclasses.asdict(row) for name, row in self.before.items()},
            "runs": [one.to_json() for one in self.tried],
            "ranked": ranked,
            "failed": [{"number": one.setting.number, "reason": reason} for reason, one in self.failed],
            "notes": list(self.notes),
            "command": self.command,
        }


def grid(fields: Sequence[str]) -> list[Setting]:
    """Every combination of the values; those of the last field change fastest.

    Args:
        fields: `path.to.field=V1,V2,...` each; a list in brackets is one value.

    Raises:
        UserError: there is no field, or one without values, given twice, with a value twice, or none of a sweep's.
    """
    if not fields:
        raise UserError("a sweep needs a field and its values", hint=_EXAMPLE)
    choices: dict[str, list[str]] = {}
    for text in fields:
        target, equals, values = text.partition("=")
        if target in _ELSEWHERE:
            raise UserError(f"{text!r}: {target} is no setting to be swept", hint=_ELSEWHERE[target])
        if target in choices:
            raise UserError(f"{target} is given twice", hint=f"{target}={','.join(choices[target])},{values}")
        choices[target] = recipes.values(values)
        if not equals or not all(choices[target]):
            raise UserError(f"{text!r} has no values, or an empty one", allowed="FIELD=V1,V2,...", hint=_EXAMPLE)
        if len({json.dumps(recipes.value(value)) for value in choices[target]}) < len(choices[target]):
            raise UserError(f"{text!r} has a value twice", hint="each value once; seed=0,1,2 repeats a setting")
    overrides = ([f"{target}={value}" for value in values] for target, values in choices.items())
    return [
        Setting(
            number, {target: recipes.value(value) for target, _, value in (o.partition("=") for o in chosen)}, chosen
        )
        for number, chosen in enumerate(itertools.product(*overrides), 1)
    ]


def sweep(
    path: Path,
    fields: Sequence[str],
    out: Path,
    *,
    model: str | None = None,
    by: str = PERPLEXITY,
    resume: bool = False,
    dry_run: bool = False,
    command: str = "",
) -> Swept | None:
    """Runs a recipe once for each combination of values and ranks the settings.

    Args:
        path: the recipe.
        fields: as in `grid`.
        out: new directory: a directory for each setting, `sweep.json`, `sweep.html`.
        model: what all are run on; None is the recipe's own.
        by: what is ranked by, as in `Score.of`.
        resume: keep the settings that are finished, and try the others again.
        dry_run: only say what would be run.
        command: what was typed, for the records.

    Returns:
        What was found; None after a dry run. A setting that is refused, diverges or is refused memory has its reason
        there; a system that ends the whole process for want of memory leaves the sweep to `resume`.

    Raises:
        UserError: no setting can be run, none measures `by`, or `out` holds anything but this sweep to be resumed;
            nothing was written.
        Interrupted: Ctrl-C; what was finished is kept for `resume`.
    """
    if num_processes() > 1:
        raise UserError("a sweep runs on one process", hint="overhaul sweep without accelerate launch")
    score, settings = Score.of(by), grid(fields)
    switches = [f"{name}=true" for name, on in (("resume", resume), ("dry_run", dry_run)) if on]
    plans = _plans(path, settings, out, model, switches)
    _refuse_unmeasured(score, [plan for plan in plans if isinstance(plan, Recipe)])
    first = next(plan for plan in plans if isinstance(plan, Recipe))
    _refuse_two_names(first, list(settings[0].values))
    surrogate = pretrained.resolve(first.model)
    # As typed: 1e-3 and 0.001 are one value, and either may stand in the command.
    asked = {
        "recipe": str(path),
        "recipe_sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        "model": first.model,
        "model_sha256": artifacts.weights_sha256(surrogate),
        "fields": [list(setting.overrides) for setting in settings],
    }
    begun = resume and (out / FILE).is_file()
    if not begun:
        artifacts.check_out(out, parent=surrogate)
    if dry_run:
        return _say_plan(settings, plans, first)
    kept = _kept(out, asked) if begun else {}
    tried = [kept.get(setting.number, Tried(setting, reason="not yet run")) for setting in settings]
    before: dict[str, Row] = {}
    swept = Swept(asked=asked, by=score, tried=tuple(tried), before=before)
    if not begun:  # from here on the directory is this sweep's
        _write(swept, out, command)
    for place, (setting, plan) in enumerate(zip(settings, plans, strict=True)):
        if setting.number in kept:
            say(f"{setting.label} is finished")
        else:
            say(f"setting {setting.number} of {len(settings)}: {' '.join(setting.overrides)}")
            tried[place] = _try(setting, plan, command)
        before = before or _before(tried[place], plan)
        swept = Swept(asked=asked, by=score, tried=tuple(tried), before=before)
        _write(swept, out, command)
    return swept


def _plans(
    path: Path, settings: Sequence[Setting], out: Path, model: str | None, switches: Sequence[str]
) -> list[Recipe | UserError]:
    """The recipe of each setting, or why there is none; raises the first reason where there is none at all."""
    plans: list[Recipe | UserError] = []
    for setting in settings:
        try:
            plan = recipes.read(path, [*setting.overrides, *switches])
            plans.append(dataclasses.replace(plan, model=model or plan.model, out=out / f"{setting.number:02d}"))
        except UserError as error:
            plans.append(error)
    errors = [plan for plan in plans if isinstance(plan, UserError)]
    if len(errors) == len(plans):
        raise errors[0]
    return plans


def _refuse_two_names(plan: Recipe, targets: Sequence[str]) -> None:
    """Raises `UserError` where a field is given twice, as by its step's number and by its step's method."""
    called: dict[str, str] = {}
    for target in targets:
        other = called.setdefault(recipes.field_called(plan, target), target)
        if other != target:
            raise UserError(f"{other} and {target} are one field", hint="all its values behind one of the names")


def _refuse_unmeasured(score: Score, plans: Iterable[Recipe]) -> None:
    """Raises `UserError` where no plan's last step measures all that is ranked by."""
    found: dict[str, None] = {}
    for plan in plans:
        try:
            measured = measured_by(plan.steps[-1], plan.model)
        except UserError:  # that setting will be a row with its reason
            continue
        if set(score.metrics) <= set(measured):
            return
        found |= dict.fromkeys(measured)
    if found:
        missing = next((metric for metric in score.metrics if metric not in found), score.text)
        raise UserError(
            f"--by: no last step measures {missing!r}",
            allowed=", ".join(found),
            hint="" if missing == PERPLEXITY else f"watch: [CORPUS] in the recipe measures {LOSS_ON} CORPUS",
        )


def _say_plan(settings: Sequence[Setting], plans: Sequence[Recipe | UserError], first: Recipe) -> None:
    """Lists the settings, and says what the first of them would do."""
    for setting, plan in zip(settings, plans, strict=True):
        refused = f"   refused: {plan}" if isinstance(plan, UserError) else ""
        say(f"{setting.label}{refused}")
    say(f"{len(settings)} settings on {first.model}; the first of them:")
    run_recipe(first)


def _try(setting: Setting, plan: Recipe | UserError, command: str) -> Tried:
    """Runs one setting."""
    if isinstance(plan, UserError):
        return Tried(setting, reason=str(plan))
    try:
        run_recipe(plan, command=command)
    except UserError as error:
        say(f"{setting.label}: {error}")
        return Tried(setting, reason=str(error))
    except (RuntimeError, MemoryError) as error:
        if not _is_out_of_memory(error):
            raise
        told, *_ = str(error).splitlines() or ["Python's"]
        say(f"{setting.label}: out of memory")
        return Tried(setting, reason=f"out of memory: {told}")
    last = directory_of(plan, len(plan.steps))
    record = artifacts.read_record(last)
    facts = read_facts(record["facts"][-1])
    metrics = _metrics(facts)
    judged = {name: _judged_on(name, facts, record["facts_key"]) for name in metrics}
    return Tried(setting, str(last), metrics, judged, facts.seconds)


def _is_out_of_memory(error: Exception) -> bool:
    """Whether an accelerator, the CPU or Python had no memory left; torch has no class of its own for the CPU's."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error)


def _metrics(facts: Facts) -> dict[str, Row]:
    """Those that are finite; the held-out loss, in nats a token, beside the perplexity."""
    found = [*facts.metrics]
    if facts.perplexity:
        logs = {part: math.log(getattr(facts.perplexity, part)) for part in ("value", "low", "high")}
        found = [facts.perplexity, dataclasses.replace(facts.perplexity, metric=LOSS, **logs), *found]
    return {row.metric: row for row in found if math.isfinite(row.value) and math.isfinite(row.high)}


def _judged_on(metric: str, facts: Facts, key: str) -> str:
    """What tells the windows of a metric from others: the hash in the facts' key, or that of the held-out tokens."""
    name = metric.removeprefix(LOSS_ON).strip()
    found = re.search(rf"/{re.escape(name)}:([0-9a-f]+:\([0-9, ]*\))", key) if metric.startswith(LOSS_ON) else None
    return found[1] if found else facts.tokenizer


def _before(one: Tried, plan: Recipe | UserError) -> dict[str, Row]:
    """Metrics of the model that a finished setting began with, of those measured on the text of its last step."""
    if not one.path or isinstance(plan, UserError) or not (directory_of(plan, 1) / artifacts.RECORD).is_file():
        return {}
    record = artifacts.read_record(directory_of(plan, 1))
    facts = read_facts(record["facts"][-2])  # the first are what the surrogate was made from
    same = {name for name, judged in one.judged.items() if judged == _judged_on(name, facts, record["facts_key"])}
    return {name: row for name, row in _metrics(facts).items() if name in same}


def _kept(out: Path, asked: Mapping[str, Any]) -> dict[int, Tried]:
    """The finished settings of the sweep in a directory, by number.

    Raises:
        UserError: it is another sweep, or its file is damaged.
    """
    try:
        return _finished(json.loads((out / FILE).read_text()), out, asked)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{out / FILE} is damaged, so that its sweep cannot be resumed", hint="another -o") from error


def _finished(told: Any, out: Path, asked: Mapping[str, Any]) -> dict[int, Tried]:
    """What `_kept` finds in the contents of `sweep.json`."""
    # A recipe that was moved is the same one.
    compared = {name: value for name, value in {"version": VERSION, **asked}.items() if name != "recipe"}
    other = [name for name, value in compared.items() if told.get(name) != value]
    if other:
        raise UserError(
            f"{out} holds another sweep: its {', '.join(other)} is not what was asked for now",
            hint="another -o, or the command as it was, with --resume",
        )
    kept = {}
    for run in told["runs"]:
        if run["path"] and (Path(run["path"]) / artifacts.RECORD).is_file():
            setting = Setting(run["setting"]["number"], run["setting"]["values"], tuple(run["setting"]["overrides"]))
            metrics = {name: Row(**row) for name, row in run["metrics"].items()}
            kept[setting.number] = Tried(setting, run["path"], metrics, run["judged"], run["seconds"])
    return kept


def _write(swept: Swept, out: Path, command: str) -> None:
    """`sweep.json` and the page, each aside and renamed."""
    device = machine.pick_device("auto")
    environment = {**machine.versions(), "hardware": machine.hardware(device)}
    date = machine.now()
    files = {FILE: json.dumps(swept.to_json() | {"typed": command, "date": date, "environment": environment}, indent=1)}
    if swept.ranked:
        title = f"sweep of {Path(swept.asked['recipe']).name}"
        files[PAGE] = html_measured(as_table(swept), title=title, command=command, environment=environment)
    with disk.refusals(out):
        out.mkdir(parents=True, exist_ok=True)
        for name, text in files.items():
            aside = out / f".{name}.partial"
            aside.write_text(text + "\n")
            aside.replace(out / name)


def as_table(swept: Swept) -> Table:
    """Scores and metrics of all that have one, the best first; a curve where one number was varied."""
    rows = []
    for score, one in swept.ranked:
        label = one.setting.label
        if swept.by.text not in one.metrics:
            rows.append(Row(model=label, metric=swept.by.text, value=score, low=score, high=score, count=1))
        first = {name: row for name, row in one.metrics.items() if name == swept.by.text}
        rows += [dataclasses.replace(row, model=label) for row in (first | one.metrics).values()]
    varied = [
        name for name in swept.tried[0].setting.values if len({repr(t.setting.values[name]) for t in swept.tried}) > 1
    ]
    shown = [(one.setting.values, swept.by.shown(one.metrics)) for _, one in swept.ranked]
    points = [(values[varied[0]], score) for values, score in shown if score is not None] if len(varied) == 1 else []
    curves = []
    if len(points) > 1 and all(isinstance(x, int | float) for x, _ in points):
        x, y = zip(*sorted(points), strict=True)
        curves.append(Curve(name="score", x=tuple(map(float, x)), y=y, x_label=varied[0], y_label=swept.by.text))
    notes = (
        *([f"to run the best setting on the recipe's own model: {swept.command}"] if swept.command else []),
        *swept.notes,
        *(f"{one.setting.label}: {reason}" for reason, one in swept.failed),
    )
    return Table(tuple(rows), curves=tuple(curves), notes=notes)


def lines(swept: Swept) -> list[str]:
    """The ranking as aligned text, what failed and why, and the command that runs the best setting."""
    metrics = list(dict.fromkeys(name for _, one in swept.ranked for name in one.metrics if name != swept.by.text))
    content = [["", swept.by.text, *metrics, "seconds"]]
    if swept.before and not swept.notes:
        start = swept.by.shown(swept.before)
        content.append(["before", _number(start), *(_value(swept.before.get(name)) for name in metrics), ""])
    for _, one in swept.ranked:
        seconds = "" if one.seconds is None else f"{one.seconds:.1f}"
        shown = _number(swept.by.shown(one.metrics))
        content.append([one.setting.label, shown, *(_value(one.metrics.get(m)) for m in metrics), seconds])
    widths = [max(map(len, column)) for column in zip(*content, strict=True)]
    told = [
        "  ".join(
            cell.rjust(width) if at else cell.ljust(width)
            for at, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in content
    ]
    told = [line.rstrip() for line in told]
    told += [f"{one.setting.label}: {' '.join(reason.split())}" for reason, one in swept.failed]
    told += [f"note: {note}" for note in swept.notes]
    if swept.command:
        told += ["", "the best setting on the recipe's own model:", f"  {swept.command}"]
    return told


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def _value(row: Row | None) -> str:
    return _number(row.value if row else None)
