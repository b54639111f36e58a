"""The command line: verb + method + model -> one call on one class.

Nothing here imports torch before a command needs it, so that help is instant.
"""

from __future__ import annotations

import dataclasses
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from inspect import cleandoc
from pathlib import Path
from typing import Annotated, Any

from overhaul import catalog
from overhaul.errors import Interrupted, UserError, UserErrors, did_you_mean
from overhaul.terminal import (
    check_page,
    checked,
    flags,
    json_flag,
    parse,
    print_table,
    quiet_libraries,
    show_outcome,
    typed,
)

COMMANDS = {
    "run": "Run the steps of a recipe.",
    "sweep": "Run a recipe under many settings, on a smaller model, and rank them.",
    "compare": "Compare model directories: quality, size, speed, what changed where.",
    "learn report": "Runs of tasks side by side: accuracies, what was forgotten, what each task took.",
    "learn export": "One task of a model with banks, as a model of its own.",
    "forget delete": "Take examples out of a model that forget s3t trained, at once and exactly.",
    "forget status": "What is left of such a model.",
    "forget verify": "Whether such a model is as its audit log tells.",
    "blank": "An image classifier with random weights, for images of your size.",
    "bundle": "Keep of an adapter's data what moves the adapter to another model later.",
    "show": "Facts and lineage of a model directory.",
    "generate": "Let a model continue a text.",
    "list": "The methods.",
    "data": "Text: `data list`, `preview`; `data questions` and `data fictions` write some, `data topics` divides it.",
    "schema": "The JSON schema of recipes.",
    "doctor": "Versions, hardware, caches: what to put into a bug report.",
}


def main(argv: Sequence[str] | None = None) -> None:
    """The `overhaul` command; always leaves through `SystemExit`."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        _dispatch(arguments)
        _leave()
    except UserError as error:
        _box(error)
        raise SystemExit(2) from None
    except Interrupted as stopped:
        print(f"\n{stopped}", file=sys.stderr)
        _leave()
        raise SystemExit(130) from None
    except KeyboardInterrupt:
        print("\nstopped; what was not finished is gone", file=sys.stderr)
        raise SystemExit(130) from None
    except BrokenPipeError:
        raise SystemExit(0) from None
    except Exception:
        traceback.print_exc()
        print(
            "\nThis is a bug in overhaul. Please report it with the lines above and `overhaul doctor`.",
            file=sys.stderr,
        )
        raise SystemExit(1) from None
    raise SystemExit(0)


def _leave() -> None:
    """Ends together with the other processes, if there are any: the launcher kills those that are left behind."""
    if "WORLD_SIZE" in os.environ:
        from overhaul.sharding import leave

        leave()


def _dispatch(arguments: list[str]) -> None:
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(_help())
        return
    if arguments[0] == "--version":
        from importlib.metadata import version

        print(f"overhaul {version('overhaul')}")
        return
    length = 2 if " ".join(arguments[:2]) in COMMANDS else 1
    verb, rest = " ".join(arguments[:length]), arguments[length:]
    if verb in COMMANDS:
        from overhaul import commands, data_commands, forget_commands

        name = f"{verb.replace(' ', '_')}_command"
        own = {"data": data_commands, "forget": forget_commands}
        getattr(own.get(arguments[0], commands), name)(rest)
    elif verb in catalog.VERBS:
        if not rest or rest[0] in ("-h", "--help"):
            print(_methods_of(verb))
            return
        entry = catalog.find(verb, rest[0])
        (_change if catalog.changes(entry) else _measure)(entry, rest[1:])
    else:
        names = [*catalog.VERBS, *COMMANDS]
        raise UserError(f"unknown command {verb!r}", allowed=", ".join(names), hint=did_you_mean(verb, names))


def _help() -> str:
    lines = ["usage: overhaul VERB METHOD MODEL -o OUT [options]", "       overhaul COMMAND ...", "",
             "Change a model you already have, instead of training it again.", ""]  # fmt: skip
    for verb, what in catalog.VERBS.items():
        lines.append(f"{verb}: {what}")
        lines += [f"  {entry.name:14} {entry.summary}" for entry in catalog.methods(verb)]
        lines.append("")
    lines += ["commands:", *(f"  {name:14} {what}" for name, what in COMMANDS.items()), ""]
    lines += ["MODEL is smollm2-135m, a transformers directory, or a hub name. `overhaul VERB METHOD --help` shows",
              "every option. First steps: overhaul run recipes/quickstart.yaml"]  # fmt: skip
    return "\n".join(lines)


def _methods_of(verb: str) -> str:
    lines = [f"usage: overhaul {verb} METHOD ...", "", catalog.VERBS[verb], ""]
    lines += [f"  {entry.name:14} {entry.summary}" for entry in catalog.methods(verb)]
    beside = {name.removeprefix(f"{verb} "): what for name, what in COMMANDS.items() if name.startswith(f"{verb} ")}
    return "\n".join(lines + [f"  {name:14} {what}" for name, what in beside.items()])


def _change(entry: catalog.Entry, arguments: list[str]) -> None:
    """`overhaul VERB METHOD MODEL -o OUT`."""
    import tyro

    from overhaul.method import Training
    from overhaul.options import Options

    method_class = entry.load()
    out_flag = Annotated[Path, tyro.conf.arg(aliases=["-o"], help="New directory for the result.")]
    # A change without training has no steps to go on from or to follow.
    hidden = {*method_class.model_fields, *(() if issubclass(method_class, Training) else ("resume", "track"))}
    kind = dataclasses.make_dataclass(
        "Change",
        [
            (
                "model",
                Annotated[str, tyro.conf.Positional, tyro.conf.arg(help="Model to read.", metavar="MODEL")],
            ),
            ("out", out_flag),
            *flags(method_class),
            *flags(Options, without=[name for name in Options.model_fields if name in hidden]),
        ],
        kw_only=True,
    )
    where = f"{entry.verb} {entry.name}"
    given = parse(kind, arguments, prog=f"overhaul {where}", description=cleandoc(method_class.__doc__ or ""))
    errors: list[UserError] = []
    method = _collect(errors, lambda: checked(method_class, given, where=where))
    options = _collect(errors, lambda: checked(Options, given, where=where))
    if errors:
        raise UserErrors(errors)
    from overhaul.execute import run_step
    from overhaul.recipe import Step

    quiet_libraries()
    step = Step(entry=entry, method=method, options=options)
    outcome = run_step(step, given.model, given.out, command=typed())
    if outcome:
        show_outcome(outcome)


def _measure(entry: catalog.Entry, arguments: list[str]) -> None:
    """`overhaul measure METHOD MODEL [MODEL ...]`."""
    import tyro

    from overhaul.method import Difference, Measure
    from overhaul.options import Options

    method_class = entry.load()
    assert issubclass(method_class, Measure)
    runs = () if issubclass(method_class, Difference) else ("dtype", "device")
    only = (*(("data", "field") if method_class.needs_corpus else ()), "seed", *runs)
    kind = dataclasses.make_dataclass(
        "Measure",
        [
            (
                "model",
                Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(help="Models.", metavar="MODEL")],
            ),
            *flags(method_class),
            *flags(
                Options,
                without=[n for n in Options.model_fields if n not in only or n in method_class.model_fields],
            ),
            (
                "html",
                Annotated[Path | None, tyro.conf.arg(help="Write the table and its pictures to this page.")],
                dataclasses.field(default=None),
            ),
            json_flag("One JSON object on stdout."),
        ],
        kw_only=True,
    )
    where = f"{entry.verb} {entry.name}"
    given = parse(kind, arguments, prog=f"overhaul {where}", description=cleandoc(method_class.__doc__ or ""))
    if not given.model:
        raise UserError(f"{where} needs at least one model", hint=f"overhaul {where} smollm2-135m")
    method, options = checked(method_class, given, where=where), checked(Options, given, where=where)
    check_page(given.html)
    quiet_libraries()
    from overhaul import machine
    from overhaul.execute import measure

    table = measure(method, given.model, options)
    if given.html:
        from overhaul.report.facts import labels_of
        from overhaul.report.html import html_measured

        environment = {**machine.versions(), "hardware": machine.hardware(machine.pick_device(options.device))}
        models = list(dict.fromkeys(row.model for row in table.rows))
        called = dict(zip(models, labels_of(models), strict=True))
        page = html_measured(table, title=where, command=typed(), environment=environment, called=called)
        given.html.write_text(page)
    print_table(table, as_json=given.json)


def _collect(errors: list[UserError], make: Callable[[], Any]) -> Any:
    try:
        return make()
    except UserErrors as found:
        errors += found.errors
        return None


def _box(error: UserError) -> None:
    from rich.console import Console
    from rich.panel import Panel
    from rich.text import Text

    panel = Panel(Text(str(error)), title="overhaul cannot do this", title_align="left", border_style="red")
    Console(stderr=True, highlight=False).print(panel)


if __name__ == "__main__":
    main()
