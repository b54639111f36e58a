"""Writes docs/reference/settings.md: every method's settings, from the classes that declare them.

python docs/settings.py
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from overhaul import catalog
from overhaul.adapt.bundling import Bundling
from overhaul.fictions import FictionSettings
from overhaul.forget_texts import NewsSettings, StorySettings
from overhaul.method import Training
from overhaul.options import Options
from overhaul.question_writing import QuestionWriting
from overhaul.topics import TopicSettings

PAGE = Path(__file__).parent / "reference" / "settings.md"

INTRODUCTION = """\
# Settings

<!-- Written by docs/settings.py from the classes; `make docs` brings it up to date. -->

What `overhaul VERB METHOD --help` shows. In a recipe a setting is called as it is here; on the command line
`batch_size` is `--batch-size`, and a setting that is true or false is `--name` or `--no-name`.
"""


def page() -> str:
    """The page as Markdown."""
    sections = [INTRODUCTION, "## Of every run\n", table(Options), "## Of every training method\n", table(Training)]
    sections += ["## bundle\n", "[How it is used](../methods/adapt-translora.md).\n", table(Bundling)]
    for name, kind, shown in (
        ("questions", QuestionWriting, "tutorials/questions.md"),
        ("topics", TopicSettings, "tutorials/questions.md"),
        ("fictions", FictionSettings, "methods/measure-muse.md"),
        ("news", NewsSettings, "methods/measure-muse.md"),
        ("stories", StorySettings, "methods/measure-muse.md"),
    ):
        sections += [f"## data {name}\n", f"[How it is used](../{shown}).\n", table(kind)]
    for verb in catalog.VERBS:
        sections.append(f"## {verb}\n")
        for entry in catalog.methods(verb):
            kind = entry.load()
            shared = issubclass(kind, Training)
            link = f"[The method's page](../methods/{verb}-{entry.name}.md)."
            also = " Beside the settings of every training method, or with another default:" if shared else ""
            sections += [f"### {verb} {entry.name}\n", f"{link}{also}\n", table(kind, Training if shared else None)]
    return "\n".join(sections)


def table(kind: type[Any], shared: type[Any] | None = None) -> str:
    """One row per field of a pydantic class, without those that are equal in `shared`."""
    known = rows(shared) if shared else []
    own = [row for row in rows(kind) if row not in known]
    return "\n".join(["| setting | default | values | meaning |", "|---|---|---|---|", *own]) + "\n"


def rows(kind: type[Any]) -> list[str]:
    """The fields of a pydantic class as rows of the table."""
    schema = kind.model_json_schema()
    return list(_rows(schema["properties"], schema.get("$defs", {})))


def _rows(fields: dict[str, Any], groups: dict[str, Any], prefix: str = "") -> Iterator[str]:
    """The rows of some fields; those of a group of settings follow it, under dotted names."""
    for name, schema in fields.items():
        group = schema.get("$ref", "").rpartition("/")[-1]
        values, default = ("", "") if group else (_values(schema), _default(schema.get("default")))
        yield f"| `{prefix}{name}` | {default} | {values} | {schema.get('description', '')} |"
        if group:
            yield from _rows(groups[group]["properties"], groups, f"{prefix}{name}.")


def _default(value: Any) -> str:
    if value in (None, []):
        return ""
    if isinstance(value, list):
        return " ".join(f"`{item}`" for item in value)
    return f"`{str(value).lower() if isinstance(value, bool) else value}`"


def _values(schema: dict[str, Any]) -> str:
    if "anyOf" in schema:
        return " or ".join(_values(option) for option in schema["anyOf"] if option != {"type": "null"})
    if "enum" in schema:
        return ", ".join(f"`{value}`" for value in schema["enum"])
    if "prefixItems" in schema:
        return f"{len(schema['prefixItems'])} times {_values(schema['prefixItems'][0])}"
    if schema["type"] == "array":
        return f"any of {_values(schema['items'])}" if "enum" in schema["items"] else _several(schema["items"])
    if schema["type"] in ("integer", "number"):
        return f"{'whole number' if schema['type'] == 'integer' else 'number'}{_range(schema)}"
    return {"boolean": "`true`, `false`", "string": "text"}[schema["type"]]


def _several(schema: dict[str, Any]) -> str:
    return "one or more numbers" if schema.get("type") == "number" else "one or more words"


def _range(schema: dict[str, Any]) -> str:
    signs = {"minimum": "from", "exclusiveMinimum": "above", "maximum": "to", "exclusiveMaximum": "below"}
    return "".join(f" {word} {schema[key]:g}" for key, word in signs.items() if key in schema)


if __name__ == "__main__":
    PAGE.write_text(page())
