"""What MUSE asks a model, many texts at once, against one text at a time as its published evaluator asks.

The published code (`muse_bench`) has no licence and asks for a GPU: its procedure is written down here with the calls
that it makes, `generate` on one prompt, a forward pass of one text, and the scores' own packages.
"""

from __future__ import annotations

import time
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from rouge_score.rouge_scorer import RougeScorer
from sklearn.metrics import roc_auc_score
from transformers import AutoModelForCausalLM, AutoTokenizer

from bench.inputs import Inputs
from bench.results import Row, Target
from overhaul import artifact
from overhaul.forget_texts import NewsSettings, write_news
from overhaul.measure.muse import Muse
from overhaul.membership import auc
from overhaul.muse import Asking, Findings, Material, examine

TEXTS, SHOTS, WORDS, ROUNDS = 24, 10, 120, 2
HOW = Asking(prompt_tokens=32, tokens=128, answer_tokens=32, batch_size=16)
FASTER = 3.0
SAME_POINTS, SAME_NATS = 0.0, 1e-3
"""How far two evaluators may be apart, in points of ROUGE-L over all texts and in nats a token."""


def muse(inputs: Inputs, _peers: Path) -> list[Row]:
    """Tokens a second of both on one model, in turn, and how far their scores are apart."""
    # In bf16 batches of another shape round otherwise, and words that are as likely change places.
    dtype = torch.float32
    made = artifact.load(inputs.model, dtype=dtype)
    model: Any = AutoModelForCausalLM.from_pretrained(inputs.model, dtype=dtype).eval()
    tokenizer: Any = AutoTokenizer.from_pretrained(inputs.model)
    material = _material(inputs.work)
    tokens = _tokens(tokenizer, material)
    ours, theirs = [], []
    one, other = None, None
    for _ in range(ROUNDS):
        one, seconds = _timed(lambda: examine(made.model, made.processor, material, HOW, dtype=dtype))
        ours.append(tokens / seconds)
        other, seconds = _timed(lambda: _one_by_one(model, tokenizer, material))
        theirs.append(tokens / seconds)
    assert one
    assert other
    apart_points = max(
        abs(float(np.mean(getattr(one, field)) - np.mean(getattr(other, field))))
        for field in ("verbatim", "forgotten", "retained")
    )
    apart_nats = max(
        abs(a - b)
        for kind in one.scores
        for a, b in zip(one.scores[kind]["min-40%"], other.scores[kind]["min-40%"], strict=True)
    )
    seen, unseen = (other.scores[kind]["min-40%"] for kind in ("forget", "holdout"))
    theirs_auc = roc_auc_score([0] * len(seen) + [1] * len(unseen), [-score for score in (*seen, *unseen)])
    settings = {
        "model": "smollm2-135m", "data": "data news", "words": WORDS, "texts": 3 * TEXTS, "questions": 2 * TEXTS,
        "shots": SHOTS, "cores": torch.get_num_threads(), "batch_size": HOW.batch_size, "dtype": "float32",
    }  # fmt: skip
    bench: dict[str, Any] = {"kind": "bench", "settings": settings}
    return [
        Row(id="measure-muse/speed", what="Tokens read and written, all that MUSE asks", unit="tokens/s",
            values=tuple(ours), peer=tuple(theirs), target=Target(">=", FASTER),
            peer_name=f"transformers {transformers.__version__}, one text at a time as in muse_bench, fp32",
            **bench),
        Row(id="measure-muse/same-rouge", what="ROUGE-L, how far any of the means is from theirs", unit="points",
            values=(apart_points,), target=Target("<=", SAME_POINTS), **bench),
        Row(id="measure-muse/same-min-k", what="Min-40%, largest distance of a text's from theirs", unit="nats",
            values=(apart_nats,), target=Target("<=", SAME_NATS), **bench),
        Row(id="measure-muse/same-auc", what="AUC over sklearn's of their scores", unit="ratio",
            values=(auc(one.scores["forget"]["min-40%"], one.scores["holdout"]["min-40%"]) / float(theirs_auc),),
            **bench),
    ]  # fmt: skip


def _material(work: Path) -> Material:
    """The first articles of each kind, and as many questions about those to forget and to retain."""
    directory = work / "news"
    if not directory.exists():
        write_news(NewsSettings.model_validate({"words": WORDS}), directory)
    kinds = ("forget", "retain", "holdout", "shots", "forget-questions", "retain-questions")
    files = {kind.replace("-", "_"): str(directory / f"{kind}.jsonl") for kind in kinds}
    how = {"retrain": "none is asked", "limit": TEXTS, "num_shots": SHOTS}
    return Muse.model_validate({**files, **how}).material()


def _tokens(tokenizer: Any, material: Material) -> int:
    """That are read and written by both: texts, texts in lower case, prompts, and what may follow them."""
    texts = [text for of in material.splits().values() for text in of]
    prompts = [_asked(material, question) for question, _ in (*material.forget_questions, *material.retain_questions)]
    read = sum(len(tokenizer(text)["input_ids"]) for text in (*texts, *(text.lower() for text in texts), *prompts))
    return read + len(prompts) * HOW.answer_tokens + len(material.forget) * (HOW.prompt_tokens + HOW.tokens)


def _timed(call: Callable[[], Findings]) -> tuple[Findings, float]:
    began = time.perf_counter()
    found = call()
    return found, time.perf_counter() - began


def _asked(material: Material, question: str) -> str:
    before = "".join(f"Question: {one}\nAnswer: {answer}\n\n" for one, answer in material.shots)
    return f"{before}Question: {question}\nAnswer:"


@torch.no_grad()
def _one_by_one(model: Any, tokenizer: Any, material: Material) -> Findings:
    """The same findings by the published procedure."""
    scorer = RougeScorer(["rougeL"], use_stemmer=False)

    def written(prompt: str, tokens: int) -> str:
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        made = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=False,
            pad_token_id=tokenizer.eos_token_id,
        )  # fmt: skip
        return tokenizer.batch_decode(made[:, ids.shape[1] :], skip_special_tokens=True)[0]

    def rouge(text: str, wanted: str) -> float:
        return 100 * scorer.score(wanted, text)["rougeL"].fmeasure

    def answers(pairs: Sequence[tuple[str, str]]) -> tuple[float, ...]:
        found = []
        for question, answer in pairs:
            text = written(_asked(material, question), HOW.answer_tokens)
            for end in ("\n\n", "\nQuestion", "Question:"):
                text = text.split(end)[0]
            found.append(rouge(text, answer))
        return tuple(found)

    verbatim = []
    for text in material.forget:
        ids = tokenizer(text)["input_ids"]
        rest = tokenizer.decode(ids[HOW.prompt_tokens : HOW.prompt_tokens + HOW.tokens])
        verbatim.append(rouge(written(tokenizer.decode(ids[: HOW.prompt_tokens]), HOW.tokens), rest))
    return Findings(
        verbatim=tuple(verbatim),
        forgotten=answers(material.forget_questions),
        retained=answers(material.retain_questions),
        scores={kind: _scores(model, tokenizer, texts) for kind, texts in material.splits().items()},
    )


def _scores(model: Any, tokenizer: Any, texts: Sequence[str]) -> dict[str, tuple[float, ...]]:
    """Min-K%, loss, and the loss over those that it is divided by, of each text."""
    rows: dict[str, list[float]] = {}
    for text in texts:
        own, lowered = (_log_probabilities(model, tokenizer, one) for one in (text, text.lower()))
        loss = -float(np.mean(own))
        told = {"loss": loss, "loss/lowercase": loss / -float(np.mean(lowered)),
                "loss/zlib": loss / len(zlib.compress(text.encode()))}  # fmt: skip
        for share in (0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6):
            told[f"min-{share:.0%}"] = -float(np.mean(np.sort(own)[: int(len(own) * share)]))
        for name, value in told.items():
            rows.setdefault(name, []).append(value)
    return {name: tuple(values) for name, values in rows.items()}


def _log_probabilities(model: Any, tokenizer: Any, text: str) -> list[float]:
    ids = torch.tensor([tokenizer.encode(text)])
    logits_TV = model(ids, labels=ids).logits[0]
    probabilities_TV = torch.nn.functional.log_softmax(logits_TV.float(), dim=-1)
    return [probabilities_TV[place, token].item() for place, token in enumerate(ids[0, 1:].tolist())]
