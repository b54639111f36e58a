"""Before and after: the same held-out windows and prompts for every model of a chain."""

from __future__ import annotations

import hashlib
import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from overhaul import artifact as artifacts
from overhaul import evaluate, machine
from overhaul.artifact import Artifact
from overhaul.corpora import Corpus, CorpusSpec, open_corpus
from overhaul.data import Data
from overhaul.errors import UserError
from overhaul.journal import LayerNote
from overhaul.kinds import is_classifier, kind_of_model
from overhaul.layers import Packed
from overhaul.layers.masked import MaskedLinear
from overhaul.options import DEFAULT_CORPUS, Options
from overhaul.progress import say
from overhaul.report.facts import BITS_PER_BYTE, HELDOUT, LOSS_ON, WHOLE, Facts, LayerFacts
from overhaul.select import block_weights
from overhaul.stream import IGNORED
from overhaul.table import Row
from overhaul.unlearning import texts

PROMPTS = ("The capital of France is", "It was a bright morning, and the old man")
PROMPT_TOKENS = 32
Inside = Callable[[], AbstractContextManager[None]]
"""Makes a context in which a model is measured."""
TIMED_WINDOWS = 6
"""Held-out windows for a speed alone: three batches, so that the median is not the one that warms up."""


@dataclass(frozen=True, slots=True)
class Judge:
    """Measures models on one held-out text.

    Attributes:
        corpus: its held-out part is read; None measures no quality.
        windows: the held-out windows.
        dtype: of matrix products.
        watched: held-out windows of further corpora, by name, and those of whole ones.
        labels: of the whole ones, which tokens count; of the others all do.
    """

    corpus: Corpus | None
    windows: Tensor | None
    processor: Any
    dtype: torch.dtype
    watched: Mapping[str, Tensor] = field(default_factory=dict)
    labels: Mapping[str, Tensor] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        options: Options,
        corpus: Corpus | None,
        processor: Any,
        dtype: torch.dtype,
        watched: Iterable[Corpus] = (),
        whole: Iterable[Corpus] = (),
    ) -> Judge:
        """The judge that the options ask for: on --evaluate, else on the corpus of --data, else on the sample.

        Args:
            options: what is judged on.
            corpus: that of --data.
            processor: the tokenizer.
            dtype: of matrix products.
            watched: further corpora, each under a name of its own.
            whole: the same, of which nothing is held out: all of their text is watched.

        Raises:
            UserError: there is no such corpus, its held-out part is shorter than one window, or nothing of it counts.
        """

        def heldout(corpus: Corpus) -> Tensor:
            return Data(corpus, processor).windows("heldout", seq_len=length, limit=limit, flag="--evaluate-seq-len")

        length, limit = options.evaluate_seq_len, options.evaluate_windows
        all_of = {one.name: texts.cut(Data(one, processor), length, once=True) for one in whole}
        labels = {name: found["labels"][:limit] for name, found in all_of.items()}
        if unread := next((name for name, of in labels.items() if not (of[:, 1:] != IGNORED).any()), None):
            raise UserError(f"no token of {unread} counts within {limit} windows", hint="a larger --evaluate-windows")
        beside = {name: found["input_ids"][:limit] for name, found in all_of.items()}
        beside |= {one.name: heldout(one) for one in watched}
        if options.evaluate == "none":
            return cls(None, None, processor, dtype, beside, labels)
        if options.evaluate is not None or corpus is None:
            corpus = open_corpus(CorpusSpec(path=options.evaluate or DEFAULT_CORPUS))
        return cls(corpus, heldout(corpus), processor, dtype, beside, labels)

    @property
    def key(self) -> str:
        """Facts measured under one key can be compared."""
        watched = "".join(
            f"/{name}:{_hash(windows, *self._counted(name))}:{tuple(windows.shape)}:{self.dtype}"
            for name, windows in self.watched.items()
        )
        if self.corpus is None or self.windows is None:
            return f"none{watched}"
        return f"{self.corpus.fingerprint[:16]}/{tuple(self.windows.shape)}/{self.dtype}{watched}"

    def probe(self, model: nn.Module) -> dict[str, float]:
        """Held-out perplexity, and the losses on what is watched, for evaluation while training."""
        kinds = {name: WHOLE if name in self.labels else HELDOUT for name in self.watched}
        rows = zip(kinds.items(), self._watched(model), strict=True)
        losses = {f"{kind}/{name}": row.value for (name, kind), row in rows}
        if self.windows is None:
            return losses
        return {"perplexity": evaluate.perplexity(model, self.windows, dtype=self.dtype).estimate.value, **losses}

    def _watched(self, model: nn.Module, label: str = "") -> tuple[Row, ...]:
        """The loss on each further corpus, in nats a token."""
        found = []
        for name, windows_NT in self.watched.items():
            (labels_NT,) = self._counted(name) or (windows_NT,)
            losses = evaluate.window_losses(model, windows_NT, labels_NT, dtype=self.dtype)
            found.append(Row(model=label, metric=f"{LOSS_ON} {name}", **asdict(evaluate.mean_loss(losses))))
        return tuple(found)

    def _counted(self, name: str) -> tuple[Tensor, ...]:
        """The labels of a text, where not all tokens count."""
        return (self.labels[name],) if name in self.labels else ()

    def chain(self, parent: Artifact) -> tuple[Facts, ...]:
        """Facts of the parent and of what it was made from, as its record has them under this key.

        Where it has none, the parent and the model that its chain began with are measured now.
        """
        stored = self._stored(parent)
        if stored or not parent.lineage or self.windows is None:
            return stored or (self.of_directory(parent),)
        last, reference = parent.lineage[-1], self._reference(parent)
        label = _label(last.verb, last.method, reference) if reference else Path(parent.name).name
        return (*reference, replace(self.of_directory(parent), label=label))

    def of_directory(self, made: Artifact) -> Facts:
        """Facts of one model as it lies on disk, from its record if they are there under this key."""
        if stored := self._stored(made):
            return stored[-1]
        label = Path(made.name).name if made.lineage else ("pruned" if _is_masked(made.model) else "dense")
        size = artifacts.size_on_disk(made.path)
        facts = replace(self.facts(made.model, label=label, path=made.name), bytes=size, dtype=short(made.dtype))
        if not made.lineage:
            return facts
        last = made.lineage[-1]
        return replace(facts, seconds=last.seconds, peak_rss_bytes=last.peak_rss_bytes)

    def _stored(self, made: Artifact) -> tuple[Facts, ...]:
        """The facts in the record, if they were measured under this key, on the same tokens and of these weights.

        What was watched there and is not watched here is left out.
        """
        record = made.record
        if record.get("weights_sha256") != made.weights_sha256 or not self._covered(record.get("facts_key") or ""):
            return ()
        facts = tuple(self._of_interest(read_facts(stored)) for stored in record["facts"])
        # Another chat template makes other tokens of the same conversations.
        return facts if all(one.tokenizer == self.tokenizer for one in facts) else ()

    def _covered(self, key: str) -> bool:
        """Whether facts under another key have all that this judge measures."""
        return f"{key}/".startswith(f"{self.key}/")  # what is watched stands at the end, one text after the other

    def _of_interest(self, facts: Facts) -> Facts:
        """The facts without the losses on texts that are not watched."""
        watched = {f"{LOSS_ON} {name}" for name in self.watched}
        kept = tuple(row for row in facts.metrics if not row.metric.startswith(LOSS_ON) or row.metric in watched)
        return replace(facts, metrics=kept)

    def _reference(self, parent: Artifact) -> tuple[Facts, ...]:
        """Facts of the model that the chain began with, if it is still there as it was."""
        first = parent.lineage[0].parents[0]
        if artifacts.unchanged(first) is None:
            say(f"{first.path} is no longer there as it was: the table begins with {parent.name}")
            return ()
        device = next(parent.model.parameters()).device
        return (self.of_directory(artifacts.load(first.path, device=device, dtype=machine.weights_dtype(self.dtype))),)

    def after(
        self,
        changed: Artifact,
        before: Sequence[Facts],
        layers: Sequence[LayerNote],
        verb: str,
        method: str,
        *,
        answering: Inside = nullcontext,
    ) -> Facts:
        """Facts of the result of a step; bytes on disk are filled in once it is written.

        Args:
            changed: the result.
            before: facts of the models that it was made from.
            layers: what the method said about some.
            verb, method: of the step.
            answering: makes a context in which the model answers with what will lie beside it.
        """
        step, label = changed.lineage[-1], _label(verb, method, before)
        facts = self.facts(changed.model, label=label, path="", errors=layers, answering=answering)
        trained = step.trainable_parameters
        return replace(
            facts,
            dtype=short(changed.dtype),
            seconds=step.seconds,
            peak_rss_bytes=step.peak_rss_bytes,
            trainable_parameters=trained,
            trainable_share=trained / facts.parameters if trained else None,
            optimizer_bytes=step.optimizer_bytes,
        )

    def facts(
        self,
        model: nn.Module,
        *,
        label: str,
        path: str,
        errors: Sequence[LayerNote] = (),
        answering: Inside = nullcontext,
    ) -> Facts:
        """Everything about a model in memory that tables show."""
        with answering():
            quality, watched = self._quality(model, label, path), self._watched(model, path or label)
        kind = kind_of_model(model).value if is_classifier(model) else ""
        return Facts(label=label, path=path, kind=kind, metrics=watched, **counts(model, errors), **quality)

    def _quality(self, model: nn.Module, label: str, path: str) -> dict[str, Any]:
        """What is measured on the judge's own text; nothing without one."""
        quality: dict[str, Any] = {}
        if self.corpus is not None and self.windows is not None:
            num_windows, seq_len = self.windows.shape
            say(f"measuring {label}: {num_windows} windows of {seq_len} tokens of {self.corpus.name}")
            scored = evaluate.perplexity(model, self.windows, dtype=self.dtype)
            estimate = asdict(scored.estimate)
            said = self._said(model)
            quality = {
                "perplexity": Row(model=path or label, metric="perplexity", **estimate),
                "corpus": self.corpus.name,
                "seq_len": self.windows.shape[1],
                "tokenizer": self.tokenizer,
                "tokens_per_second": scored.tokens_per_second,
                "decode_tokens_per_second": _decode_speed(said),
                "generations": tuple((prompt, one.text) for prompt, one in zip(PROMPTS, said, strict=True)),
            }
        return quality

    def timed(self, facts: Facts, model: nn.Module) -> Facts:
        """The facts with speeds that are measured now: those of a record may be from another machine or hour."""
        if self.windows is None:
            return facts
        scored = evaluate.perplexity(model, self.windows[:TIMED_WINDOWS], dtype=self.dtype)
        return replace(
            facts,
            tokens_per_second=scored.tokens_per_second,
            decode_tokens_per_second=_decode_speed(self._said(model)),
        )

    def with_bits_per_byte(self, facts: Facts) -> Facts:
        """The facts with a further metric that compares across tokenizers; it follows from the perplexity."""
        if self.windows is None or facts.perplexity is None:
            return facts
        texts = self.processor.batch_decode(
            self.windows[:, 1:].tolist(), skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        num_bytes = sum(len(text.encode()) for text in texts)
        scale = facts.perplexity.count / num_bytes
        value, low, high = (
            scale * math.log2(number)
            for number in (facts.perplexity.value, facts.perplexity.low, facts.perplexity.high)
        )
        row = Row(model=facts.perplexity.model, metric=BITS_PER_BYTE, value=value, low=low, high=high, count=num_bytes)
        return replace(facts, metrics=(row, *facts.metrics))

    def _said(self, model: nn.Module) -> list[evaluate.Generation]:
        """What the model says to every prompt."""
        with machine.autocast(next(model.parameters()).device, self.dtype):
            return [evaluate.timed_generation(model, self.processor, p, tokens=PROMPT_TOKENS) for p in PROMPTS]

    @property
    def tokenizer(self) -> str:
        """Hash of the windows: models with the same are scored on the same tokens."""
        return "" if self.windows is None else _hash(self.windows)


def without_text(options: Options, made: Artifact, *, learns_tasks: bool) -> Options:
    """The options without a text to judge on, for which classifiers, and models that learn tasks, have no use.

    Args:
        options: what is judged on.
        made: the model that will be changed, as it is then.
        learns_tasks: whether it learns tasks, which it is measured on.

    Raises:
        UserError: a text is named for a classifier.
    """
    if not is_classifier(made.model):
        return options.model_copy(update={"evaluate": "none"}) if learns_tasks else options
    if named := [name for name in ("evaluate", "watch") if getattr(options, name) not in (None, "none", ())]:
        raise UserError(
            f"--{named[0]} is of models that predict words, and {made.name} tells classes here",
            hint="overhaul measure accuracy, afterwards",
        )
    return options.model_copy(update={"evaluate": "none"})


def _hash(*tensors: Tensor) -> str:
    return hashlib.sha256(b"".join(tensor.numpy().tobytes() for tensor in tensors)).hexdigest()[:12]


def _decode_speed(said: Sequence[evaluate.Generation]) -> float | None:
    """Tokens per second of the median decoding step; None where every text ended with its first token."""
    steps = [seconds for one in said for seconds in one.seconds_per_token]
    return 1 / statistics.median(steps) if steps else None


def _is_masked(model: nn.Module) -> bool:
    return any(isinstance(module, MaskedLinear) for module in model.modules())


def counts(model: nn.Module, errors: Sequence[LayerNote] = ()) -> dict[str, Any]:
    """Parameters and non-zeros, of the whole model and of the linear layers in its blocks; packed weights count too."""
    parameters = list(model.parameters())
    packed = [module for module in model.modules() if isinstance(module, Packed)]
    total = sum(p.numel() for p in parameters) + sum(module.num_weights for module in packed)
    nonzero_all = sum(int(p.count_nonzero()) for p in parameters) + sum(module.num_nonzero() for module in packed)
    known = {layer.name: layer.error for layer in errors}
    layers, nonzero_blocks, total_blocks = [], 0, 0
    for name, weight_OI in () if is_classifier(model) else block_weights(model):
        nonzero = int(weight_OI.count_nonzero())
        nonzero_blocks += nonzero
        total_blocks += weight_OI.numel()
        layers.append(LayerFacts(name=name, sparsity=1 - nonzero / weight_OI.numel(), error=known.get(name)))
    return {
        "parameters": total,
        "nonzero_share_all": nonzero_all / total,
        "nonzero_share_blocks": nonzero_blocks / total_blocks if total_blocks else None,
        "layers": tuple(layers),
    }


def _label(verb: str, method: str, before: Sequence[Facts]) -> str:
    """How tables call the result: "pruned" after a prune, "won back" when an adapt follows a prune."""
    is_lossy = any(word in one.label for one in before for word in ("pruned", "shrunk"))
    done = {
        "prune": "pruned",
        "shrink": "shrunk",
        "quantize": "quantized",
        "distill": "won back" if is_lossy else "distilled",
        "adapt": "won back" if is_lossy else "adapted",
        "extend": "extended",
        "learn": "learnt",
    }
    return f"{done.get(verb, verb)} ({method})"


def short(dtype: torch.dtype) -> str:
    """`bf16` for `torch.bfloat16`."""
    return str(dtype).removeprefix("torch.").replace("float", "fp").replace("bfp", "bf")


def read_facts(stored: dict[str, Any]) -> Facts:
    """Reads facts from a record."""
    plain = dict(stored)
    plain["perplexity"] = Row(**stored["perplexity"]) if stored.get("perplexity") else None
    plain["metrics"] = tuple(Row(**row) for row in stored.get("metrics", ()))
    plain["layers"] = tuple(LayerFacts(**layer) for layer in stored.get("layers", ()))
    plain["generations"] = tuple((prompt, text) for prompt, text in stored.get("generations", ()))
    return Facts(**plain)
