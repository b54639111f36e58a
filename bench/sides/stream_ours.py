"""A mixture of three files by this project's streams, as windows: with tokenising, and of tokens that are kept."""

import shutil
from pathlib import Path

import one_core  # noqa: F401 - before tokenizers
import turn
from transformers import AutoTokenizer

from overhaul import tokens
from overhaul.corpora import NO_CORPUS
from overhaul.data import Data
from overhaul.documents import Reading
from overhaul.mixture import Mix, Phase
from overhaul.stream import Pack, Repeat, num_tokens
from overhaul.tokens import Documents

given = turn.settings()
data = Data(NO_CORPUS, AutoTokenizer.from_pretrained(given["model"]))
kept = Path(given["work"]) / "tokens"
turn.forget_peak()
turn.wait()
turn.tell()  # everything is imported, nothing read


def read() -> None:
    sources = {
        name: tokens.on_disk(Reading(Path(file), "text"), data.encoded, kept / name, name=name, fingerprint=name)
        for name, file in given["files"].items()
    }
    windows = {name: Pack(Repeat(Documents(held, seed=0)), seq_len=given["seq_len"]) for name, held in sources.items()}
    mixture = Mix(windows, [Phase(given["shares"], given["tokens"])])
    seen = sum(num_tokens(window) for window in mixture)
    counts = {drawn.name: drawn.tokens for drawn in mixture.ledger()}
    assert seen == sum(counts.values())
    turn.tell(given=counts)


for _ in range(given["rounds"]):
    turn.wait()
    shutil.rmtree(kept, ignore_errors=True)
    turn.start()
    read()
    turn.wait()
    read()
turn.wait()
