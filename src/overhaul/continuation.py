"""What a run leaves beside the weights for one that goes on from it: moments, the last rate, places in its texts."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from overhaul import artifact as artifacts
from overhaul import sharding
from overhaul.errors import UserError
from overhaul.journal import note_state
from overhaul.stream import Stream

FILE, VERSION = artifacts.CONTINUATION, 1


class Continuation(NamedTuple):
    """What was left.

    Attributes:
        optimizer: the name of the update rule.
        moments: its state, by number of the parameter.
        rate: the learning rate at the end.
        places: states of streams, by the fingerprint of what they are made of.
    """

    optimizer: str
    moments: Mapping[int, Mapping[str, Any]]
    rate: float
    places: Mapping[str, Any]


def check(path: Path) -> None:
    """Raises `UserError` where a directory has nothing to go on from, or its weights were changed since."""
    if not (path / FILE).is_file():
        raise UserError(
            f"{path} has no {FILE}, which a run to go on from leaves there",
            allowed="what extend wrote with --keep-state",
            hint="without --go-on, or --keep-state in the run before",
        )
    if artifacts.read_record(path).get("weights_sha256") != artifacts.weights_sha256(path):
        raise UserError(f"the weights in {path} are not those that {FILE} was written with", hint="without --go-on")


def read(path: Path) -> Continuation:
    """What was left in a directory.

    Raises:
        UserError: nothing, or it is damaged.
    """
    check(path)
    try:
        stored = torch.load(path / FILE, map_location="cpu", weights_only=True)
        if stored.pop("version") != VERSION:
            raise ValueError("it is of another version")
        return Continuation(**stored)
    except (pickle.UnpicklingError, RuntimeError, ValueError, KeyError, TypeError, EOFError) as error:
        raise UserError(f"{path / FILE} cannot be read: {error}", hint="without --go-on") from error


def leave(
    name: str,
    optimizer: torch.optim.Optimizer,
    rate: float,
    streams: Mapping[str, Stream],
    before: Continuation | None,
) -> None:
    """Notes what is to be written beside the weights; all processes must call it.

    Args:
        name: of the update rule.
        optimizer: after its last step.
        rate: at the end.
        streams: whose places are kept, by name.
        before: what this run went on from: places in texts that it did not read are handed on.
    """
    places = {windows.describe().fingerprint: windows.state_dict() for windows in streams.values()}
    moments = sharding.whole(optimizer.state_dict()["state"])
    handed_on = dict(before.places) if before else {}
    left = Continuation(name, moments, rate, handed_on | places)
    note_state(FILE, {"version": VERSION, **left._asdict()})


def take_up(
    left: Continuation, name: str, optimizer: torch.optim.Optimizer, streams: Mapping[str, Stream]
) -> list[str]:
    """Puts moments and places where they were; rates and decay are those of the new run.

    Args:
        left: by the run before.
        name: of the update rule.
        optimizer: which has done nothing yet.
        streams: by name.

    Returns:
        The names of the texts that are read on from where the run before stopped.

    Raises:
        UserError: the moments are those of another update rule, or of other parameters.
    """
    if left.optimizer != name:
        raise UserError(
            f"the run before had the optimizer {left.optimizer}, whose moments {name} cannot go on with",
            hint=f"--optimizer {left.optimizer}, or without --go-on",
        )
    groups = optimizer.state_dict()["param_groups"]
    numbers = {number for group in groups for number in group["params"]}
    if not left.moments.keys() <= numbers:
        raise UserError("the run before trained other parameters than this one would", hint="without --go-on")
    optimizer.load_state_dict({"state": dict(left.moments), "param_groups": groups})
    known = {shown: windows for shown, windows in streams.items() if windows.describe().fingerprint in left.places}
    for windows in known.values():
        windows.load_state_dict(left.places[windows.describe().fingerprint])
    return list(known)
