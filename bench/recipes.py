"""What the recipes of `recipes/` make of the model they begin with."""

from __future__ import annotations

import hashlib
from pathlib import Path

from bench import comparing
from bench.inputs import Inputs
from bench.results import ROOT, Row
from overhaul import recipe
from overhaul.options import DEFAULT_CORPUS


def minitron(inputs: Inputs, _peers: Path) -> list[Row]:
    """Every step of recipes/minitron.yaml."""
    path = ROOT / "recipes" / "minitron.yaml"
    read = recipe.read(path)
    comparing.overhaul(inputs.work, "run", str(path))
    corpus = read.options.data or DEFAULT_CORPUS
    reference, models = comparing.compared(inputs.work, read.model, str(read.out), "--data", corpus)
    settings = {"recipe": path.name, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
    return [
        row
        for model in models
        for row in comparing.rows(
            f"recipe-minitron-{model['label']}", model["label"], comparing.numbers(model), reference, settings
        )
    ]
