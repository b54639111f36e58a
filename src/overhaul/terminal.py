"""Between the command line and the user: flags into settings, results onto stdout."""

from __future__ import annotations

import dataclasses
import json
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

from overhaul.errors import UserError, UserErrors, from_pydantic


def parse(kind: type[Any], arguments: Sequence[str], *, prog: str, description: str) -> Any:
    """Parses arguments into a dataclass with tyro; a wrong flag gets a suggestion and exits with 2."""
    import tyro

    return tyro.cli(kind, args=list(arguments), prog=prog, description=description)


def flags(settings: type[Any], *, without: Sequence[str] = ()) -> list[tuple[str, Any, Any]]:
    """The fields of a pydantic class as dataclass fields for `parse`, unchecked: pydantic checks them afterwards."""
    import tyro

    made = []
    for name, info in settings.model_fields.items():
        if name not in without:
            default = dataclasses.field() if info.is_required() else dataclasses.field(default=info.default)
            inner: Any = info.annotation
            if _is_settings(inner):
                inner = dataclasses.make_dataclass(inner.__name__, flags(inner), kw_only=True, frozen=True)
                default = dataclasses.field(default=inner())
            kind = Annotated[inner, tyro.conf.arg(help=info.description or "")]
            made.append((name, kind, default))
    return made


def json_flag(what: str) -> tuple[str, Any, Any]:
    """`--json` as a dataclass field for `parse`: it is off unless it is typed."""
    import tyro

    kind = Annotated[tyro.conf.FlagCreatePairsOff[bool], tyro.conf.arg(help=what)]
    return "json", kind, dataclasses.field(default=False)


def _is_settings(annotation: Any) -> bool:
    """Whether a field is a group of settings, whose flags are `--field.name`."""
    from overhaul.method import Settings  # it brings pydantic, which the list of commands does without

    return isinstance(annotation, type) and issubclass(annotation, Settings)


def checked(settings: type[Any], given: Any, *, where: str) -> Any:
    """Makes the pydantic object from parsed flags; all mistakes are raised at once."""
    from pydantic import ValidationError

    values = {name: getattr(given, name) for name in settings.model_fields if hasattr(given, name)}
    values = {name: vars(value) if dataclasses.is_dataclass(value) else value
              for name, value in values.items()}  # fmt: skip
    try:
        return settings(**values)
    except ValidationError as error:
        raise UserErrors(from_pydantic(error, where=where, fields=settings.model_fields)) from None


def show_outcome(outcome: Any) -> None:
    """The before/after table, where the result is, and what to type next."""
    from rich.console import Console

    from overhaul.report.tables import print_before_after

    print_before_after(outcome.facts, Console(highlight=False))
    path = shlex.quote(str(outcome.path))
    print(f"\nwritten: {path}\n  overhaul show {path}")
    if not outcome.facts[-1].kind:
        print(f"  overhaul generate {path} --prompt 'The capital of France is'")


def check_page(html: Path | None, *, flag: str = "--html") -> None:
    """Refuses a page that cannot be written, before anything is measured.

    Args:
        html: where to; None writes none.
        flag: how it was given.

    Raises:
        UserError: the file exists, or there is no directory for it.
    """
    if html is None:
        return
    if html.exists():
        raise UserError(f"{flag} {html} exists", hint="another file; nothing is ever overwritten")
    if not html.absolute().parent.is_dir():
        raise UserError(f"{flag} {html}: there is no directory {html.parent}", hint=f"{flag} {html.name}")


def quiet_libraries() -> None:
    """Keeps transformers' own messages out of ours."""
    import warnings

    from transformers.utils import logging

    logging.set_verbosity_error()
    warnings.filterwarnings("ignore", category=FutureWarning)


def typed() -> str:
    """The command line as it was typed."""
    return shlex.join(["overhaul", *sys.argv[1:]])


def print_json(content: Any) -> None:
    """One JSON object on stdout."""
    print(json.dumps(content, indent=1, default=str))


def print_table(table: Any, *, as_json: bool) -> None:
    """Measured rows: one JSON object, or aligned text."""
    if as_json:
        print_json(table.to_json())
        return
    for row in table.rows:
        print(f"{row.model}  {row.metric} {row.value:.4g}  [{row.low:.4g}, {row.high:.4g}]  over {row.count:,}")
    for note in table.notes:
        print(f"note: {note}")
