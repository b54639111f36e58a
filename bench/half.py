"""The roads to half the size, as the tutorial types them, against the model they begin with."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

from bench.inputs import Inputs
from bench.results import ROOT, Row

TUTORIAL = ROOT / "docs" / "tutorials" / "half-the-size.md"
FOLDER = "runs/half"
QUANTITIES = {
    "perplexity": ("held-out perplexity", ""),
    "size": ("weights on disk", "bytes"),
    "prefill": ("reading", "tokens/s"),
    "decode": ("writing", "tokens/s"),
}


def commands(page: Path = TUTORIAL) -> list[list[str]]:
    """The commands of the tutorial that write a model, as words after `overhaul`."""
    lines = re.findall(r"^overhaul (.*)$", page.read_text(), re.MULTILINE)
    return [shlex.split(line) for line in lines if f"-o {FOLDER}/" in line]


def roads(inputs: Inputs, _peers: Path) -> list[Row]:
    """For every model of the tutorial its perplexity, size and speeds, beside those of the model it began with."""
    typed = commands()
    for words in typed:
        _overhaul(inputs.work, *words)
    compared = ("compare", FOLDER, "--data", "sample", "--html", "compare.html", "--json")
    reference, *models = json.loads(_overhaul(inputs.work, *compared))["rows"]
    settings = {"model": reference["label"], "commands": [shlex.join(["overhaul", *words]) for words in typed]}
    rows = []
    for model in models:
        before, after = _numbers(reference), _numbers(model)
        chosen = {"on the front": ", ".join(model["fronts"]) or "none"}
        rows += [
            Row(
                id=f"half-{model['label']}/{name}",
                kind="bench",
                what=f"{model['label']}: {what}",
                unit=unit,
                values=(after[name],),
                peer=(before[name],),
                peer_name=f"{reference['label']}, {reference['dtype']}",
                settings=settings | chosen,
            )
            for name, (what, unit) in QUANTITIES.items()
        ]
    return rows


def _numbers(row: dict[str, Any]) -> dict[str, float]:
    return {
        "perplexity": row["perplexity"]["value"],
        "size": float(row["bytes"]),
        "prefill": row["tokens_per_second"],
        "decode": row["decode_tokens_per_second"],
    }


def _overhaul(folder: Path, *words: str) -> str:
    """Runs a command in `folder`, its progress shown; returns what it prints."""
    command = [sys.executable, "-m", "overhaul", *words]
    return subprocess.run(command, cwd=folder, stdout=subprocess.PIPE, text=True, check=True).stdout
