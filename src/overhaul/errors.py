"""Errors a user can cause, each saying what was given, what is allowed and what to type."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pydantic import ValidationError
    from pydantic_core import ErrorDetails


class UserError(Exception):
    """A mistake in the input: the command line shows it in one box and exits with 2, without a traceback.

    Args:
        given: what was given and why it cannot be used, one sentence.
        allowed: what would be accepted.
        hint: what to type instead.
    """

    def __init__(self, given: str, *, allowed: str = "", hint: str = "") -> None:
        self.given, self.allowed, self.hint = given, allowed, hint
        super().__init__(str(self))

    def __str__(self) -> str:
        parts = [self.given]
        if self.allowed:
            parts.append(f"allowed: {self.allowed}")
        if self.hint:
            parts.append(f"try: {self.hint}")
        return "\n".join(parts)


class Diverged(UserError):
    """Training whose loss or gradient is no longer finite."""


class UserErrors(UserError):
    """Several mistakes found in one reading, shown together."""

    def __init__(self, errors: Iterable[UserError]) -> None:
        self.errors = tuple(errors)
        super().__init__("\n\n".join(str(error) for error in self.errors))


class Interrupted(Exception):
    """The run was stopped by Ctrl-C after a checkpoint was written; exits with 130."""


def did_you_mean(word: str, choices: Iterable[str]) -> str:
    """A sentence `did you mean X?` for the choice nearest to `word`, or an empty string."""
    near = difflib.get_close_matches(word, list(choices), n=1, cutoff=0.5)
    return f"did you mean {near[0]!r}?" if near else ""


def refuse_twice(names: Sequence[str], hint: str) -> None:
    """`UserError` where one of some names comes twice."""
    if twice := next((name for place, name in enumerate(names) if name in names[:place]), None):
        raise UserError(f"{twice} is named twice", hint=hint)


def from_pydantic(error: ValidationError, *, where: str, fields: Iterable[str]) -> list[UserError]:
    """One `UserError` per mistake that pydantic found.

    Args:
        error: what validation raised.
        where: what the fields belong to, such as `prune wanda`.
        fields: the names that exist there, for suggestions.
    """
    names = list(fields)
    found = []
    for mistake in error.errors(include_url=False):
        name = ".".join(str(part) for part in mistake["loc"]) or where
        if mistake["type"] == "extra_forbidden":
            found.append(
                UserError(
                    f"{where} has no field {name!r}",
                    allowed=", ".join(sorted(names)),
                    hint=did_you_mean(name.rsplit(".", 1)[-1], (n.rsplit(".", 1)[-1] for n in names)),
                )
            )
        elif mistake["type"] == "missing":
            found.append(UserError(f"{where} needs {name!r}", hint=f"give {name}"))
        else:
            message = _uncapitalized(mistake["msg"].removeprefix("Value error, "))
            given = (
                "" if mistake["type"] == "value_error" and not mistake["loc"] else f"{name} = {mistake['input']!r}: "
            )
            found.append(UserError(f"{where}: {given}{message}", hint=_as_share(mistake)))
    return found


def _as_share(mistake: ErrorDetails) -> str:
    """What to type for a share that was given in percent."""
    limit, given = mistake.get("ctx", {}).get("lt"), mistake["input"]
    is_percent = mistake["type"] == "less_than" and limit == 1 and isinstance(given, int | float) and 2 <= given < 100
    return f"{mistake['loc'][-1]} {given / 100:g}, if percent was meant" if is_percent else ""


def _uncapitalized(sentence: str) -> str:
    """The sentence as a clause; a name such as N:M keeps its capital."""
    return sentence[0].lower() + sentence[1:] if sentence[1].islower() else sentence
