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

FILE, VERSION = artifacts.CONTINUATION, 2


class Continuation(NamedTuple):
    """What was left.

    Attributes:
        optimizer: the name of the update rule.
        state: of the optimizer, as its `state_dict` has it.
        rate: the learning rate at the end.
        places: states of streams, by what they are known by.
    """

    optimizer: str
    state: Mapping[str, Any]
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


def leave(left: Continuation) -> None:
    """Notes what is to be written beside the weights; all processes must call it."""
    note_state(FILE, {"version": VERSION, **left._replace(state=sharding.whole(left.state))._asdict()})


def take_up(left: Continuation, name: str, optimizer: torch.optim.Optimizer) -> None:
    """Puts moments where they were; rate, decay and the like stay those of the new run.

    Args:
        left: by the run before.
        name: of the update rule.
        optimizer: which has done nothing yet.

    Raises:
        UserError: the moments are those of another update rule, of another subspace, or of other parameters.
    """
    if left.optimizer != name:
        raise UserError(
            f"the run before had the optimizer {left.optimizer}, whose moments {name} cannot go on with",
            hint=f"--optimizer {left.optimizer}, or without --go-on",
        )
    own = [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
    try:
        optimizer.load_state_dict(dict(left.state))
    except ValueError as error:  # torch's, where the groups have other sizes
        raise UserError(
            f"the run before trained other parameters than this one would: {error}", hint="without --go-on"
        ) from error
    for group, settings in zip(optimizer.param_groups, own, strict=True):
        group.update(settings)
