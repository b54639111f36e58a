"""Images that examples can be deleted from: how a stage reads them, and which a model cannot read.

Letters of shapes: (C, H, W) channels, height and width of an image.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn

from overhaul.augment import IMAGES
from overhaul.errors import UserError
from overhaul.interop.classifier import classes_of, classified, head_of
from overhaul.objective import ClassCrossEntropy, Term
from overhaul.picture_data import PictureData
from overhaul.picture_rows import PIXELS, PictureRow
from overhaul.unlearning.answering import Answering, Content


class ByImage(Answering):
    """A classifier learns the class of an image."""

    data: PictureData
    unit = "images"
    together = PIXELS

    def __init__(self, model: nn.Module, data: PictureData, seq_len: int) -> None:
        super().__init__(model, data, seq_len)
        self.head = head_of(model)[0]
        self.places = {name: place for place, name in enumerate(classes_of(model))}

    def contents(self, rows: Sequence[PictureRow]) -> Iterator[list[Content]]:
        """`{"images": (C, H, W) uint8, "labels": () int64}`, of each image one.

        Raises:
            UserError: the processor leaves images in several sizes.
        """
        shape = None
        for row in rows:
            bytes_CHW = self.data.bytes_of(row)
            if bytes_CHW.shape != (shape := shape or bytes_CHW.shape):
                told = " and ".join(f"{one[1]} x {one[2]}" for one in (shape, bytes_CHW.shape))
                raise UserError(
                    f"images come out of the model's image processor as {told} (height x width)",
                    allowed="images of one size, or a processor that resizes them",
                )
            yield [{IMAGES: bytes_CHW, "labels": torch.tensor(self.places[row.label])}]

    def alone(self, content: Content) -> Content:
        """`{"pixel_values": (C, H, W) float32}` in place of the bytes."""
        others = {name: tensor for name, tensor in content.items() if name != IMAGES}
        return {"pixel_values": self.data.pixels_of(content[IMAGES]), **others}

    def settings(self) -> dict[str, Any]:
        return {"images": True}

    def loss(self) -> Term:
        return ClassCrossEntropy()


def refuse_unreadable(model: nn.Module, data: PictureData) -> None:
    """Raises `UserError` where the model cannot read the first image."""
    bytes_CHW = data.bytes_of(data.corpus.train[0])
    pixels_1CHW = data.pixels_of(bytes_CHW)[None].to(next(model.parameters()))
    try:
        with torch.no_grad():
            classified(model, {"pixel_values": pixels_1CHW})
    except (ValueError, RuntimeError) as error:
        raise UserError(
            f"{type(model).__name__} cannot read images of {bytes_CHW.shape[1]} x {bytes_CHW.shape[2]} (height x "
            f"width), as its image processor makes them: {error}",
            allowed="a preprocessor_config.json with the size that the model reads",
        ) from error
