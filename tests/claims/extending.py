"""What the claims of `extend` share: runs from directory to directory, and small models with their own vocabulary."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from command import overhaul
from overhaul import catalog
from overhaul.corpora import open_corpus
from overhaul.execute import run_step
from overhaul.method import Training
from overhaul.options import Options
from overhaul.recipe import Step
from overhaul.report.facts import HELDOUT, LOSS_ON
from vocabulary import byte_level_bpe

HIDDEN, FFN, LAYERS, VOCABULARY = 128, 352, 4, 1024
SEQ_LEN = 128


@dataclass(frozen=True, slots=True)
class Extended:
    """What a run made of the losses on the texts that were watched.

    Attributes:
        before, after: by text, in nats a token.
        points: of the history.
    """

    before: dict[str, float]
    after: dict[str, float]
    points: list[dict[str, Any]]


def extended(
    model: Path, out: Path, method: Training, *, data: str, watch: Sequence[str], seed: int, windows: int = 64
) -> Extended:
    """Runs a method of `extend` from one directory to another; held-out windows are `SEQ_LEN` tokens long."""
    entry = next(e for e in catalog.methods("extend") if e.load() is type(method))
    options = Options(
        data=data, evaluate="none", watch=tuple(watch), seed=seed, evaluate_windows=windows, evaluate_seq_len=SEQ_LEN
    )
    outcome = run_step(Step(entry=entry, method=method, options=options), str(model), out)
    assert outcome
    before, after = (
        {row.metric.removeprefix(f"{LOSS_ON} "): row.value for row in facts.metrics} for facts in outcome.facts[-2:]
    )
    lines = (out / "metrics.jsonl").read_text().splitlines()
    return Extended(before, after, [json.loads(line) for line in lines])


def first_points(run: Extended, text: str, count: int) -> list[float]:
    """The first losses on a text that were taken while training."""
    return [point[f"{HELDOUT}/{text}"] for point in run.points if f"{HELDOUT}/{text}" in point][:count]


def write_problems(directory: Path) -> Path:
    """Arithmetic in words with worked answers, each another one: a small text of value, as a .jsonl file."""
    file = directory / "problems.jsonl"
    done = overhaul("data", "questions", "-o", file, "--kinds", "arithmetic", "--count", "4000", "--largest", "99")
    assert done.code == 0, done.err
    return file


def write_blank(directory: Path, corpora: Sequence[str]) -> Path:
    """A small Llama with random weights and a byte-level vocabulary that was learnt on the corpora."""
    from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

    texts = (str(row["text"]) for corpus in corpora for row in open_corpus(corpus).train)
    bpe = byte_level_bpe(texts, VOCABULARY, ["<|end|>"])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|end|>", pad_token="<|end|>")
    config = LlamaConfig(
        hidden_size=HIDDEN, intermediate_size=FFN, num_hidden_layers=LAYERS, num_attention_heads=4,
        vocab_size=len(tokenizer), max_position_embeddings=512, tie_word_embeddings=True,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, bos_token_id=None,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory
