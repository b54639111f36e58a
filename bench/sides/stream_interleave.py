"""The same mixture by `datasets`: `map` tokenises, `interleave_datasets` draws documents, each with a probability.

The first turn of a pair tokenises and takes the shares as probabilities; the second has the tokens, and takes shares
over mean lengths, as a careful user would; the time to find these is not counted. Documents are counted as they come
and not packed, which is less work.
"""

import itertools
import shutil
from pathlib import Path

import one_core  # noqa: F401 - before tokenizers
import turn
from datasets import Dataset, interleave_datasets
from transformers import AutoTokenizer

given = turn.settings()
tokenizer = AutoTokenizer.from_pretrained(given["model"])
cache, end = Path(given["work"]) / "arrow", [tokenizer.eos_token_id]
shares = given["shares"]
turn.forget_peak()
turn.wait()
turn.tell()  # everything is imported, nothing read


def encode(batch: dict) -> dict:
    ids = tokenizer(batch["text"], add_special_tokens=False, verbose=False)["input_ids"]
    return {"input_ids": [document + end for document in ids]}


def tokenised() -> dict[str, Dataset]:
    made = {}
    for name, file in given["files"].items():
        rows = Dataset.from_json(file, cache_dir=str(cache))
        made[name] = rows.map(
            encode, batched=True, remove_columns=["text"], cache_file_name=str(cache / f"{name}.arrow")
        )
    return made


def mix(sources: dict[str, Dataset], weights: dict[str, float]) -> dict[str, int]:
    """Tokens of each source among the first so many."""
    named = [
        source.add_column("source", [number] * len(source)).with_format("numpy").to_iterable_dataset()
        for number, source in enumerate(sources.values())
    ]
    total = sum(weights.values())
    mixed = interleave_datasets(
        named, probabilities=[weights[name] / total for name in sources], seed=0, stopping_strategy="all_exhausted"
    )
    counts = dict.fromkeys(sources, 0)
    names = list(sources)
    for row in itertools.chain(mixed, mixed):
        counts[names[int(row["source"])]] += len(row["input_ids"])
        if sum(counts.values()) >= given["tokens"]:
            break
    return counts


for _ in range(given["rounds"]):
    turn.wait()
    shutil.rmtree(cache, ignore_errors=True)
    turn.start()
    sources = tokenised()
    turn.tell(given=mix(sources, shares))
    turn.wait()
    means = {name: sum(map(len, source["input_ids"])) / len(source) for name, source in sources.items()}
    turn.start()
    turn.tell(given=mix(tokenised(), {name: shares[name] / means[name] for name in shares}))
turn.wait()
