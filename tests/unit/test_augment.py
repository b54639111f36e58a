"""Augmented images: what is left out changes nothing, what is drawn depends on the seed alone, and by hand."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from overhaul.augment import POLICIES, Policy, _moved, augmented, policy


def images(channels: int = 1, *, count: int = 6, dtype: torch.dtype = torch.uint8) -> Tensor:
    dice = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (count, channels, 8, 10), generator=dice).to(dtype)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
@pytest.mark.parametrize("channels", [1, 3])
def test_a_policy_of_nothing_leaves_images_as_they_are(channels: int, dtype: torch.dtype):
    given = images(channels, dtype=dtype)

    assert torch.equal(augmented(given, Policy(), seed=1), given)


@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize("channels", [1, 3])
def test_the_same_seed_makes_the_same_images(name: str, channels: int):
    given, how = images(channels), POLICIES[name]
    made = augmented(given, how, seed=3)

    assert (made.dtype, made.shape) == (given.dtype, given.shape)
    assert torch.equal(augmented(given, how, seed=3), made)
    assert not torch.equal(augmented(given, how, seed=4), made)
    assert (made != given).flatten(1).any(dim=1).all(), "every image is changed"
    assert torch.equal(augmented(given.float(), how, seed=3).round().to(torch.uint8), made)


def test_a_part_that_is_left_out_does_not_change_the_others():
    given = images(dtype=torch.float32).mul(0.3).add(90)
    noise = augmented(given, Policy(noise=0.01), seed=5) - given
    both = augmented(given, Policy(noise=0.01, brightness=0.1), seed=5)

    assert torch.allclose(both - augmented(given, Policy(brightness=0.1), seed=5), noise, atol=1e-3)


def test_light_by_hand():
    given = images(3, dtype=torch.float32).mul(0.2).add(100)
    brighter, harder, fuller = (
        augmented(given, Policy(**{name: 0.2}), seed=7) for name in ("brightness", "contrast", "saturation")
    )
    mean, grey = given.mean(dim=(1, 2, 3), keepdim=True), given.mean(dim=1, keepdim=True)
    for made, middle in ((brighter, torch.zeros(())), (harder, mean), (fuller, grey)):
        factors = ((made - middle) / (given - middle)).nan_to_num(nan=1.0).flatten(1).median(dim=1).values
        assert torch.allclose(made, middle + factors[:, None, None, None] * (given - middle), atol=0.05)
        assert bool(((factors >= 0.8) & (factors <= 1.2)).all())
        assert len(set(factors.tolist())) == len(given), "each image has a factor of its own"
    assert torch.allclose(augmented(images(dtype=torch.float32), Policy(saturation=0.5), seed=1),
                          images(dtype=torch.float32), atol=1e-3), "grey has none"  # fmt: skip


def test_moves_by_hand():
    given, none = images(dtype=torch.float32), torch.zeros(4, 6)
    square = given[..., :8]
    one_pixel, quarter = none.clone(), none.clone()
    one_pixel[2] = 1.0
    quarter[0] = 1.0
    mirrored = none.clone()
    mirrored[1] = -1.0

    shifted = _moved(given, Policy(shift=0.1), one_pixel)
    assert torch.allclose(shifted[..., :-1], given[..., 1:], atol=1e-2)
    assert torch.allclose(shifted[..., -1], given[..., -1], atol=1e-2), "the border stays"
    assert torch.allclose(_moved(square, Policy(turn=90), quarter), square.rot90(1, (2, 3)), atol=1e-2)
    assert torch.allclose(_moved(given, Policy(flip=True), mirrored), given.flip(-1), atol=1e-2)


def test_a_turned_oblong_keeps_its_lengths():
    """A point one pixel from the centre is one pixel from it after a quarter turn, whatever the sides are."""
    image = torch.zeros(1, 1, 9, 15)
    image[0, 0, 4, 9] = 255.0
    quarter = torch.zeros(4, 1)
    quarter[0] = 1.0

    row, column = divmod(int(_moved(image, Policy(turn=90), quarter).argmax()), 15)

    assert (abs(row - 4), column) == (2, 7)


def test_which_policy_images_get():
    assert policy("auto", 1) == POLICIES["noise"]
    assert policy("auto", 3) == POLICIES["colour"]
    assert policy("grey", 3) == POLICIES["grey"]
    assert not POLICIES["grey"].flip, "a digit mirrored is none"
