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
ADAPTED = {
    "gain": ("task gain", "nats"),
    "forgetting": ("forgetting", "nats"),
    "trained": ("trained numbers", "count"),
    "stored": ("beside the base", "bytes"),
    "memory": ("peak memory", "bytes"),
    "time": ("time", "s"),
}
"""What `compare --task` adds; none of it has the reference."""
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


def adapted(model: Model) -> dict[str, float]:
    """By quantity, of a model that was compared on a task."""
    metrics = {row["metric"]: row["value"] for row in model["metrics"]}
    return {
        "gain": metrics["task gain"],
        "forgetting": metrics["forgetting"],
        "trained": float(model["trainable_parameters"]),
        "stored": float(model["stored_bytes"]),
        "memory": float(model["peak_rss_bytes"]),
        "time": model["seconds"],
    }


def adapted_rows(models: Iterable[Model], prefix: str, settings: Mapping[str, Any]) -> list[Row]:
    """All quantities of adapted models, with the fronts that each is on."""
    return [
        Row(
            id=f"{prefix}-{model['label']}/{quantity}",
            kind="model",
            what=f"{model['label']}: {ADAPTED[quantity][0]}",
            unit=ADAPTED[quantity][1],
            values=(number,),
            settings={**settings, "on the front": ", ".join(model["fronts"]) or "none"},
        )
        for model in models
        for quantity, number in adapted(model).items()
    ]


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
