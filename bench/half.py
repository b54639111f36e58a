"""The roads to half the size, as the tutorial types them, against the model they begin with, and others' one step."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np

from bench.inputs import Inputs
from bench.results import ROOT, Row
from bench.turns import Side
from overhaul import artifact
from overhaul.corpora import CorpusSpec, open_corpus
from overhaul.data import Data
from overhaul.options import DEFAULT_CORPUS, Options

TUTORIAL = ROOT / "docs" / "tutorials" / "half-the-size.md"
FOLDER = "runs/half"
PEERS = {"nf4": "bitsandbytes NF4, one step", "int8": "bitsandbytes LLM.int8(), one step"}
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
    windows = _heldout(inputs)
    reference, *models = json.loads(_overhaul(inputs.work, *compared))["rows"]
    settings = {"model": reference["label"], "commands": [shlex.join(["overhaul", *words]) for words in typed]}
    measured = {
        model["label"]: (model["label"], _numbers(model), {"on the front": ", ".join(model["fronts"]) or "none"})
        for model in models
    } | {f"peer-{kind}": (name, _peer(inputs, kind, windows), {}) for kind, name in PEERS.items()}
    before = _numbers(reference)
    return [
        Row(
            id=f"half-{slug}/{quantity}",
            kind="bench",
            what=f"{name}: {QUANTITIES[quantity][0]}",
            unit=QUANTITIES[quantity][1],
            values=(number,),
            peer=(before[quantity],),
            peer_name=f"{reference['label']}, {reference['dtype']}",
            settings=settings | chosen,
        )
        for slug, (name, after, chosen) in measured.items()
        for quantity, number in after.items()
    ]


def _heldout(inputs: Inputs) -> Path:
    """The windows that `compare --data sample` scores, as a file."""
    options = Options()
    data = Data(open_corpus(CorpusSpec(path=DEFAULT_CORPUS)), inputs.data.tokenizer)
    windows_NT = data.windows("heldout", seq_len=options.evaluate_seq_len, limit=options.evaluate_windows)
    path = inputs.work / "half-heldout.npy"
    np.save(path, windows_NT.numpy())
    return path


def _peer(inputs: Inputs, kind: str, windows: Path) -> dict[str, float]:
    """Perplexity and bytes of what bitsandbytes makes of the model through transformers."""
    out = inputs.work / f"half-peer-{kind}"
    given = {"model": str(inputs.model), "out": str(out), "kind": kind, "windows": str(windows)}
    with Side("half_bitsandbytes.py", given) as side:
        perplexity = side.turn().facts["perplexity"]
    return {"perplexity": perplexity, "size": float(artifact.size_on_disk(out))}


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
