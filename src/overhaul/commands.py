"""The commands that are no methods: run, sweep, compare, learn report, bundle, show, generate, list and others.

Those about text stand in `data_commands`.
"""

from __future__ import annotations

import dataclasses
import shlex
import sys
from dataclasses import dataclass
from inspect import cleandoc
from pathlib import Path
from typing import Annotated

import tyro

from overhaul import blank, catalog
from overhaul.errors import UserError
from overhaul.terminal import check_page, checked, flags, parse, print_json, quiet_libraries, show_outcome, typed

Flag = tyro.conf.FlagCreatePairsOff
_SHAPES = "; ".join(f"{name}: {shape.what}" for name, shape in blank.SHAPES.items())


def run_command(arguments: list[str]) -> None:
    """`overhaul run RECIPE [path.to.field=value ...]`."""

    @dataclass
    class Run:
        recipe: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(help="YAML file.", metavar="RECIPE")]
        overrides: Annotated[
            tuple[str, ...],
            tyro.conf.Positional,
            tyro.conf.arg(help="Such as steps.perp.steps=200 or out=DIR.", metavar="FIELD=VALUE"),
        ] = ()
        resume: Annotated[Flag[bool], tyro.conf.arg(help="Keep finished steps and go on.")] = False
        dry_run: Annotated[Flag[bool], tyro.conf.arg(help="Say what would be done.")] = False

    given = parse(
        Run,
        arguments,
        prog="overhaul run",
        description="Run the steps of a recipe, each on the output of the one before.",
    )
    from overhaul import recipe

    switches = [f"{name}=true" for name in ("resume", "dry_run") if getattr(given, name)]
    plan = recipe.read(given.recipe, [*given.overrides, *switches])
    quiet_libraries()
    from overhaul.execute import run_recipe

    outcome = run_recipe(plan, command=typed())
    if outcome:
        show_outcome(outcome)


def sweep_command(arguments: list[str]) -> None:
    """`overhaul sweep RECIPE FIELD=V1,V2 ... -o OUT`."""

    @dataclass
    class Sweep:
        recipe: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(help="YAML file.", metavar="RECIPE")]
        out: Annotated[
            Path, tyro.conf.arg(aliases=["-o"], help="New directory: one for each setting, and the ranking.")
        ]
        fields: Annotated[
            tuple[str, ...],
            tyro.conf.Positional,
            tyro.conf.arg(help="Such as steps.1.lr=1e-4,3e-4; all combinations are run.", metavar="FIELD=V1,V2"),
        ] = ()
        model: Annotated[
            str | None, tyro.conf.arg(help="Smaller model that the settings are tried on; default the recipe's own.")
        ] = None
        by: Annotated[
            str,
            tyro.conf.arg(
                help="What is ranked by: perplexity, loss, 'loss on NAME', '0.5*loss + 0.5*loss on NAME', or of tasks "
                "'accuracy, class-IL', of which more is better."
            ),
        ] = "perplexity"
        resume: Annotated[Flag[bool], tyro.conf.arg(help="Keep finished settings and go on.")] = False
        dry_run: Annotated[Flag[bool], tyro.conf.arg(help="Say what would be run.")] = False
        json: Annotated[Flag[bool], tyro.conf.arg(help="One JSON object on stdout.")] = False

    about = "Run a recipe under every combination of values, on a smaller model, and rank the settings."
    given = parse(Sweep, arguments, prog="overhaul sweep", description=about)
    quiet_libraries()
    from overhaul.sweep import lines, sweep

    how = {name: getattr(given, name) for name in ("model", "by", "resume", "dry_run")}
    swept = sweep(given.recipe, given.fields, given.out, **how, command=typed())
    if swept and given.json:
        print_json(swept.to_json())
    elif swept:
        print("\n".join(lines(swept)))
    if swept and not swept.ranked:
        raise UserError(f"none of the {len(swept.tried)} settings has a score", hint=f"the reasons in {given.out}")


def show_command(arguments: list[str]) -> None:
    """`overhaul show DIR [--seen CORPUS] [--json]`."""

    @dataclass
    class Show:
        model: Annotated[str, tyro.conf.Positional, tyro.conf.arg(help="Model directory.", metavar="DIR")]
        seen: Annotated[str | None, tyro.conf.arg(help="Texts: which of them the model was trained on.")] = None
        json: Annotated[Flag[bool], tyro.conf.arg(help="One JSON object on stdout.")] = False

    given = parse(Show, arguments, prog="overhaul show", description="Facts and lineage of a model directory.")
    from overhaul.inspect import describe, seen

    asked = seen(given.model, given.seen) if given.seen else None
    facts = describe(given.model)
    if asked:
        facts["seen"] = asked
    if given.json:
        print_json(facts)
        return
    print(f"{given.model}: {facts['parameters']:,} parameters, {facts['nonzero_share']:.1%} non-zero, "
          f"{facts['bytes'] / 1e6:.1f} MB, {facts['dtype']}")  # fmt: skip
    print(
        "weights are those of the record"
        if facts["verified"]
        else "no record, or the weights were changed since it was written"
    )
    if tasks := facts["banks"]:
        print(f"banks of {len(tasks)} task{'s' if len(tasks) > 1 else ''}: {'; '.join(tasks)}")
    for number, step in enumerate(facts["lineage"], 1):
        chosen = " ".join(f"{name}={step['fields'][name]}" for name in step["non_default"])
        cost = f"{step['seconds']:.1f} s, {step['peak_rss_bytes'] / 1e6:.0f} MB at most"
        print(
            f"{number}. {step['verb']} {step['method']} {chosen}\n   of {step['parent']}, {cost}, seed {step['seed']}"
        )
    for read in facts["ledger"]:
        step = f"step {read['step']}, {read['verb']} {read['method']}"
        print(f"{read['source']}: {read['documents']:,} documents were seen, {read['tokens']:,} tokens, in {step}")
    if asked:
        print(f"{given.seen}: {asked['told']}")
        print("".join(f"the ledger says nothing of {step}\n" for step in asked["untold"]), end="")


def compare_command(arguments: list[str]) -> None:
    """`overhaul compare DIR DIR ...`."""

    @dataclass
    class Compare:
        model: Annotated[
            tuple[str, ...],
            tyro.conf.Positional,
            tyro.conf.arg(help="Models, or folders of models; the first is the reference.", metavar="DIR"),
        ]
        evaluate: Annotated[str, tyro.conf.arg(name="data", help="Corpus whose held-out part is scored.")] = "sample"
        evaluate_windows: Annotated[int, tyro.conf.arg(name="windows", help="Held-out windows scored.")] = 16
        evaluate_seq_len: Annotated[int, tyro.conf.arg(name="seq-len", help="Tokens per window.")] = 512
        task: Annotated[
            str | None, tyro.conf.arg(help="Corpus the models were adapted to: gain, forgetting and costs as well.")
        ] = None
        spectra: Annotated[Flag[bool], tyro.conf.arg(help="Also count singular directions that are new.")] = False
        html: Annotated[Path | None, tyro.conf.arg(help="Write the report to this file.")] = None
        json: Annotated[Flag[bool], tyro.conf.arg(help="One JSON object on stdout.")] = False

    about = "Compare models: on one held-out text, or by the tasks that they learnt."
    given = parse(Compare, arguments, prog="overhaul compare", description=about)
    check_page(given.html)
    quiet_libraries()
    from overhaul.compare import compare, models_of
    from overhaul.learn_report import to_json
    from overhaul.options import Options
    from overhaul.report.html import html_report
    from overhaul.report.tables import json_rows, print_before_after
    from overhaul.report.tasks import lines

    options = checked(Options, given, where="compare")
    found = compare(models_of(given.model), options, task=given.task, spectra=given.spectra)
    facts, warnings = found.report.facts, found.report.warnings
    if given.html:
        given.html.write_text(html_report(found.report))
    if given.json:
        told = {"rows": json_rows(facts), "changes": found.changes, "warnings": warnings}
        told |= {"spectra": found.spectra} if given.spectra else {}
        print_json(told | ({"tasks": to_json(found.learnt)} if found.learnt else {}))
        return
    from rich.console import Console

    print_before_after(facts, Console(highlight=False), is_comparison=True)
    if found.learnt:
        print("", *lines(found.learnt), sep="\n")
    for warning in warnings:
        print(f"\nnote: {warning}")
    for change in found.changes:
        most = f"; most in {', '.join(change['most_changed'])}" if change["most_changed"] else ""
        others = f", {change['other_tensors']} have no counterpart" if change["other_tensors"] else ""
        print(f"\n{change['model']}: {change['changed_tensors']} of {change['tensors']} tensors differ from "
              f"{facts[0].path}{others}{most}")  # fmt: skip
    for one in found.spectra:
        rank = f"; stable rank of the change {one['stable rank']:.3g}" if one["stable rank"] else ""
        print(f"{one['model']}: {one['intruders']:g} intruders ({one['per 1,000']:.3g} per 1,000 vectors) "
              f"against {one['base']}{rank}")  # fmt: skip


def learn_report_command(arguments: list[str]) -> None:
    """`overhaul learn report DIR ... -o FILE`."""

    @dataclass
    class LearnReport:
        directories: Annotated[
            tuple[str, ...],
            tyro.conf.Positional,
            tyro.conf.arg(help="That learnt the same tasks; runs of several seeds are joined.", metavar="DIR"),
        ]
        out: Annotated[Path, tyro.conf.arg(aliases=["-o"], help="New HTML file.")] = Path("report.html")
        json: Annotated[Flag[bool], tyro.conf.arg(help="One JSON object on stdout.")] = False

    about = "Runs of tasks side by side: accuracies, what was forgotten by every definition, what each task took."
    given = parse(LearnReport, arguments, prog="overhaul learn report", description=about)
    check_page(given.out, flag="-o")
    from overhaul import learn_report, machine
    from overhaul.report.html import html_learnt
    from overhaul.report.tasks import lines

    methods = learn_report.report(given.directories)
    given.out.write_text(html_learnt(methods, command=typed(), environment=machine.versions()), "utf-8")
    if given.json:
        print_json(learn_report.to_json(methods))
        return
    print("\n".join(lines(methods)))
    print(f"\nwritten: {shlex.quote(str(given.out))}")


def learn_export_command(arguments: list[str]) -> None:
    """`overhaul learn export DIR --task NAME -o OUT`."""

    @dataclass
    class LearnExport:
        model: Annotated[str, tyro.conf.Positional, tyro.conf.arg(help="Model directory with banks.", metavar="DIR")]
        task: Annotated[str, tyro.conf.arg(help="Whose bank goes into the weights.")]
        out: Annotated[Path, tyro.conf.arg(aliases=["-o"], help="New directory.")]

    about = "One task of a model with banks as a model of its own, which plain transformers reads."
    given = parse(LearnExport, arguments, prog="overhaul learn export", description=about)
    quiet_libraries()
    from overhaul.learn_export import export

    classes = export(given.model, given.task, given.out, command=typed())
    told = ", ".join(classes[:5]) + (" and others" if len(classes) > 5 else "")
    known = f"{len(classes)} classes, {told}" if classes else "its bank is in the weights"
    print(f"{given.task}: {known}\n\nwritten: {shlex.quote(str(given.out))}")


def blank_command(arguments: list[str]) -> None:
    """`overhaul blank SHAPE -o DIR --images SET`."""

    @dataclass
    class Blank:
        shape: Annotated[str, tyro.conf.Positional, tyro.conf.arg(help=f"{_SHAPES}.", metavar="SHAPE")]
        out: Annotated[Path, tyro.conf.arg(aliases=["-o"], help="New directory.")]
        images: Annotated[str, tyro.conf.arg(help="Image set that it is for: size, channels, classes, brightness.")]
        seed: Annotated[int, tyro.conf.arg(help="Of the weights.")] = 0

    about = "An image classifier with random weights: what a first training begins with."
    given = parse(Blank, arguments, prog="overhaul blank", description=about)
    quiet_libraries()
    from overhaul.images import open_images

    count = blank.write(given.shape, open_images(given.images), given.out, seed=given.seed)
    out = shlex.quote(str(given.out))
    print(f"{given.shape}: {count:,} parameters\n\nwritten: {out}")
    print(f"  overhaul learn bregman {out} -o NEW --tasks {shlex.quote(given.images)}")


def bundle_command(arguments: list[str]) -> None:
    """`overhaul bundle ADAPTED -o BUNDLE --data D`, or `--from BUNDLE` for a bundle with another teacher."""
    from overhaul.adapt.bundling import Bundling
    from overhaul.options import Options

    read = ("data", "field", "seed", "dtype", "device")
    help_of = {"adapted": "Adapter directory, or a whole adapted model.", "out": "New directory for the bundle.",
               "from_": "Bundle to write once more with this teacher; needs no data.",
               "base": "With --from: where the model is now that the bundle stands on, if it was moved."}  # fmt: skip
    kind = dataclasses.make_dataclass(
        "Bundle",
        [
            (
                "adapted",
                Annotated[str, tyro.conf.Positional, tyro.conf.arg(help=help_of["adapted"], metavar="ADAPTED")],
            ),
            ("out", Annotated[Path, tyro.conf.arg(aliases=["-o"], help=help_of["out"])]),
            (
                "from_",
                Annotated[str | None, tyro.conf.arg(name="from", help=help_of["from_"])],
                dataclasses.field(default=None),
            ),
            ("base", Annotated[str | None, tyro.conf.arg(help=help_of["base"])], dataclasses.field(default=None)),
            *flags(Bundling),
            *flags(Options, without=[name for name in Options.model_fields if name not in read]),
        ],
        kw_only=True,
    )
    given = parse(kind, arguments, prog="overhaul bundle", description=cleandoc(Bundling.__doc__ or ""))
    settings, options = checked(Bundling, given, where="bundle"), checked(Options, given, where="bundle")
    quiet_libraries()
    from overhaul.bundle import Bundle, pointed

    out = shlex.quote(str(given.out))
    if given.from_:
        unread = [f"--{name.replace('_', '-')}" for made in (settings, options)
                  for name in made.model_dump(exclude_defaults=True)]  # fmt: skip
        if unread:
            raise UserError(
                "--from takes everything but the teacher from a bundle", hint=f"without {', '.join(unread)}"
            )
        pointed(Bundle.read(given.from_), given.adapted, given.out, base=given.base)
    elif given.base:
        raise UserError("--base is where the model of a bundle is now", hint="with --from BUNDLE")
    else:
        made = settings.make(given.adapted, given.out, options)
        for name, value in made.ledger.items():
            print(f"{name.replace('_', ' ')}: {value}")
    print(f"\nwritten: {out}\n  overhaul adapt translora OTHER-MODEL -o NEW --bundle {out}")


def generate_command(arguments: list[str]) -> None:
    """`overhaul generate MODEL --prompt TEXT`."""

    @dataclass
    class Generate:
        model: Annotated[str, tyro.conf.Positional, tyro.conf.arg(help="Model.", metavar="MODEL")]
        prompt: Annotated[str, tyro.conf.arg(help="Text to continue; - reads it from stdin.")]
        tokens: Annotated[int, tyro.conf.arg(help="Most tokens to write.")] = 64
        chat: Annotated[Flag[bool], tyro.conf.arg(help="Put the prompt into the model's chat template.")] = False
        seed: Annotated[int | None, tyro.conf.arg(help="Sample with this seed; default is greedy.")] = None
        json: Annotated[Flag[bool], tyro.conf.arg(help="One JSON object on stdout.")] = False

    given = parse(Generate, arguments, prog="overhaul generate", description="Let a model continue a text.")
    if given.tokens < 1:
        raise UserError(f"--tokens {given.tokens}: nothing would be written", allowed="a whole number from 1")
    quiet_libraries()
    from overhaul import artifact, banks, evaluate, machine, progress

    made = artifact.load(given.model, with_library=True)
    if given.chat and not made.processor.chat_template:
        raise UserError(f"{given.model} has no chat template", hint="without --chat")
    device = next(made.model.parameters()).device
    prompt = sys.stdin.read() if given.prompt == "-" else given.prompt
    if not prompt.strip():
        raise UserError("the prompt is empty", hint="--prompt 'The capital of France is'")
    with machine.autocast(device, machine.compute_dtype("auto", device)):
        text = evaluate.generate(
            made.model, made.processor, prompt, tokens=given.tokens, chat=given.chat, seed=given.seed
        )
    answered = banks.answered_by(made.model)
    if given.json:
        print_json({"model": given.model, "prompt": prompt, "text": text} | ({"task": answered[0]} if answered else {}))
        return
    if answered:
        progress.say(f"note: taken for a text of {answered[0]}")
    print(text if given.chat else prompt + text)


def list_command(arguments: list[str]) -> None:
    """`overhaul list [VERB] [--json]`."""

    @dataclass
    class List:
        verb: Annotated[str | None, tyro.conf.Positional, tyro.conf.arg(help="One verb only.", metavar="VERB")] = None
        json: Annotated[Flag[bool], tyro.conf.arg(help="One JSON object on stdout.")] = False

    given = parse(List, arguments, prog="overhaul list", description="The methods.")
    if given.verb not in (None, *catalog.VERBS):
        catalog.find(str(given.verb), "")
    entries = list(catalog.methods(given.verb))
    if given.json:
        print_json(
            {"methods": [{"verb": e.verb, "method": e.name, "summary": e.summary, "system": e.system} for e in entries]}
        )
        return
    for entry in entries:
        print(f"{entry.verb:8} {entry.name:14} {entry.summary}")


def schema_command(arguments: list[str]) -> None:
    """`overhaul schema`."""

    @dataclass
    class Schema:
        pass

    parse(Schema, arguments, prog="overhaul schema", description="The JSON schema of recipes, for editors.")
    from overhaul.recipe import schema

    print_json(schema())


def doctor_command(arguments: list[str]) -> None:
    """`overhaul doctor [--json]`."""

    @dataclass
    class Doctor:
        json: Annotated[Flag[bool], tyro.conf.arg(help="One JSON object on stdout.")] = False

    given = parse(Doctor, arguments, prog="overhaul doctor", description="Versions, hardware, caches.")
    from overhaul.inspect import doctor

    facts = doctor()
    if given.json:
        print_json(facts)
        return
    for name, value in facts.items():
        print(f"{name:20} {value}")
