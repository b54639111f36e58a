"""A log that only grows, in which every entry seals those before it: what was changed in it later can be seen.

Each entry holds the hash of the one before; whoever kept the last hash can tell whether an entry was changed, left out,
or cut off at the end. It cannot be told by the log alone whether all of it was written anew.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from overhaul.errors import UserError

BEGINNING = "0" * 64
"""In place of the hash of an entry before the first."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One thing that was done.

    Attributes:
        number: counted from 1.
        what: plain data.
        hash: SHA-256 over the hash before, the number and `what`.
    """

    number: int
    what: Mapping[str, Any]
    hash: str

    @classmethod
    def after(cls, last: Entry | None, what: Mapping[str, Any]) -> Entry:
        """The next entry."""
        number = last.number + 1 if last else 1
        return cls(number, what, sealed(last.hash if last else BEGINNING, number, what))


def sealed(before: str, number: int, what: Mapping[str, Any]) -> str:
    """The hash of an entry: 64 hex digits.

    Args:
        before: the hash of the entry before it.
        number: its own.
        what: plain data.
    """
    told = json.dumps([before, number, what], sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(told.encode("utf-8", "surrogatepass")).hexdigest()


def check(entries: Iterable[Entry], *, head: str | None = None) -> int:
    """How many entries there are, each sealing those before it.

    Args:
        entries: in order.
        head: a hash that was noted before and must be that of one of them; None for none.

    Raises:
        UserError: an entry was changed, is missing, or the noted one is gone.
    """
    before, count, met = BEGINNING, 0, head is None or head == BEGINNING
    for count, entry in enumerate(entries, 1):
        if entry.number != count:
            raise UserError(f"the audit log has entry {entry.number} where entry {count} belongs", allowed=_WHOLE)
        if sealed(before, count, entry.what) != entry.hash:
            raise UserError(f"entry {count} of the audit log was changed after it was written", allowed=_WHOLE)
        before = entry.hash
        met = met or entry.hash == head
    if not met:
        raise UserError(
            f"the audit log has no entry {head}: it was cut off, or written anew",
            allowed="the hash that was told when an entry was written",
        )
    return count


_WHOLE = "the log as it was written"
