"""Augmented images: what is left out changes nothing, what is drawn depends on the seed alone, by hand, in learning."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from command import interrupted, overhaul, refused
from images import SIZE, write_bars, write_vit
from overhaul import artifact, journal, machine
from overhaul.augment import POLICIES, Policy, _moved, augmented, policy
from overhaul.kinds import Kind
from overhaul.learn.bregman import Bregman
from overhaul.learn.clr import Clr
from overhaul.learn.contracon import ConTraCon
from overhaul.learn.rehearsal_free import RehearsalFree
from overhaul.reservoir import remembered
from overhaul.task_data import TaskData
from overhaul.tasks import open_tasks
from overhaul.train import train
from overhaul.workspace import finish


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


HOW: dict[str, Any] = {"batch_size": 8, "lr": 0.02, "steps": 4}
METHODS: dict[str, Callable[..., Any]] = {
    "der++": lambda **more: Bregman(**HOW, memory=24, **more),
    "der++, joined": lambda **more: Bregman(**HOW, memory=24, passes="joined", **more),
    "fdr": lambda **more: Bregman(**HOW, memory=24, output_term="fdr", **more),
    "rehearsal-free": lambda **more: RehearsalFree(**HOW, **more),
    "clr": lambda **more: Clr(**HOW, **more),
    "contracon": lambda **more: ConTraCon(**HOW, kernel=3, views=0, first_task="frozen", **more),
}


def opened(model: Path, bars: Path) -> tuple[Any, TaskData]:
    made = artifact.load(model, kinds=(Kind.IMAGE_CLASSIFIER,))
    return made.model, TaskData(open_tasks([str(bars)], split=2), made.processor, 1, seed=0)


def losses(model: Path, bars: Path, method: Any) -> list[float]:
    """Of every step of two tasks: they depend on every image, every draw and every weight."""
    network, data = opened(model, bars)
    machine.seed_everything(0)
    found: list[float] = []
    with journal.recording():
        for plan in method.stages(network, data):
            found += [point["loss"] for point in train(plan, method, quiet=True).points]
            finish(plan)
    return found


@pytest.mark.parametrize("name", METHODS)
def test_a_policy_that_changes_nothing_is_none_to_the_bit(
    name: str, cnn: Path, vit: Path, bars: Path, monkeypatch: pytest.MonkeyPatch
):
    model = vit if name == "contracon" else cnn
    plain = losses(model, bars, METHODS[name]())
    assert plain != losses(model, bars, METHODS[name](augment="noise"))

    monkeypatch.setitem(POLICIES, "noise", Policy())

    assert losses(model, bars, METHODS[name](augment="noise")) == plain


def given(data: TaskData, number: int) -> set[bytes]:
    """A task's training images as they were given."""
    return {image.tobytes() for image in data.train[number].images_NCHW}


@pytest.mark.parametrize("term", ["der++", "fdr"])
def test_the_memory_holds_images_as_they_were_given(term: Any, cnn: Path, bars: Path):
    network, data = opened(cnn, bars)
    learner: Any = (method := Bregman(**HOW, memory=24, output_term=term, augment="grey")).learner(network, data)
    with journal.recording():
        for number in range(2):
            learner.begin(number)
            train(plan := learner.plan(number), method, quiet=True)
            finish(plan)
            learner.learnt(number)

    held = learner.memory.draw(24)
    assert set(held) == {"images", "labels", "logits", "width"}
    assert held["images"].dtype == torch.uint8
    there = {label: given(data, label // 2) for label in range(4)}
    assert all(
        image.numpy().tobytes() in there[label]
        for image, label in zip(held["images"], held["labels"].tolist(), strict=True)
    )


def test_logits_are_those_of_the_augmented_image_that_was_trained_on(vit: Path, bars: Path):
    network, data = opened(vit, bars)
    method = Bregman(**{**HOW, "steps": 1}, memory=24, augment="grey")
    learner: Any = method.learner(network, data)
    learner.begin(0)
    batch = next(learner.plan(0).stream)
    with torch.no_grad():
        shown, given = (
            network(pixel_values=pixels).logits
            for pixels in (batch["pixel_values"], data.train[0].inputs(places(data, batch))["pixel_values"])
        )

    train(learner.plan(0), method, quiet=True)

    assert torch.equal(learner.memory.held["images"][:8], batch["offered/images"])
    assert torch.allclose(learner.memory.held["logits"][:8], shown, atol=1e-6)
    assert not torch.allclose(learner.memory.held["logits"][:8], given, atol=1e-3)


def places(data: TaskData, batch: dict[str, Tensor]) -> np.ndarray:
    """Where in the first task the images of a batch are."""
    every = [image.tobytes() for image in data.train[0].images_NCHW]
    return np.array([every.index(image.numpy().tobytes()) for image in batch["offered/images"]])


def test_the_same_image_comes_otherwise_each_time_and_from_the_memory_too(cnn: Path, bars: Path):
    network, data = opened(cnn, bars)
    count = len(data.train[0])
    learner: Any = Bregman(**{**HOW, "batch_size": count}, memory=count, augment="grey").learner(network, data)
    learner.begin(0)
    stream = learner.plan(0).stream
    first = next(stream)
    learner.memory.insert({name: first[f"offered/{name}"] for name in ("images", "labels")})
    second = next(stream)

    assert not torch.equal(first["offered/images"], second["offered/images"]), "another order"
    one, other = (batch["pixel_values"][np.argsort(places(data, batch))] for batch in (first, second))
    assert ((one - other).abs().flatten(1).amax(1) > 0.02).all(), "of the same images"
    draws = [remembered(second, number) for number in (1, 2)]
    assert all(set(draw) == {"labels", "pixel_values"} for draw in draws), "shown as the model reads them"
    every = torch.cat([batch["pixel_values"] for batch in (first, second, *draws)])
    assert len(every.flatten(1).unique(dim=0)) == 4 * count


def test_batches_carry_images_twice_where_a_memory_is_offered_them_alone(cnn: Path, bars: Path):
    network, data = opened(cnn, bars)
    carried = {}
    for name, method in {
        "er": Bregman(**HOW, memory=24, output_term="er", augment="noise"),
        "fdr": Bregman(**HOW, memory=24, output_term="fdr", augment="noise"),
        "lwf": Bregman(**HOW, output_term="lwf", augment="noise"),
        "plain er": Bregman(**HOW, memory=24, output_term="er"),
    }.items():
        learner: Any = method.learner(network, data)
        learner.begin(0)
        carried[name] = set(next(learner.plan(0).stream))

    shown = {"pixel_values", "labels"}
    assert carried == {
        "er": shown | {"offered/images", "offered/labels"}, "fdr": shown, "lwf": shown, "plain er": shown
    }  # fmt: skip


def test_grey_images_are_grey_for_a_model_that_reads_colours(cnn: Path, bars: Path):
    made = artifact.load(cnn, kinds=(Kind.IMAGE_CLASSIFIER,))
    data = TaskData(open_tasks([str(bars)], split=2), made.processor, 3, seed=0)

    stream = data.augmented(data.batches(0, batch_size=4, as_bytes=True), 0, "auto")

    assert stream.how == POLICIES["noise"]
    assert next(stream)["pixel_values"].shape == (4, 3, SIZE, SIZE)


def test_a_stream_goes_on_from_its_state(cnn: Path, bars: Path):
    data = opened(cnn, bars)[1]
    one, other = (data.augmented(data.batches(0, batch_size=8, as_bytes=True), 0, "grey") for _ in range(2))
    for _ in range(9):  # into the second pass
        next(one)

    other.load_state_dict(one.state_dict())

    assert torch.equal(next(one)["pixel_values"], next(other)["pixel_values"])


@pytest.mark.parametrize("method", [("bregman", "--memory", 24, "--split", 2), ("clr", "--split", 2)])
def test_a_run_that_was_stopped_goes_on_to_the_same_bits(
    method: tuple[Any, ...], cnn: Path, bars: Path, tmp_path: Path
):
    how = ("learn", method[0], cnn, "--tasks", bars, *method[1:], "--batch-size", 8, "--steps", 5, "--lr", 0.02)
    how = (*how, "--augment", "grey", "--save-every", 2)
    assert overhaul(*how, "-o", tmp_path / "whole").code == 0
    # In the second task, between two checkpoints.
    assert interrupted(lambda seen: len(seen) == 9, *how, "-o", tmp_path / "cut").code != 0
    done = overhaul(*how, "-o", tmp_path / "cut", "--resume")
    assert done.code == 0, done.err

    wholes = sorted(tmp_path.glob("whole/**/*.safetensors"))
    assert len(wholes) == (1 if method[0] == "bregman" else 3)
    for file in wholes:
        assert file.read_bytes() == (tmp_path / "cut" / file.relative_to(tmp_path / "whole")).read_bytes()
    whole, cut = (json.loads((tmp_path / name / "tasks.json").read_text()) for name in ("whole", "cut"))
    assert whole["matrices"] == cut["matrices"]


def test_texts_are_not_augmented(tiny: Path, tmp_path: Path):
    (tmp_path / "a.txt").write_text("a cat and a dog. " * 40)

    for more in ((), ("--label-by", "corpus")):
        tried = overhaul("learn", "bregman", tiny, "-o", tmp_path / "out", "--tasks", tmp_path / "a.txt",
                         "--augment", "noise", *more)  # fmt: skip
        refused(tried, "--augment noise is of images, and these tasks are texts", "without it")


def test_grey_images_stay_grey_ones_where_a_model_reads_three_channels(tmp_path: Path):
    sequence = open_tasks([str(write_bars(tmp_path / "bars.npz"))], split=2)
    processor = artifact.load(write_vit(tmp_path / "vit"), kinds=(Kind.IMAGE_CLASSIFIER,)).processor

    assert TaskData(sequence, processor, 3).policy(0, "auto") == POLICIES["noise"]
