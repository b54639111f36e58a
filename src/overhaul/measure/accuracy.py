"""Accuracy of a classifier of texts or images."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from pydantic import Field, field_validator

from overhaul.image_sets import NAMED
from overhaul.kinds import Kind
from overhaul.method import Measure, Positive, SeqLen
from overhaul.records import TABLE_SUFFIXES

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np
    from numpy.typing import NDArray
    from torch import nn

    from overhaul.data import Data
    from overhaul.table import Table
    from overhaul.task_data import Batched


class Asked(NamedTuple):
    """What a model is asked about.

    Attributes:
        called: each by its text, or its picture.
        examples: the same as the model reads them; labels are places in its classes.
    """

    called: Sequence[str]
    examples: Batched


class MeasureAccuracy(Measure):
    """Share of labelled texts or images whose class a classifier tells, with a 95% interval."""

    kinds: ClassVar[tuple[Kind, ...]] = (Kind.TEXT_CLASSIFIER, Kind.IMAGE_CLASSIFIER)
    needs_corpus: ClassVar[bool] = False

    task: tuple[str, ...] = Field(
        description="One or more tables of labelled texts; or image sets by name or path: of these the held-out part, "
        "where there is one."
    )
    label_field: str = Field("label", description="Column of the label.")
    text_field: str = Field("text", description="Column of the text beside it.")
    limit: Positive | None = Field(None, description="Texts or images of each, drawn by --seed; none means all.")
    seq_len: SeqLen = Field(512, description="Tokens of a text that are read, or as many as the model reads.")

    @field_validator("task")
    @classmethod
    def _named(cls, task: tuple[str, ...]) -> tuple[str, ...]:
        allowed = f"files ending in {', '.join(TABLE_SUFFIXES)}; of images also folders and {', '.join(NAMED)}"
        if not task:
            raise ValueError(f"name at least one table\nallowed: {allowed}")
        if missing := next((name for name in task if name not in NAMED and not Path(name).exists()), None):
            raise ValueError(f"{missing} does not exist\nallowed: {allowed}")
        return task

    def measure(self, model: nn.Module, data: Data) -> Table:
        """Share of examples whose class has the highest logit: a row `accuracy/FILE` per table or image set."""
        from overhaul.evaluate import wilson_interval
        from overhaul.interop.classifier import classes_of
        from overhaul.kinds import kind_of_model
        from overhaul.table import Row, Table
        from overhaul.task_scores import logits_of

        rows, details, known, stems = [], [], classes_of(model), [Path(name).stem for name in self.task]
        of_images = kind_of_model(model) is Kind.IMAGE_CLASSIFIER
        unit, read = ("image", self._images) if of_images else ("text", self._texts)
        for name in self.task:
            called, examples = read(name, model, known, data)
            told = logits_of(model, examples, dtype=data.dtype).argmax(dim=1).tolist()
            hits = [place == label for place, label in zip(told, examples.labels_N.tolist(), strict=True)]
            low, high = wilson_interval(sum(hits), len(hits))
            table = name if stems.count(Path(name).stem) > 1 else Path(name).stem
            share = {"value": sum(hits) / len(hits), "low": low, "high": high, "count": len(hits)}
            rows.append(Row(model=data.model, metric=f"accuracy/{table}", **share))
            details += [
                {"model": data.model, unit: one, "wanted": known[label], "answer": known[place], "right": hit}
                for one, label, place, hit in zip(called, examples.labels_N, told, hits, strict=True)
            ]
        return Table(tuple(rows), details=tuple(details))

    def _texts(self, name: str, model: nn.Module, known: Sequence[str], data: Data) -> Asked:
        """The texts of a table; `UserError` where one has a label that is none of the model's classes."""
        from overhaul.errors import UserError
        from overhaul.generation import longest
        from overhaul.labelled_texts import LabelledTexts, read_labelled
        from overhaul.task_data import encoded

        if not Path(name).exists():
            raise UserError(
                f"{name} is no table of texts, which {data.model} reads",
                allowed=f"files ending in {', '.join(TABLE_SUFFIXES)}",
            )
        pairs, notes = read_labelled(name, label=self.label_field, text=self.text_field)
        asked, labels_N = self._drawn([(text, text, label) for text, label in pairs], notes, name, known, data)
        part = LabelledTexts(texts=tuple(asked), labels_N=labels_N)
        return Asked(part.texts, encoded(part, data.tokenizer, min(self.seq_len, longest(model))))

    def _images(self, name: str, model: nn.Module, known: Sequence[str], data: Data) -> Asked:
        """The held-out images of a set, or all where it holds none out; as `_texts`."""
        import numpy as np

        from overhaul.errors import UserError
        from overhaul.interop.classifier import channels_of
        from overhaul.interop.pixels import sized
        from overhaul.picture_rows import open_pictures
        from overhaul.task_data import Examples

        if (self.label_field, self.text_field) != ("label", "text"):
            raise UserError(
                f"--label-field and --text-field are of texts, and {data.model} reads images",
                allowed="a folder for each class; a table with the columns image and label; an .npz",
            )
        found = open_pictures(name)
        told = [(row.tags[0][1], row, row.label) for row in found.heldout or found.train]
        asked, labels_N = self._drawn(told, found.notes, name, known, data)
        images_NCHW = np.stack([sized(row.pixels_HWC[None], data.tokenizer, channels_of(model))[0] for row in asked])
        return Asked([row.where for row in asked], Examples(images_NCHW, labels_N, data.tokenizer))

    def _drawn(
        self, every: Sequence[tuple[str, Any, str]], notes: Sequence[str], name: str, known: Sequence[str], data: Data
    ) -> tuple[list[Any], NDArray[np.int64]]:
        """Of examples, each with what it is drawn by and its label, those that are asked, and places of the labels."""
        import numpy as np

        from overhaul.errors import UserError, did_you_mean
        from overhaul.progress import say
        from overhaul.questions import drawn

        for note in notes:
            say(f"note: {name}: {note}")
        if other := sorted({label for *_, label in every} - {*known}):
            raise UserError(
                f"{name} has labels that are none of the classes of {data.model}, such as {other[0]!r}",
                allowed=", ".join(known),
                hint=did_you_mean(other[0], known),
            )
        asked = drawn(every, self.limit, seed=data.seed, text=lambda one: one[0])
        return [one for _, one, _ in asked], np.array([known.index(label) for *_, label in asked], np.int64)
