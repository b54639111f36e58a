"""What adaptations of one model won, lost and cost: the numbers by which a user picks one.

    task gain     loss of the reference on the task's held-out text, less that of the adapted model, in nats a token
    forgetting    loss of the adapted model on general text, less that of the reference

Both are differences over the same windows, so their intervals are those of paired differences: far narrower than the
intervals of the losses themselves.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from overhaul import artifact as artifacts
from overhaul import evaluate
from overhaul.artifact import Artifact
from overhaul.corpora import CorpusSpec, open_corpus
from overhaul.data import Data
from overhaul.errors import UserError
from overhaul.evaluate import WindowLosses
from overhaul.lineage import LineageStep
from overhaul.report.facts import FORGETTING, TASK_GAIN, TASK_LOSS
from overhaul.stream import Take
from overhaul.table import Row


@dataclass(frozen=True, slots=True)
class Losses:
    """Of one model: on the windows of its task, where only what is trained on counts, and on general text."""

    task: WindowLosses
    general: WindowLosses


@dataclass(frozen=True, slots=True)
class Trial:
    """The windows that adapted models are judged on.

    Attributes:
        task_NT, labels_NT: of the task's held-out text; completions alone count where it has prompts.
        general_NT: of other held-out text.
        dtype: of matrix products.
    """

    task_NT: Tensor
    labels_NT: Tensor
    general_NT: Tensor
    dtype: torch.dtype

    @classmethod
    def of(cls, task: str, processor: Any, general_NT: Tensor, dtype: torch.dtype) -> Trial:
        """As many windows of the corpus `task` as there are of general text, of the same length.

        Raises:
            UserError: there is no such corpus, or its held-out part is shorter than one window.
        """
        count, seq_len = general_NT.shape
        data = Data(open_corpus(CorpusSpec(path=task)), processor)
        data.windows("heldout", seq_len=seq_len, limit=1)  # refuses a text that is too short
        windows = list(Take(data.packed("heldout", seq_len=seq_len), count))
        task_NT, labels_NT = (torch.stack([window[key] for window in windows]) for key in ("input_ids", "labels"))
        return cls(task_NT, labels_NT, general_NT, dtype)

    def losses(self, model: nn.Module) -> Losses:
        """Of a model in memory."""
        return Losses(
            evaluate.window_losses(model, self.task_NT, self.labels_NT, dtype=self.dtype),
            evaluate.window_losses(model, self.general_NT, self.general_NT, dtype=self.dtype),
        )


def metrics(model: str, own: Losses, reference: Losses) -> tuple[Row, ...]:
    """Task loss, task gain and forgetting, in nats a token, each with its 95% interval."""
    estimates = {
        TASK_LOSS: evaluate.mean_loss(own.task),
        TASK_GAIN: evaluate.mean_loss(reference.task, own.task),
        FORGETTING: evaluate.mean_loss(own.general, reference.general),
    }
    return tuple(Row(model=model, metric=metric, **asdict(estimate)) for metric, estimate in estimates.items())


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """What it took to make a model from the reference; None where no record says so.

    Attributes:
        seconds: of all steps.
        peak_rss_bytes: of the largest.
        trainable_parameters: of the last training.
        stored_bytes: what has to be kept beside the reference: of an adapter of it the adapter's own files.
    """

    seconds: float | None
    peak_rss_bytes: int | None
    trainable_parameters: int | None
    stored_bytes: int


def cost(made: Artifact, reference: Sequence[LineageStep], kept: Collection[str]) -> Cost:
    """Of the steps that a model has beyond those of the reference, and of the files that are not the reference's.

    Args:
        made: the model.
        reference: the steps of the reference.
        kept: `weights_of` the reference.
    """
    common = len(reference) if list(made.lineage[: len(reference)]) == list(reference) else 0
    own = weights_of(made.path)
    steps = made.lineage[common:]
    trained = [step.trainable_parameters for step in steps if step.trainable_parameters]
    return Cost(
        seconds=sum(step.seconds or 0.0 for step in steps) if steps else None,
        peak_rss_bytes=max((step.peak_rss_bytes for step in steps if step.peak_rss_bytes), default=None),
        trainable_parameters=trained[-1] if trained else None,
        stored_bytes=sum(
            file.stat().st_size for sha256 in own.keys() - set(kept) for file in artifacts.weight_files(own[sha256])
        ),
    )


def weights_of(ref: str | Path) -> dict[str, Path]:
    """The directories that a model is read from, by the hash of their weights: two where it is an adapter."""
    return {artifacts.weights_sha256(path): path for path in artifacts.directories(ref)}


def refuse_other_tokens(tokenizers: Sequence[str], labels: Sequence[str]) -> None:
    """Raises `UserError` where models do not read the same tokens: losses over them have no difference."""
    odd = [label for label, own in zip(labels, tokenizers, strict=True) if own != tokenizers[0]]
    if odd:
        raise UserError(
            f"--task compares losses token by token, and {', '.join(odd)} cuts the text into other tokens than "
            f"{labels[0]}",
            hint="models of one tokenizer, or without --task",
        )
