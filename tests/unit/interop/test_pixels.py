"""Pixels are those of the processor itself; grey and coloured; sizes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from transformers.models.bit.image_processing_pil_bit import BitImageProcessorPil
from transformers.models.convnext.image_processing_pil_convnext import ConvNextImageProcessorPil
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from overhaul.errors import UserError
from overhaul.interop.pixels import normalized, sized

PROCESSORS = {
    "same size": ViTImageProcessorPil(size={"height": 12, "width": 10}, image_mean=[0.3] * 3, image_std=[0.2] * 3),
    "larger": ViTImageProcessorPil(size={"height": 20, "width": 16}),
    "not normalised": ViTImageProcessorPil(size={"height": 8, "width": 8}, do_normalize=False),
    "neither": ViTImageProcessorPil(size={"height": 8, "width": 8}, do_normalize=False, do_rescale=False),
    "left as they are": ViTImageProcessorPil(do_resize=False),
    "cropped": ConvNextImageProcessorPil(size={"shortest_edge": 8}, crop_pct=0.8),
}


def images(channels: int, count: int = 4) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, 12, 10, channels), dtype=np.uint8)


@pytest.mark.parametrize("name", PROCESSORS)
def test_pixels_are_those_of_the_processor(name: str):
    processor: Any = PROCESSORS[name]
    given = images(3)

    found = normalized(sized(given, processor, 3), processor)

    wanted = processor(list(given), input_data_format="channels_last", return_tensors="pt")["pixel_values"]
    assert found.shape == wanted.shape
    assert abs(found - wanted.float()).max() < 1e-5 * max(1.0, float(wanted.abs().max()))


def test_grey_images_become_three_equal_channels_where_the_model_has_three():
    given, processor = images(1), PROCESSORS["same size"]

    one, three = sized(given, processor, 1), sized(given, processor, 3)

    assert one.shape == (4, 1, 12, 10)
    assert all(np.array_equal(three[:, [channel]], one) for channel in range(3))


@pytest.mark.parametrize("channels", [1, 3])
def test_a_processor_that_makes_pictures_coloured_does_not_do_so_twice(channels: int):
    processor = BitImageProcessorPil(size={"shortest_edge": 16}, crop_size={"height": 14, "width": 12})

    found = sized(images(1), processor, channels)

    assert found.shape == (4, channels, 14, 12)
    assert np.array_equal(found, sized(images(1).repeat(3, axis=-1), processor, 3)[:, :channels])


@pytest.mark.parametrize(("there", "wanted", "says"), [(3, 1, "the images have colours"), (4, 3, "have 4 channels")])
def test_channels_that_do_not_fit_are_refused(there: int, wanted: int, says: str):
    with pytest.raises(UserError, match=says):
        sized(images(there), PROCESSORS["same size"], wanted)


def test_many_images_are_resized_in_parts(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("overhaul.interop.pixels.AT_ONCE", 3)
    given = images(3, count=7)

    found = sized(given, PROCESSORS["larger"], 3)

    assert np.array_equal(found[5:6], sized(given[5:6], PROCESSORS["larger"], 3))
    assert found.shape == (7, 3, 20, 16)
