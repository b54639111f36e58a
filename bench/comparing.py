"""What a user would type, run and compared: for every model of a folder its perplexity, size and speeds."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from bench.results import Row

QUANTITIES = {
    "perplexity": ("held-out perplexity", ""),
    "size": ("weights on disk", "bytes"),
    "prefill": ("reading", "tokens/s"),
    "decode": ("writing", "tokens/s"),
}
Model = Mapping[str, Any]
"""A row of `overhaul compare --json`."""


def overhaul(folder: Path, *words: str) -> str:
    """Runs a command in `folder`, its progress shown; returns what it prints."""
    command = [sys.executable, "-m", "overhaul", *words]
    return subprocess.run(command, cwd=folder, stdout=subprocess.PIPE, text=True, check=True).stdout


def compared(folder: Path, *words: str) -> tuple[Model, list[Model]]:
    """What `overhaul compare` measures in `folder`: of the reference, and of the others."""
    reference, *models = json.loads(overhaul(folder, "compare", *words, "--json"))["rows"]
    return reference, models


def numbers(model: Model) -> dict[str, float]:
    """By quantity."""
    return {
        "perplexity": model["perplexity"]["value"],
        "size": float(model["bytes"]),
        "prefill": model["tokens_per_second"],
        "decode": model["decode_tokens_per_second"],
    }


def rows_of(models: Iterable[Model], reference: Model, prefix: str, settings: Mapping[str, Any]) -> list[Row]:
    """All quantities of compared models, beside the reference's, with the fronts that each is on."""
    return [
        row
        for model in models
        for row in rows(
            f"{prefix}-{model['label']}",
            model["label"],
            numbers(model),
            reference,
            {**settings, "on the front": ", ".join(model["fronts"]) or "none"},
        )
    ]


def rows(
    prefix: str, name: str, found: Mapping[str, float], reference: Model, settings: Mapping[str, Any]
) -> Iterator[Row]:
    """One for each quantity in `found`, beside the reference's."""
    before = numbers(reference)
    for quantity, number in found.items():
        what, unit = QUANTITIES[quantity]
        yield Row(
            id=f"{prefix}/{quantity}",
            kind="model",
            what=f"{name}: {what}",
            unit=unit,
            values=(number,),
            peer=(before[quantity],),
            peer_name=f"{reference['label']}, {reference['dtype']}",
            settings={"model": reference["label"], **settings},
        )
