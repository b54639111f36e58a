"""What was done to a model, to what, with what, at what cost: the records in `overhaul.json`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Parent:
    """A directory that a step read, and the hash of its weights."""

    path: str
    hash: str


@dataclass(frozen=True, slots=True, kw_only=True)
class DataUsed:
    """A corpus that a step read: its content hash, and how many tokens, images or texts the step took from it.

    Every pass of a training over the text counts. Windows that are taken once and kept, as statistics and layer-wise
    reconstruction do, count once, however often they are used.
    """

    name: str
    fingerprint: str
    tokens: int
    licence: str = ""
    unit: str = "tokens"


@dataclass(frozen=True, slots=True, kw_only=True)
class LineageStep:
    """One verb applied once.

    Attributes:
        verb, method: as typed.
        fields: every setting of the method, nested ones under dotted names.
        non_default: the names in `fields` that were not left at their default.
        parents: what it read.
        data: the corpus it read.
        beside: further corpora it read.
        seed: of every random choice.
        options: settings of the run that were not left at their default, such as `data` and `dtype`.
        seconds: wall time of the change itself, without measuring before and after.
        peak_rss_bytes: highest resident memory of the process meanwhile.
        trainable_parameters: how many were trained, None for a change without training.
        optimizer_bytes: what the optimizer kept at the end, on each process; None for a change without training.
        versions, hardware: what can change a result.
        command: what to type to do it again.
        date: UTC, ISO 8601.
    """

    verb: str
    method: str
    fields: Mapping[str, object]
    non_default: tuple[str, ...] = ()
    parents: tuple[Parent, ...] = ()
    data: DataUsed | None = None
    beside: tuple[DataUsed, ...] = ()
    seed: int | None = None
    options: Mapping[str, object] = field(default_factory=dict)
    seconds: float | None = None
    peak_rss_bytes: int | None = None
    trainable_parameters: int | None = None
    optimizer_bytes: int | None = None
    versions: Mapping[str, str] = field(default_factory=dict)
    hardware: str = ""
    command: str = ""
    date: str = ""

    def to_json(self) -> dict[str, Any]:
        """As stored in `overhaul.json`; `parent` repeats the first parent's path."""
        return {**asdict(self), "parent": self.parents[0].path if self.parents else None}

    @classmethod
    def from_json(cls, stored: Mapping[str, Any]) -> LineageStep:
        """Reads what `to_json` wrote."""
        known = {name: stored[name] for name in cls.__dataclass_fields__ if name in stored}
        known["parents"] = tuple(Parent(**parent) for parent in stored.get("parents", ()))
        known["data"] = DataUsed(**stored["data"]) if stored.get("data") else None
        known["beside"] = tuple(DataUsed(**used) for used in stored.get("beside", ()))
        known["non_default"] = tuple(stored.get("non_default", ()))
        return cls(**known)


def flat_fields(fields: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings under dotted names: `{"train": {"steps": 5}}` becomes `{"train.steps": 5}`."""
    flat: dict[str, Any] = {}
    for name, value in fields.items():
        nested = flat_fields(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {f"{prefix}{name}": value}
        flat |= nested
    return flat


def nested_fields(flat: Mapping[str, Any]) -> dict[str, Any]:
    """What `flat_fields` made flat, as it was."""
    nested: dict[str, Any] = {}
    for name, value in flat.items():
        *groups, last = name.split(".")
        place = nested
        for group in groups:
            place = place.setdefault(group, {})
        place[last] = value
    return nested
