"""Looking at a model, and at this machine, without changing them."""

from __future__ import annotations

from typing import Any

from overhaul import artifact as artifacts
from overhaul import banks, ledger, machine, pretrained
from overhaul.corpora import CorpusSpec, open_whole
from overhaul.fetch import cache_directory
from overhaul.judge import counts, short
from overhaul.kinds import Kind
from overhaul.unlearning import seen as in_ledger


def describe(ref: str) -> dict[str, Any]:
    """Parameters, non-zero share, size, type and lineage of a model.

    Returns:
        `{"parameters", "nonzero_share", "nonzero_share_blocks", "bytes", "dtype", "verified", "banks", "ledger",
        "lineage"}`; banks are the names of the tasks that it has tensors for, the ledger is as `ledger.sources`; each
        lineage entry has `verb`, `method`, `fields`, `parent`, `seconds`, `peak_rss_bytes` and more.
    """
    made = artifacts.load(ref, kinds=tuple(Kind))
    counted = counts(made.model)
    return {
        "parameters": counted["parameters"],
        "nonzero_share": counted["nonzero_share_all"],
        "nonzero_share_blocks": counted["nonzero_share_blocks"],
        "bytes": artifacts.size_on_disk(made.path),
        "dtype": short(made.dtype),
        "verified": made.record.get("weights_sha256") == made.weights_sha256,
        "banks": banks.tasks_of(made.path),
        "ledger": ledger.sources(ledger.read(made.path)),
        "lineage": [step.to_json() for step in made.lineage],
    }


def seen(ref: str, corpus: str) -> dict[str, Any]:
    """Which documents of a corpus a model was trained on, by its ledger.

    Args:
        ref: the model.
        corpus: a name, a file or a directory; its documents as they stand there.

    Returns:
        `{"corpus", "documents", "seen", "tokens", "last", "numbers", "untold", "told"}`: numbers are those of the seen
        documents in the corpus, from 1; untold are steps of which the ledger says nothing; told is a sentence.

    Raises:
        UserError: the model has no ledger, or there is no such corpus.
    """
    path = pretrained.resolve(ref)
    entries, rows = in_ledger.entries_of(path), tuple(open_whole(CorpusSpec(path=corpus)).train)
    known = in_ledger.known(rows, entries)
    return {
        "corpus": corpus,
        "documents": known.total,
        "seen": known.seen,
        "tokens": known.tokens,
        "last": known.last,
        "numbers": [place + 1 for place in known.places],
        "untold": list(in_ledger.untold(path, entries)),
        "told": known.told(),
    }


def doctor() -> dict[str, Any]:
    """Versions, hardware, caches."""
    device = machine.pick_device("auto")
    cache = cache_directory()
    held = sum(file.stat().st_size for file in cache.rglob("*") if file.is_file()) if cache.exists() else 0
    models = [name for name in pretrained.NAMED if (cache / "models" / name / "config.json").is_file()]
    return {
        **machine.versions(),
        "device": str(device),
        "hardware": machine.hardware(device),
        "matrix products": short(machine.compute_dtype("auto", device)),
        "free memory": f"{machine.free_bytes() / 1e9:.1f} GB",
        "cache": f"{cache} ({held / 1e6:.0f} MB)",
        "models in cache": ", ".join(models) or "none",
    }
