"""Pictures as one model sees them, each by itself."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from overhaul.interop.pixels import normalized, sized
from overhaul.method import Training
from overhaul.picture_rows import PictureCorpus, PictureRow


@dataclass(frozen=True)
class PictureData:
    """Labelled pictures with the image processor of the model that will learn them.

    Attributes:
        corpus: the pictures.
        processor: of the model.
        channels: that the model reads.
        seed: of the orders.
        model: how the user called the model, for tables.
        dtype: of matrix products when something is measured.
        beside: further corpora, of which there are none.
    """

    corpus: PictureCorpus
    processor: Any
    channels: int
    seed: int = 0
    model: str = ""
    dtype: torch.dtype = torch.float32
    beside: Mapping[str, Any] = field(default_factory=dict)

    def steps_for(self, settings: Training, *, processes: int = 1) -> Training:
        """The settings as they are: how long is trained follows from the pictures of a part."""
        return settings

    def bytes_of(self, row: PictureRow) -> Tensor:
        """`(C, H, W)` uint8: a picture as the model will see it, but for scale, whatever others there are.

        Raises:
            UserError: it has colours and the model reads grey ones.
        """
        return torch.tensor(sized(row.pixels_HWC[None], self.processor, self.channels)[0])

    def pixels_of(self, bytes_CHW: Tensor) -> Tensor:
        """`(C, H, W)` float32: what the model reads of a picture."""
        return normalized(bytes_CHW[None].numpy(), self.processor)[0]
