"""The records every report is made from: plain, frozen data that can be written by hand in a test."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from overhaul.journal import TableNote
from overhaul.lineage import LineageStep
from overhaul.stability import gap
from overhaul.table import TOKENS, Curve, Row, Span
from overhaul.task_record import KINDS, TaskRecord

PERPLEXITY, LOSS = "perplexity", "loss"
"""The metric of every model that is judged, and its logarithm, in nats a token."""
BITS_PER_BYTE = "bits per byte"
"""The metric that compares models of different tokenizers."""
TASK_LOSS, TASK_GAIN, FORGETTING = "task loss", "task gain", "forgetting"
"""The metrics of adaptations, in nats a token: see `overhaul.adaptation`."""
LOSS_ON = "loss on"
"""How the metrics begin that are the losses on further corpora, in nats a token."""
SHOWN = 0.0005
"""The least change of a loss, in nats a token, that three decimals show; a smaller one is no gap."""
ACCURACY_OF = "accuracy, "
"""How the metrics begin that are accuracies over all tasks, of one kind of matrix."""
HELDOUT = "held-out"
"""How these are called in a training history, before a slash and the corpus."""
WHOLE = "whole"
"""The same of corpora of which nothing is held out."""


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
        kind: of model, where it is no language model, as `overhaul.kinds` tells it.
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
    kind: str = ""
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

    Attributes:
        curves, training: what was seen while the last one was trained, as pictures and as tables.
        tables: what its method compared; in a comparison, the chains.
        tasks: what became of the tasks that it learnt, if it learnt some.
    """

    title: str
    facts: tuple[Facts, ...]
    is_comparison: bool = False
    lineage: tuple[LineageStep, ...] = ()
    curves: tuple[Curve, ...] = ()
    training: tuple[TableNote, ...] = ()
    tables: tuple[TableNote, ...] = ()
    tasks: TaskRecord | None = None
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


def accuracies(facts: Facts) -> dict[str, Row]:
    """What a model that learnt tasks knows of them at the end, by kind of matrix."""
    found = {row.metric.removeprefix(ACCURACY_OF): row for row in facts.metrics if row.metric.startswith(ACCURACY_OF)}
    return {kind: row for kind, row in found.items() if kind in KINDS}


def metric(facts: Facts, name: str) -> float | None:
    """The value of a further metric; None where it was not measured."""
    return next((row.value for row in facts.metrics if row.metric == name), None)


HISTORY_LABELS = {
    "loss": "loss (nats per {one})",
    "perplexity": "held-out perplexity",
    "lr": "learning rate",
    "grad_norm": "gradient norm",
    HELDOUT: "held-out loss (nats per token)",
    WHOLE: "loss on whole texts (nats per token)",
}


def curves_of_history(
    history: Sequence[Mapping[str, float]],
    *,
    before: Mapping[str, float] | None = None,
    judged: str = "",
    unit: str = "tokens",
) -> tuple[Curve, ...]:
    """The curves in a training history: what was held out, loss, its terms if several, rate, gradient norm.

    Where further texts were watched, x is tokens trained on, and the text that models are judged on stands among them
    with its loss in place of its perplexity.

    Args:
        history: points `{"step":, "tokens":, "loss":, "loss/<term>":, "held-out/<corpus>":, "whole/<corpus>":, "lr":,
            "grad_norm":, ...}`; a key may be absent.
        before: losses on these before the first step, in nats a token, by corpus.
        judged: the corpus of the perplexity.
        unit: of what was counted, in the plural: losses are of one.
    """
    names = list(dict.fromkeys(key for point in history for key in point))
    terms = [name for name in names if name.startswith("loss/")]
    wanted = ["loss", *(terms if len(terms) > 1 else ()), "lr", "grad_norm"]
    if watched := _watched_curves(history, before or {}, judged):
        return (*watched, *_curves(history, wanted, "tokens", TOKENS, unit))
    wanted.insert(-2, "perplexity")
    return _curves(history, wanted, "step", "step", unit)


def _curves(
    history: Sequence[Mapping[str, float]], names: Sequence[str], x_key: str, x_label: str, unit: str
) -> tuple[Curve, ...]:
    curves = []
    for name in names:
        points = [(point[x_key], point[name]) for point in history if name in point]
        if points:
            x, y = zip(*points, strict=True)
            label = HISTORY_LABELS[name.split("/")[0]].format(one=unit.removesuffix("s"))
            curves.append(Curve(name=name, x=x, y=y, x_label=x_label, y_label=label))
    return tuple(curves)


def _watched_curves(
    history: Sequence[Mapping[str, float]], before: Mapping[str, float], judged: str
) -> tuple[Curve, ...]:
    """The losses on further texts, behind that which models are judged on; empty where no further one was watched."""
    losses: dict[str, list[tuple[int, float]]] = {judged: []}
    kinds = {judged: HELDOUT}
    for point in history:
        for key, loss in point.items():
            kind, _, text = key.partition("/")
            if kind in (HELDOUT, WHOLE):
                kinds[text] = kind
                losses.setdefault(text, []).append((int(point["tokens"]), loss))
    if not any(losses.values()):
        return ()
    if not losses[judged]:  # else it is watched itself
        losses[judged] = [
            (int(point["tokens"]), math.log(point["perplexity"])) for point in history if "perplexity" in point
        ]
    return tuple(_watched_curve(text, found, before.get(text), kinds[text]) for text, found in losses.items() if found)


def _watched_curve(text: str, points: Sequence[tuple[int, float]], before: float | None, kind: str) -> Curve:
    """Losses over tokens, with how far they rose above that before the first step."""
    x, y = zip(*points if before is None else [(0, before), *points], strict=True)
    title, spans = "", ()
    if before is not None and all(map(math.isfinite, y)):
        found = gap(list(zip(x, y, strict=True)))
        moved = f"ends {abs(found.final):.3f} {'higher' if found.final > 0 else 'lower'}"
        end = "ends where it began" if abs(found.final) < SHOWN else moved
        title = f"{text} {end}"
        if found.depth >= SHOWN:
            title = f"{text} rises by {found.depth:.3f} until {found.at:,} tokens, {end}"
            spans = (Span(x=found.at, low=before, high=before + found.depth, text=f"{found.depth:+.3f}"),)
    return Curve(name=text, x=x, y=y, x_label=TOKENS, y_label=HISTORY_LABELS[kind], title=title, spans=spans)


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


def labels_of(refs: Sequence[str]) -> list[str]:
    """The last part of each path, or as much of it as tells two of them apart."""
    most = max(len(Path(ref).parts) for ref in refs)
    shortened = [["/".join(Path(ref).parts[-count:]) for ref in refs] for count in range(1, most + 1)]
    return next((labels for labels in shortened if len(set(labels)) == len(set(refs))), list(refs))
