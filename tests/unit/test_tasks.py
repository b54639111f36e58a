"""Task sequences: classes divided, pictures varied, sets joined; bad input."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from images import write_bars
from overhaul.errors import UserError
from overhaul.tasks import Task, TaskSequence, open_tasks


def write(path: Path, *, classes: int = 5, size: int = 4, each: int = 10, domains: bool = False) -> str:
    """Images whose every pixel is ten times the label, with a mark of their own in the corner."""
    labels_N = np.repeat(np.arange(classes), each)
    images_NHWC = np.tile((10 * labels_N).astype(np.uint8)[:, None, None, None], (1, size, size, 1))
    images_NHWC[:, 0, 0, 0] = np.arange(len(labels_N))
    more = {"domains": np.array(["ink", "chalk"])[np.arange(len(labels_N)) % 2]} if domains else {}
    np.savez(path, images=images_NHWC, labels=labels_N, **more)
    return str(path)


@pytest.fixture
def five(tmp_path: Path) -> str:
    return write(tmp_path / "five.npz")


def of_labels(task: Task) -> list[set[int]]:
    return [set(part.labels_N.tolist()) for part in (task.train, task.heldout)]


def test_classes_are_divided_in_their_order(five: str):
    sequence = open_tasks([five], split=2)

    assert [task.classes for task in sequence.tasks] == [(0, 1, 2), (3, 4)]
    assert [task.name for task in sequence.tasks] == ["0 to 2", "3, 4"]
    assert of_labels(sequence.tasks[1]) == [{3, 4}, {3, 4}]
    assert sum(len(task.train) + len(task.heldout) for task in sequence.tasks) == 50
    assert (sequence.num_classes(1), sequence.num_classes(2)) == (3, 5)
    assert not sequence.has_same_classes


def test_another_order_of_the_classes_keeps_pictures_with_their_names(five: str):
    sequence = open_tasks([five], split=5, order=3)

    assert sequence.classes != ("0", "1", "2", "3", "4")
    assert sorted(sequence.classes) == ["0", "1", "2", "3", "4"]
    for place, task in enumerate(sequence.tasks):
        assert task.classes == (place,)
        assert set(task.train.images_NHWC[:, 1, 1, 0].tolist()) == {10 * int(sequence.classes[place])}
    assert sequence.fingerprint == open_tasks([five], split=5, order=3).fingerprint
    assert sequence.fingerprint != open_tasks([five], split=5, order=4).fingerprint


def test_one_task_is_the_set_itself(five: str):
    whole, (only,) = open_tasks([five]), open_tasks([five], split=1).tasks

    assert len(whole.tasks) == 1
    assert np.array_equal(whole.tasks[0].train.images_NHWC, only.train.images_NHWC)


def test_variants_have_the_same_classes_and_other_pictures(five: str):
    sequence = open_tasks([five], variants=["plain", "invert", "rotate=90", "permute=1"])
    plain, inverted, turned, mixed = (task.train.images_NHWC for task in sequence.tasks)

    assert sequence.has_same_classes
    assert np.array_equal(inverted, 255 - plain)
    assert np.array_equal(turned, np.rot90(plain, axes=(1, 2)))
    assert not np.array_equal(mixed, plain)
    assert np.array_equal(np.sort(mixed.reshape(len(mixed), -1)), np.sort(plain.reshape(len(plain), -1)))
    assert all(np.array_equal(task.train.labels_N, sequence.tasks[0].train.labels_N) for task in sequence.tasks)


def test_a_task_for_each_domain(tmp_path: Path):
    path = write(tmp_path / "drawn.npz", domains=True)
    sequence = open_tasks([path], variants=["domains"])

    assert {task.name for task in sequence.tasks} == {"domain=ink", "domain=chalk"}
    assert all(set(task.train.domains_N.tolist()) == {place} for place, task in enumerate(sequence.tasks))
    assert sum(len(task.train) for task in sequence.tasks) == len(open_tasks([path]).tasks[0].train)


def test_several_sets_have_classes_of_their_own_in_the_order_in_which_they_come(tmp_path: Path):
    paths = [write(tmp_path / f"{name}.npz", classes=count) for name, count in (("a", 2), ("b", 3))]
    sequence = open_tasks(paths)

    assert sequence.classes == ("a.npz/0", "a.npz/1", "b.npz/0", "b.npz/1", "b.npz/2")
    assert [of_labels(task)[0] for task in sequence.tasks] == [{0, 1}, {2, 3, 4}]


def test_sets_in_another_order_bring_up_their_classes_in_it(tmp_path: Path):
    paths = [write(tmp_path / f"{name}.npz", classes=count) for name, count in (("a", 2), ("b", 3))]
    swapped = next(found for found in (open_tasks(paths, order=seed) for seed in range(9)) if _first(found) == "b.npz")

    assert swapped.classes[:3] == ("b.npz/0", "b.npz/1", "b.npz/2")
    assert [task.classes for task in swapped.tasks] == [(0, 1, 2), (3, 4)]
    assert [of_labels(task)[1] for task in swapped.tasks] == [{0, 1, 2}, {3, 4}]


def _first(sequence: TaskSequence) -> str:
    return sequence.tasks[0].name


@pytest.mark.parametrize(
    ("how", "says"),
    [
        ({"split": 6}, "split 6 of five.npz"),
        ({"split": 0}, "split 0 of five.npz"),
        ({"split": 2, "variants": ["plain"]}, "split divides classes and variants keep them"),
        ({"variants": ["rotat=30"]}, "there is no variant 'rotat=30'"),
        ({"variants": ["rotate=much"]}, "variant 'rotate=much' needs a number"),
        ({"variants": ["plain=3"]}, "there is no variant 'plain=3'"),
        ({"variants": ["plain", "plain"]}, "variants plain plain"),
        ({"variants": ["domain=ink"]}, "five.npz has no domain 'ink'"),
        ({"variants": ["domains"]}, "five.npz has no domains"),
    ],
)
def test_what_does_not_fit_is_refused(five: str, how: dict, says: str):
    with pytest.raises(UserError) as refused:
        open_tasks([five], **how)
    assert says in refused.value.given


def test_sets_that_do_not_fit_together_are_refused(tmp_path: Path, five: str):
    large = write(tmp_path / "large.npz", size=6)
    with pytest.raises(UserError, match=r"images of five\.npz are 4 x 4 and those of large\.npz 6 x 6"):
        open_tasks([five, large])
    assert len(open_tasks([five, large], size=(6, 6)).tasks) == 2
    for paths, says in (([], "no image set is named"), ([five, five], "is named twice")):
        with pytest.raises(UserError, match=says):
            open_tasks(paths)
    with pytest.raises(UserError, match="split is of one set, and 2 are named"):
        open_tasks([five, large], split=2)


def test_the_first_tasks_have_the_first_classes(tmp_path: Path):
    whole = open_tasks([str(write_bars(tmp_path / "bars.npz"))], split=4)
    first = whole.first(2)

    assert [task.name for task in first.tasks] == [task.name for task in whole.tasks[:2]]
    assert first.classes == whole.classes[:2]
    assert first.fingerprint not in {whole.fingerprint, whole.first(3).fingerprint}
    with pytest.raises(UserError, match="first_tasks 5"):
        whole.first(5)


def test_validation_examples_are_training_examples_that_are_not_trained_on(tmp_path: Path):
    whole = open_tasks([str(write_bars(tmp_path / "bars.npz"))], split=2)
    held = whole.validating(0.25)

    for task, before in zip(held.tasks, whole.tasks, strict=True):
        assert len(task.heldout) == pytest.approx(0.25 * len(before.train), abs=1)
        assert len(task.train) + len(task.heldout) == len(before.train)
        both = np.concatenate([task.train.images_NHWC, task.heldout.images_NHWC])
        assert sorted(map(bytes, both)) == sorted(map(bytes, before.train.images_NHWC))
    assert held.fingerprint != whole.fingerprint
    assert whole.validating(0.25).fingerprint == held.fingerprint


def test_examples_aside_are_neither_trained_on_nor_held_out_wherever_a_task_stands(tmp_path: Path):
    path = str(write_bars(tmp_path / "bars.npz"))
    whole, turned = (open_tasks([path], variants=names) for names in (["plain", "invert"], ["invert", "plain"]))
    chosen, other = whole.choosing(0.25), turned.choosing(0.25)

    for task, before in zip(chosen.tasks, whole.tasks, strict=True):
        assert task.aside is not None
        assert len(task.aside) == math.ceil(0.25 * len(before.train))
        both = np.concatenate([task.train.images_NHWC, task.aside.images_NHWC])
        assert sorted(map(bytes, both)) == sorted(map(bytes, before.train.images_NHWC))
        assert task.heldout is before.heldout
    for task, same in zip(chosen.tasks, reversed(other.tasks), strict=True):
        assert np.array_equal(task.aside.images_NHWC, same.aside.images_NHWC)
    assert chosen.fingerprint not in (whole.fingerprint, whole.choosing(0.5).fingerprint)
    with pytest.raises(UserError, match="are too few"):
        whole.choosing(0.9999)
