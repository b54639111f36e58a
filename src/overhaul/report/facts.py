"""The records every report is made from: plain, frozen data that can be written by hand in a test."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from overhaul.journal import TableNote
from overhaul.lineage import LineageStep
from overhaul.table import Curve, Row

BITS_PER_BYTE = "bits per byte"
"""The metric that compares models of different tokenizers."""
TASK_LOSS, TASK_GAIN, FORGETTING = "task loss", "task gain", "forgetting"
"""The metrics of adaptations, in nats a token: see `overhaul.adaptation`."""
LOSS_ON = "loss on"
"""How the metrics begin that are the losses on further corpora, in nats a token."""
HELDOUT = "held-out"
"""How these are called in a training history, before a slash and the corpus."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerFacts:
    """One linear layer.

    Attributes:
        name: its dotted name, such as `model.layers.3.self_attn.q_proj`.
        sparsity: share of its weights that are zero.
        error: norm of the change over norm of the original: of the output on calibration data where the method
            read some, of the weights elsewhere.
    """

    name: str
    sparsity: float | None = None
    error: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """One model directory, measured; None is "not measured".

    Attributes:
        label: how tables call it: "dense", "pruned", "won back", or the directory's name.
        path: the directory or model name.
        parameters: how many numbers the model has, tied ones counted once.
        nonzero_share_blocks: share of non-zeros in the linear layers of the blocks, which pruning touches.
        nonzero_share_all: the same over all parameters, embeddings and norms included.
        bytes: weights on disk.
        stored_bytes: what has to be kept beside the reference of a comparison of adaptations.
        dtype: dtype on disk.
        perplexity: on `corpus`, in windows of `seq_len` tokens.
        metrics: other measurements, one per metric name.
        tokenizer: hash of the tokens that the held-out text became: perplexities compare where it is the same.
        tokens_per_second: speed of a forward pass over the held-out windows (prefill).
        decode_tokens_per_second: speed of greedy generation, one text at a time, the prompt already read.
        peak_rss_bytes, seconds: cost of the verb that made the directory.
        trainable_parameters, trainable_share: what that verb trained, if it trained.
        optimizer_bytes: what its optimizer kept.
        layers: per-layer numbers.
        generations: (prompt, text that follows it), prompts in the same order for every model.
    """

    label: str
    path: str
    parameters: int
    nonzero_share_blocks: float | None = None
    nonzero_share_all: float | None = None
    bytes: int | None = None
    stored_bytes: int | None = None
    dtype: str = ""
    perplexity: Row | None = None
    corpus: str = ""
    seq_len: int | None = None
    tokenizer: str = ""
    metrics: tuple[Row, ...] = ()
    tokens_per_second: float | None = None
    decode_tokens_per_second: float | None = None
    peak_rss_bytes: int | None = None
    seconds: float | None = None
    trainable_parameters: int | None = None
    trainable_share: float | None = None
    optimizer_bytes: int | None = None
    layers: tuple[LayerFacts, ...] = ()
    generations: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """All there is to say about a run; the first of `facts` is what the others are compared with.

    In a comparison the models stand side by side; otherwise each was made from the one before it.
    """

    title: str
    facts: tuple[Facts, ...]
    is_comparison: bool = False
    lineage: tuple[LineageStep, ...] = ()
    curves: tuple[Curve, ...] = ()
    tables: tuple[TableNote, ...] = ()
    recipe_yaml: str = ""
    commands: tuple[str, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()


def same_tokens(one: Facts, other: Facts) -> bool:
    """Whether their perplexities compare: they were taken over the same tokens, as far as the records say."""
    return not (one.tokenizer and other.tokenizer) or one.tokenizer == other.tokenizer


def quality(facts: Facts) -> Row | None:
    """What a model is judged by: task loss or bits per byte where that was taken, else perplexity; less is better."""
    return next((row for row in facts.metrics if row.metric in (TASK_LOSS, BITS_PER_BYTE)), facts.perplexity)


def metric(facts: Facts, name: str) -> float | None:
    """The value of a further metric; None where it was not measured."""
    return next((row.value for row in facts.metrics if row.metric == name), None)


HISTORY_LABELS = {
    "loss": "loss (nats per token)",
    "perplexity": "held-out perplexity",
    "lr": "learning rate",
    "grad_norm": "gradient norm",
    HELDOUT: "held-out loss (nats per token)",
}


def curves_of_history(history: Sequence[Mapping[str, float]]) -> tuple[Curve, ...]:
    """The curves in a training history: loss, its terms if several, what was held out, rate, gradient norm.

    Args:
        history: points `{"step":, "loss":, "loss/<term>":, "held-out/<corpus>":, "lr":, "grad_norm":, ...}`; a key may
            be absent.
    """
    names = list(dict.fromkeys(key for point in history for key in point))
    terms = [name for name in names if name.startswith("loss/")]
    watched = [name for name in names if name.startswith(f"{HELDOUT}/")]
    wanted = ["loss", *(terms if len(terms) > 1 else ()), "perplexity", *watched, "lr", "grad_norm"]
    curves = []
    for name in wanted:
        points = [(point["step"], point[name]) for point in history if name in point]
        if points:
            x, y = zip(*points, strict=True)
            label = HISTORY_LABELS[name.split("/")[0]]
            curves.append(Curve(name=name, x=x, y=y, x_label="step", y_label=label))
    return tuple(curves)


@dataclass(frozen=True, slots=True, kw_only=True)
class Recovery:
    """How much of the log-perplexity gap between the reference and the worst model each model has closed.

    Attributes:
        reference, worst: the ends of the gap: 1 and 0.
        shares: (label, share) of every model but the reference; above 1 is better than the reference.
    """

    reference: Facts
    worst: Facts
    shares: tuple[tuple[str, float], ...]


def recovery(facts: Sequence[Facts]) -> Recovery | None:
    """(ln worst - ln model) / (ln worst - ln reference); None where nothing was lost or little is known."""
    measured = [
        (one, math.log(one.perplexity.value)) for one in facts if one.perplexity and math.isfinite(one.perplexity.value)
    ]
    if len(measured) < 3 or measured[0][0] is not facts[0] or not all(same_tokens(facts[0], one) for one in facts):
        return None
    reference, best = measured[0]
    worst, lost = max(measured, key=lambda pair: pair[1])
    if lost <= best:
        return None
    shares = tuple((one.label, (lost - log) / (lost - best)) for one, log in measured[1:])
    return Recovery(reference=reference, worst=worst, shares=shares)
