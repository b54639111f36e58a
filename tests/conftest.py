"""Models for the tests: `tiny` (made here, in a second) and `smol` (SmolLM2-135M, for the slow tests).

Both are directories as anyone has them on disk: a test loads what it needs with transformers.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

from overhaul import pretrained
from tiny_models import MakeTiny, write_tiny

# Read when the packages are imported, so set before any test can import them; child processes inherit both.
os.environ["HF_HUB_OFFLINE"] = "1"
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"  # the workers share the cores already


@pytest.fixture(scope="session")
def make_tiny(tmp_path_factory: pytest.TempPathFactory) -> MakeTiny:
    """`make_tiny(dtype="float32", tie=True, bias=False, architecture="llama")` -> a model directory.

    Two layers, 64 wide, a byte-level BPE vocabulary of 512; random, but the same in every run. Each variant
    is written once and shared by all workers: treat it as read-only.
    """
    root = tmp_path_factory.getbasetemp()
    shared = root.parent if "PYTEST_XDIST_WORKER" in os.environ else root

    def make(*, dtype: str = "float32", tie: bool = True, bias: bool = False, architecture: str = "llama") -> Path:
        directory = shared / f"tiny-{architecture}-{dtype}{'-tied' if tie else ''}{'-bias' if bias else ''}"
        with FileLock(f"{directory}.lock"):
            if not (directory / "config.json").is_file():
                write_tiny(directory, dtype, tie, bias, architecture)
        return directory

    return make


@pytest.fixture(scope="session")
def tiny(make_tiny: MakeTiny) -> Path:
    """A Llama of 2 layers with tied embeddings, fp32."""
    return make_tiny()


@pytest.fixture(scope="session")
def private(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `private.jsonl`, prompts and answers of a task, and `heldout.jsonl`, others of it."""
    from bench import checkable

    folder, rows = tmp_path_factory.mktemp("private"), checkable.examples("sorting", 180, seed=0)
    checkable.write(folder / "private.jsonl", rows[:160])
    checkable.write(folder / "heldout.jsonl", rows[160:])
    return folder


@pytest.fixture(scope="session")
def adapter(tiny: Path, private: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA adapter of the tiny model, trained on the private rows so long that its answers differ."""
    from command import overhaul

    out = tmp_path_factory.mktemp("adapters") / "adapter"
    how = ("--steps", 150, "--seq-len", 64, "--batch-size", 4, "--lr", 1e-2, "--dtype", "fp32", "--evaluate", "none")
    done = overhaul("adapt", "lora", tiny, "-o", out, "--data", private / "private.jsonl", "--no-merge", *how)
    assert done.code == 0, done.err
    return out


@pytest.fixture(scope="session")
def bundle(adapter: Path, private: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `overhaul bundle` makes of the adapter."""
    from command import overhaul

    out = tmp_path_factory.mktemp("bundles") / "bundle"
    done = overhaul("bundle", adapter, "-o", out, "--data", private / "private.jsonl", "--rows", 40, "--steps", 10)
    assert done.code == 0, done.err
    return out


@pytest.fixture
def batch() -> dict[str, Any]:
    """Two windows of 16 tokens for a model, the second trained on its beginning only."""
    import torch

    from overhaul.stream import IGNORED

    ids_BT = torch.arange(2 * 16).view(2, 16)
    labels_BT = ids_BT.clone()
    labels_BT[1, 4:] = IGNORED
    return {"input_ids": ids_BT, "labels": labels_BT}


@pytest.fixture(scope="session")
def smol() -> Path:
    """SmolLM2-135M, bf16, from the cache."""
    directory = pretrained.cached(pretrained.DEFAULT)
    if directory is None:
        pytest.skip(f"{pretrained.DEFAULT} is not in the cache: `make claims` fetches it")
    return directory
