"""What was trained, written beside the weights: a file for each stage, and the book."""

from __future__ import annotations

import getpass
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors.torch import save_file
from torch import Tensor

from overhaul import banks, disk, journal, machine
from overhaul.deletion.book import FOLDER, STAGES, Book, Example, Stage, key_of
from overhaul.deletion.ensemble import Ensemble
from overhaul.deletion.sequences import Order

if TYPE_CHECKING:
    from overhaul.unlearning.stagewise import Stagewise


def note_service(run: Stagewise) -> None:
    """Leaves what was trained to be written beside the weights.

    Args:
        run: all of whose stages are trained, and whose model is bare again.
    """
    rows = [
        (f"{shard}", f"{place}", f"{len(members)}", f"{sum(member.copies for member in members)}")
        for (shard, place), members in run.members.items()
    ]
    by = run.method.together or "content"
    journal.note_table(
        f"Who is where: each example by its {by} and the seed alone.", ("shard", "slice", "examples", "rows"), rows
    )
    settings = settings_of(run)
    journal.note_answering(lambda: _answering(run, settings))
    journal.note_files(lambda directory: _write(run, settings, directory))


@contextmanager
def _answering(run: Stagewise, settings: Mapping[str, Any]) -> Iterator[None]:
    """Inside, the model answers with all stages of each shard's first sequence, and the head of the last one."""
    ensemble = Ensemble.of(run.model, settings)
    ensemble.take({
        shard: {name: t for length in range(1, len(first) + 1) for name, t in run.kept[shard, first[:length]].items()}
        for shard, (first, *_) in enumerate(run.orders)
    })  # fmt: skip
    try:
        yield
    finally:
        ensemble.remove()


def settings_of(run: Stagewise) -> dict[str, Any]:
    """What the stages fit, plain data."""
    return {
        "base": banks.fingerprint(run.model),
        "seed": run.data.seed,
        "shards": run.method.shards,
        "slices": run.method.slices,
        "rank": run.method.rank,
        "scale": run.method.scaled() / run.method.rank,
        "layers": run.names,
        "head": run.answering.head,
        "tags": list(run.method.tags),
        "label": run.method.label_field,
        **run.answering.settings(),
    }


def _write(run: Stagewise, settings: Mapping[str, Any], directory: Path) -> None:
    (directory / FOLDER / STAGES).mkdir(parents=True)
    stages = [_stage(directory, shard, order, tensors) for (shard, order), tensors in run.kept.items()]
    secret = os.urandom(32)
    examples = (
        Example(key_of(secret, member.row.id), shard, place, member.copies, member.tags)
        for (shard, place), members in run.members.items()
        for member in members
    )
    told = {
        "by": whoami(),
        "at": machine.now(),
        "data": run.data.corpus.name,
        "fingerprint": run.data.corpus.fingerprint,
    }
    how: dict[str, Any] = {"settings": settings, "orders": run.orders, "secret": secret}
    Book.begin(directory, examples=examples, stages=stages, told=told, **how)


def _stage(directory: Path, shard: int, order: Order, tensors: Mapping[str, Tensor]) -> Stage:
    name = f"{STAGES}/{shard}-{'-'.join(map(str, order))}.safetensors"
    path = directory / FOLDER / name
    kept = {own: tensor.cpu().contiguous() for own, tensor in tensors.items()}
    save_file(kept, path, metadata={"overhaul": json.dumps({"shard": shard, "sequence": order})})
    return Stage(shard, order, name, disk.sha256(path), path.stat().st_size)


def whoami() -> str:
    """The user who runs this, as the system calls them."""
    try:
        return getpass.getuser()
    except (OSError, KeyError):  # a container may run under a number without a name
        return f"user {os.getuid()}"
