"""Recipes: a list of steps in YAML, read strictly; all mistakes are shown at once, each with its line."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from overhaul import catalog
from overhaul.errors import UserError, UserErrors, did_you_mean, from_pydantic
from overhaul.method import Method
from overhaul.options import PASSING_OPTIONS, Options

TOP = ("model", "out", "steps", *Options.model_fields)
_STEP = tuple(name for name in Options.model_fields if name not in PASSING_OPTIONS)
# Long names of other tools, understood in recipes; the note names the short one.
_ALIASES = {
    "max_steps": "steps", "num_train_epochs": "epochs", "per_device_train_batch_size": "batch_size",
    "gradient_accumulation_steps": "accumulate", "learning_rate": "lr", "warmup_ratio": "warmup",
    "lr_scheduler_type": "schedule", "max_grad_norm": "clip", "max_length": "seq_len", "eval_steps": "eval_every",
    "save_steps": "save_every", "save_total_limit": "keep",
}  # fmt: skip


class _Loader(yaml.SafeLoader):
    """YAML in which 2:4 is text, 1e-3 a number and 2024-01-31 text, as no field is a date.

    YAML 1.1 takes them for 124, in base 60, for text and for a date.
    """

    yaml_implicit_resolvers = {  # noqa: RUF012 - as the base class has it
        first: [(tag, pattern) for tag, pattern in found if not tag.endswith((":int", ":float", ":timestamp"))]
        for first, found in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


_NUMBER = "-+.0123456789"
_Loader.add_implicit_resolver("tag:yaml.org,2002:int", re.compile(r"[-+]?(0|[1-9]\d*)$"), list(_NUMBER))
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"([-+]?((\d+\.\d*|\.\d+)([eE][-+]?\d+)?|\d+[eE][-+]?\d+|\.inf)|\.nan)$"),
    list(_NUMBER),
)


def _load(text: str) -> Any:
    return yaml.load(text, _Loader)


def value(text: str) -> Any:
    """What a recipe, or an override, reads in a value; text that is not valid YAML is itself."""
    try:
        return _load(text)
    except yaml.YAMLError:
        return text


_PIECE = re.compile(r"""(?<!\w)'[^']*'|(?<!\w)"(?:\\.|[^"\\])*"|.""", re.DOTALL)
"""Something in quotes, or one character; an apostrophe within a word opens nothing."""


def values(text: str) -> list[str]:
    """What stands between commas, as typed; those within brackets, braces or quotes separate nothing."""
    parts, depth = [""], 0
    for piece in _PIECE.findall(text):
        depth = max(0, depth + (piece in "[{") - (piece in "]}"))
        if piece == "," and not depth:
            parts.append("")
        else:
            parts[-1] += piece
    return [part.strip() for part in parts]


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One verb to be applied."""

    entry: catalog.Entry
    method: Method
    options: Options


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """Steps, applied one after the other, each to the output of the one before."""

    model: str
    out: Path
    steps: tuple[Step, ...]
    options: Options


def read(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """Reads a recipe file.

    Args:
        path: the YAML file.
        overrides: `path.to.field=value`; steps are counted from 1 or called by their method: `steps.perp.lr=1e-3`.

    Raises:
        UserErrors: all mistakes, each with `file:line`.
    """
    if not path.is_file():
        raise UserError(f"no recipe at {path}", hint="a YAML file, such as recipes/quickstart.yaml")
    try:
        node = yaml.compose(path.read_text(), _Loader)
        content: Any = _load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(content, dict) or node is None:
        raise UserError(f"{path} is not a recipe: the top must be a mapping", allowed=", ".join(TOP))
    reading = _Reading(str(path), _lines(node))
    for override in overrides:
        reading.override(content, override)
    return reading.recipe(content)


def parse(content: Mapping[str, Any], *, name: str = "recipe") -> Recipe:
    """A recipe from plain data instead of a file."""
    return _Reading(name, {}).recipe(content)


class _Reading:
    """Collects mistakes while a recipe is read."""

    def __init__(self, name: str, lines: dict[tuple[str | int, ...], int]) -> None:
        self.name, self.lines = name, lines
        self.errors: list[UserError] = []

    def wrong(self, at: tuple[str | int, ...], error: UserError) -> None:
        """Notes a mistake at the nearest known line."""
        while at and at not in self.lines:
            at = at[:-1]
        line = f":{self.lines[at]}" if at in self.lines else ""
        self.errors.append(UserError(f"{self.name}{line}: {error.given}", allowed=error.allowed, hint=error.hint))

    def override(self, content: dict[str, Any], text: str) -> None:
        """Applies `path.to.field=value` to the plain data."""
        target, equals, value = text.partition("=")
        keys = target.split(".")
        if not equals:
            self.errors.append(UserError(f"{text!r} is not path.to.field=value", hint="steps.perp.steps=200"))
            return
        place: Any = content
        for key in keys[:-1]:
            place = (
                _step_called(place, key)
                if isinstance(place, list)
                else place.get(key)
                if isinstance(place, dict)
                else None
            )
        if not isinstance(place, dict):
            self.errors.append(
                UserError(f"{target!r} names nothing in {self.name}", hint="out=DIR, or steps.1.lr=1e-3")
            )
            return
        try:
            place[keys[-1]] = _load(value)
        except yaml.YAMLError:
            self.errors.append(UserError(f"{text!r}: {value!r} is not valid YAML", hint="quotes around the value"))

    def recipe(self, content: Mapping[str, Any]) -> Recipe:
        """Validates everything, then raises all mistakes or returns the recipe."""
        for key in content:
            if key not in TOP:
                self.wrong(
                    (key,),
                    UserError(f"unknown key {key!r}", allowed=", ".join(TOP), hint=did_you_mean(str(key), TOP)),
                )
        for key in ("model", "out", "steps"):
            if not content.get(key):
                self.wrong(
                    (),
                    UserError(f"{key!r} is missing", hint={"model": "model: smollm2-135m"}.get(key, f"{key}: ...")),
                )
        given = {key: content[key] for key in Options.model_fields if key in content}
        options = self._made(Options, given, (), "the recipe") or Options()
        steps = content.get("steps") or []
        if not isinstance(steps, list):
            self.wrong(("steps",), UserError("'steps' must be a list"))
            steps = []
        made = [self._step(step, index, options) for index, step in enumerate(steps)]
        if self.errors:
            raise UserErrors(self.errors)
        found = tuple(step for step in made if step is not None)
        return Recipe(model=str(content["model"]), out=Path(str(content["out"])), steps=found, options=options)

    def _step(self, step: Any, index: int, options: Options) -> Step | None:
        at = ("steps", index)
        if not isinstance(step, dict) or not {"verb", "method"} <= step.keys():
            self.wrong(
                at,
                UserError(
                    f"step {index + 1} needs a verb and a method",
                    hint="- {verb: prune, method: wanda, sparsity: 0.5}",
                ),
            )
            return None
        try:
            entry = catalog.find(str(step["verb"]), str(step["method"]))
        except UserError as error:
            self.wrong((*at, "verb" if step["verb"] not in catalog.VERBS else "method"), error)
            return None
        if not catalog.changes(entry):
            hint = f"overhaul {entry.verb} {entry.name} on the recipe's outputs"
            self.wrong((*at, "verb"), UserError(f"{entry.verb} writes no model, so it is no step", hint=hint))
            return None
        given = {str(key): value for key, value in step.items() if key not in ("verb", "method")}
        fields = {_ALIASES.get(key, key): value for key, value in given.items()}
        own = {key: fields.pop(key) for key in _STEP if key in fields and key not in entry.load().model_fields}
        method = self._made(entry.load(), fields, at, f"{entry.verb} {entry.name}")
        chosen = self._made(Options, {**options.model_dump(), **own}, at, f"{entry.verb} {entry.name}")
        return Step(entry=entry, method=method, options=chosen) if method and chosen else None

    def _made(self, kind: type[Any], fields: Mapping[str, Any], at: tuple[str | int, ...], where: str) -> Any:
        try:
            return kind(**fields)
        except ValidationError as error:
            for mistake, told in zip(
                error.errors(), from_pydantic(error, where=where, fields=kind.model_fields), strict=True
            ):
                self.wrong((*at, *mistake["loc"]), told)
            return None


def _step_called(steps: list[Any], key: str) -> Any:
    """The step with that number, counted from 1, or that method's name."""
    if key.isdigit():
        return steps[int(key) - 1] if 0 < int(key) <= len(steps) else None
    return next((step for step in steps if isinstance(step, dict) and step.get("method") == key), None)


def _lines(node: yaml.Node, at: tuple[str | int, ...] = ()) -> dict[tuple[str | int, ...], int]:
    """The line of every key and list item, counted from 1."""
    lines: dict[tuple[str | int, ...], int] = {}
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            lines[(*at, key.value)] = key.start_mark.line + 1
            lines |= _lines(value, (*at, key.value))
    elif isinstance(node, yaml.SequenceNode):
        for index, value in enumerate(node.value):
            lines[(*at, index)] = value.start_mark.line + 1
            lines |= _lines(value, (*at, index))
    return lines


def field_called(plan: Recipe, target: str) -> str:
    """The one name of a field: of `steps.full.learning_rate` and `steps.1.lr`, if they are one, the second."""
    top, *rest = target.split(".")
    if top != "steps" or len(rest) < 2:
        return target
    methods = [step.entry.name for step in plan.steps]
    number = methods.index(rest[0]) + 1 if rest[0] in methods else rest[0]
    return ".".join([top, str(number), _ALIASES.get(rest[1], rest[1]), *rest[2:]])


def to_yaml(model: str, steps: Iterable[tuple[str, str, Mapping[str, Any]]], *, out: str) -> str:
    """A recipe file that `overhaul run` accepts.

    Args:
        model: where the chain begins.
        steps: verb, method, and the fields that were not left at their default.
        out: the output directory.
    """
    listed = [{"verb": verb, "method": method, **fields} for verb, method, fields in steps]
    body = {"model": model, "out": out, "steps": [_plain(step) for step in listed]}
    return yaml.safe_dump(body, sort_keys=False, default_flow_style=None, width=110, allow_unicode=True)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(inner) for key, inner in value.items()}
    return [_plain(inner) for inner in value] if isinstance(value, list | tuple) else value


def schema() -> dict[str, Any]:
    """The JSON schema of a recipe, for editors."""
    options = Options.model_json_schema()["properties"]
    steps, groups = [], {}
    for entry in filter(catalog.changes, catalog.ENTRIES):
        own = entry.load().model_json_schema()
        groups |= own.get("$defs", {})
        fixed = {"verb": {"const": entry.verb}, "method": {"const": entry.name}}
        extra = {key: options[key] for key in _STEP}
        steps.append({
            "type": "object",
            "description": entry.summary,
            "properties": {**fixed, **extra, **own.get("properties", {})},
            "required": ["verb", "method"],
            "additionalProperties": False,
        })  # fmt: skip
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "overhaul recipe",
        "type": "object",
        "properties": {
            "model": {"type": "string"}, "out": {"type": "string"}, **options,
            "steps": {"type": "array", "items": {"oneOf": steps}},
        },
        "required": ["model", "out", "steps"],
        "$defs": groups,
        "additionalProperties": False,
    }  # fmt: skip
