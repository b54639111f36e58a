"""What a step reads: the text or images that its options name, or the tasks of its method; as its model sees them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from overhaul import artifact as artifacts
from overhaul.artifact import Artifact
from overhaul.corpora import Corpus, CorpusSpec, open_corpus, open_whole
from overhaul.data import Data
from overhaul.errors import UserError
from overhaul.interop.classifier import channels_of
from overhaul.kinds import Kind
from overhaul.method import Method
from overhaul.options import DEFAULT_CORPUS, Options
from overhaul.picture_data import PictureData
from overhaul.picture_rows import PictureCorpus, open_pictures
from overhaul.task_data import TaskData
from overhaul.tasks import TaskSequence
from overhaul.text_task_data import TextTaskData
from overhaul.text_tasks import TextSequence

Given = Data | PictureData | TaskData | TextTaskData
"""What a method is given, as its model sees it."""


def _spec(options: Options) -> CorpusSpec:
    return CorpusSpec(path=options.data or DEFAULT_CORPUS, field=options.field)


def open_text(options: Options) -> Corpus:
    """The text that the options name, with a part that is held out."""
    return open_corpus(_spec(options))


def open_data(options: Options, method: Method, kind: Kind) -> Corpus | PictureCorpus:
    """The corpus that the options name, as a method reads it for a model of some kind.

    Raises:
        UserError: it cannot be read.
    """
    if kind is Kind.IMAGE_CLASSIFIER and kind in method.kinds:
        if options.field is not None:
            raise UserError(f"--field {options.field} is of texts", allowed="images in the column image, or as files")
        return open_pictures(options.data or DEFAULT_CORPUS, getattr(method, "tags", ()))
    spec = _spec(options)
    if method.holds_out and not options.whole:
        return open_corpus(spec)
    return open_whole(spec, getattr(method, "tags", ()), label=getattr(method, "label_field", None))


def sequence_of(method: Method, options: Options) -> TaskSequence | TextSequence | None:
    """The tasks of a method that learns some.

    Raises:
        UserError: they cannot be read, or a text is named too.
    """
    sequence = method.sequence()
    texts = [
        f"--{name}"
        for name in ("data", "field", "evaluate", "watch")
        if getattr(options, name) not in (None, "none", ())
    ]
    if sequence and texts:
        raise UserError(f"{texts[0]} is of methods that read one text", hint="--tasks, which names what is learnt")
    return sequence


def as_seen(
    method: Any,
    parent: Artifact,
    options: Options,
    dtype: torch.dtype,
    *,
    sequence: TaskSequence | TextSequence | None,
    text: Corpus | PictureCorpus | None,
    beside: Mapping[str, Corpus],
) -> Given | None:
    """The tasks of a method, else the pictures or the text that it reads, as the model sees them; None without any."""
    if sequence:
        return _tasks(sequence, method, parent, options, dtype)
    if isinstance(text, PictureCorpus):
        return PictureData(text, parent.processor, channels_of(parent.model), options.seed, parent.name, dtype)
    return _text(text, parent, options, dtype, beside) if text else None


def _text(text: Corpus, parent: Artifact, options: Options, dtype: torch.dtype, beside: Mapping[str, Corpus]) -> Data:
    """A text as the model sees it."""
    return Data(
        text,
        parent.processor,
        options.seed,
        dtype=dtype,
        dense_tensors=artifacts.dense_ancestor(parent),
        lineage=parent.lineage,
        beside=beside,
    )


def _tasks(
    sequence: TaskSequence | TextSequence, method: Any, parent: Artifact, options: Options, dtype: torch.dtype
) -> TaskData | TextTaskData:
    """The tasks as the model sees them."""
    how: dict[str, Any] = {"seed": options.seed, "model": parent.name, "dtype": dtype}
    if isinstance(sequence, TextSequence):
        return TextTaskData(sequence, parent.processor, method.seq_len, measured=method.heldout, **how)
    extent = channels_of(parent.model) if sequence.unit == "images" else method.seq_len
    return TaskData(sequence, parent.processor, extent, **how)
