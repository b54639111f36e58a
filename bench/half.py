"""The roads to half the size, as the tutorial types them, against the model they begin with, and others' one step."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import numpy as np
import torch

from bench import comparing
from bench.inputs import Inputs
from bench.results import ROOT, Row
from bench.turns import Side
from overhaul import artifact
from overhaul.corpora import CorpusSpec, open_corpus
from overhaul.data import Data
from overhaul.machine import compute_dtype
from overhaul.options import DEFAULT_CORPUS, Options

TUTORIAL = ROOT / "docs" / "tutorials" / "half-the-size.md"
FOLDER = "runs/half"
DTYPE = str(compute_dtype("auto", torch.device("cpu"))).removeprefix("torch.")
"""Of the peers' products too: what `compare` takes on this machine."""
PEERS = {"nf4": "bitsandbytes NF4, one step", "int8": "bitsandbytes LLM.int8(), one step"}


def commands(page: Path = TUTORIAL) -> list[list[str]]:
    """The commands of the tutorial that write a model, as words after `overhaul`."""
    lines = re.findall(r"^overhaul (.*)$", page.read_text(), re.MULTILINE)
    return [shlex.split(line) for line in lines if f"-o {FOLDER}/" in line]


def roads(inputs: Inputs, _peers: Path) -> list[Row]:
    """For every model of the tutorial its perplexity, size and speeds, beside those of the model it began with."""
    typed = commands()
    for words in typed:
        comparing.overhaul(inputs.work, *words)
    windows = _heldout(inputs)
    reference, models = comparing.compared(inputs.work, FOLDER, "--data", DEFAULT_CORPUS, "--html", "compare.html")
    settings = {"commands": [shlex.join(["overhaul", *words]) for words in typed]}
    rows = comparing.rows_of(models, reference, "half", settings)
    for kind, name in PEERS.items():
        rows += comparing.rows(f"half-peer-{kind}", name, _peer(inputs, kind, windows), reference, {"dtype": DTYPE})
    return rows


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
    given = {"model": str(inputs.model), "out": str(out), "kind": kind, "windows": str(windows), "dtype": DTYPE}
    with Side("half_bitsandbytes.py", given) as side:
        perplexity = side.turn().facts["perplexity"]
    return {"perplexity": perplexity, "size": float(artifact.size_on_disk(out))}
