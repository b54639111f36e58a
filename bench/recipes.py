"""What the recipes of `recipes/` make of the model they begin with."""

from __future__ import annotations

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
    return comparing.rows_of(models, reference, "recipe-minitron", {"recipe": path.name})
