"""What a model will see of a corpus: decoded windows with the trained tokens marked."""

from __future__ import annotations

from itertools import groupby
from typing import Any, Literal

from overhaul import pretrained
from overhaul.corpora import CorpusSpec, open_corpus
from overhaul.data import Data
from overhaul.stream import IGNORED, Take


def preview(
    corpus: str,
    model: str,
    *,
    field: str | None,
    split: Literal["train", "calib", "heldout"],
    windows: int,
    seq_len: int,
) -> dict[str, Any]:
    """The first windows of a split, decoded; text that is not trained on stands in `[[ ]]`."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(pretrained.resolve(model), local_files_only=True, trust_remote_code=False)
    opened = open_corpus(CorpusSpec(path=corpus, field=field))
    data = Data(opened, tokenizer)
    packed = data.packed(split, seq_len=seq_len)
    shown = [_marked(window, tokenizer) for window in Take(packed, windows)]
    if not shown:
        data.windows(split, seq_len=seq_len)  # raises the error with the lengths
    return {
        "corpus": opened.name,
        "licence": opened.licence,
        "train": len(opened.train),
        "calib": len(opened.calib),
        "heldout": len(opened.heldout),
        "notes": list(opened.notes),
        "windows": shown,
    }


def _marked(window: dict[str, Any], tokenizer: Any) -> dict[str, Any]:
    pairs = list(zip(window["input_ids"].tolist(), (window["labels"] != IGNORED).tolist(), strict=True))
    text = ""
    for trained, run in groupby(pairs, key=lambda pair: pair[1]):
        piece = tokenizer.decode([token for token, _ in run])
        text += piece if trained else f"[[{piece}]]"
    return {"tokens": len(pairs), "trained": sum(trained for _, trained in pairs), "text": text}
