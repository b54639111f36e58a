"""A corpus that stays on disk is divided, tokenised, and read at its beginning and at its end, in one process."""

import os
from itertools import islice
from pathlib import Path
from typing import Any

import one_core  # noqa: F401 - before tokenizers
import turn

given = turn.settings()
os.environ["OVERHAUL_CACHE"] = given["cache"]

from transformers import AutoTokenizer  # noqa: E402

from overhaul import on_disk, tokens  # noqa: E402
from overhaul.corpora import open_corpus  # noqa: E402
from overhaul.data import Data  # noqa: E402
from overhaul.on_disk import RowsOnDisk  # noqa: E402

on_disk.LARGE_BYTES, tokens.SHARD_TOKENS = given["large_bytes"], given["shard_tokens"]
tokenizer = AutoTokenizer.from_pretrained(given["model"])
turn.forget_peak()
turn.wait()
turn.tell()  # everything is imported, nothing read

turn.wait()
corpus = open_corpus(Path(given["corpus"]))
assert isinstance(corpus.train, RowsOnDisk)
stream: Any = Data(corpus, tokenizer).endless(seq_len=given["seq_len"], in_order=True)
documents = stream.sources[0].sources[0]
windows = len(list(islice(stream, 1000)))
documents.load_own_state({"epoch": 0, "place": len(documents.held.shards) - 1, "cursor": 0})
windows += len(list(islice(stream, 1000)))
turn.tell(tokens=documents.held.num_tokens, shards=len(documents.held.shards), windows=windows)
turn.wait()
