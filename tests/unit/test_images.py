"""Image sets: named ones, a user's own, and how both are divided."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from command import overhaul, python
from overhaul import images
from overhaul.errors import UserError
from overhaul.image_files import Pictures
from overhaul.image_sets import DIGITS
from overhaul.images import ImageSet, named_image_sets, open_images

NAMES = [info.name for info in named_image_sets()]


def opened(name: str, monkeypatch: pytest.MonkeyPatch) -> ImageSet:
    """A named set from what is on this machine: the clients that would fetch it are not found."""
    if name == "digits":
        pytest.importorskip("sklearn")
    monkeypatch.setenv("PATH", "/nowhere")
    try:
        return open_images(name)
    except UserError as error:
        if error.given.startswith("cannot fetch"):
            pytest.skip(f"{name} is not in the cache: open it once")
        raise


def as_bytes(part: images.Labelled) -> set[bytes]:
    return {image_HWC.tobytes() for image_HWC in part.images_NHWC}


def pictures(labels: list[int], *, seed: int = 0, **fields: object) -> Pictures:
    """Noise of 4 x 4 in classes called a, b, c, ..."""
    images_NHWC = np.random.default_rng(seed).integers(0, 256, (len(labels), 4, 4, 1), np.uint8)
    classes = tuple("abcdefgh"[: max(labels) + 1])
    return replace(Pictures(images_NHWC=images_NHWC, labels_N=np.array(labels), classes=classes), **fields)


def divided(found: Pictures) -> ImageSet:
    return images._divided("noise", "", "noise", found)


@pytest.mark.parametrize("name", NAMES)
def test_a_named_set_is_what_is_said_of_it_and_does_not_leak(name: str, monkeypatch: pytest.MonkeyPatch):
    found = opened(name, monkeypatch)
    info = next(info for info in named_image_sets() if info.name == name)

    assert (found.name, found.licence, found.source) == (name, info.licence, info.source)
    assert len(found.train) + len(found.heldout) == info.images
    assert len(found.classes) == len(set(found.classes)) == info.classes
    for part in (found.train, found.heldout):
        assert part.images_NHWC.dtype == np.uint8
        assert part.images_NHWC.shape == (len(part), *info.size)
        assert part.labels_N.dtype == np.int64
        assert set(part.labels_N.tolist()) == set(range(info.classes))
        assert int(part.images_NHWC.min()) == 0
        assert int(part.images_NHWC.max()) == 255
        assert (part.domains_N is not None) == bool(found.domains)
    assert as_bytes(found.train) & as_bytes(found.heldout) == set()
    share = len(found.heldout) / info.images
    assert share == pytest.approx(1 / 7 if name == "fashion-mnist" else 0.2, abs=0.005)


def test_digits_are_those_of_scikit_learn(monkeypatch: pytest.MonkeyPatch):
    loaded = pytest.importorskip("sklearn.datasets").load_digits()
    found = opened("digits", monkeypatch)

    made = zip(np.round(loaded.images * 255 / 16).astype(np.uint8), loaded.target, strict=True)
    expected = sorted((image.tobytes(), int(label)) for image, label in made)
    both = [
        pair
        for part in (found.train, found.heldout)
        for pair in zip(map(bytes, part.images_NHWC), part.labels_N.tolist(), strict=True)
    ]
    assert sorted(both) == expected
    assert found.classes == DIGITS
    assert np.bincount(found.heldout.labels_N).tolist() == [36, 36, 35, 37, 36, 36, 36, 36, 35, 36]


def test_digits_without_scikit_learn_say_what_to_install(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)

    with pytest.raises(UserError) as caught:
        open_images("digits")
    assert caught.value.hint == "pip install 'overhaul[images]'"


def test_fashion_mnist_keeps_its_own_division_and_is_read_at_once(monkeypatch: pytest.MonkeyPatch):
    started = time.process_time()
    found = opened("fashion-mnist", monkeypatch)

    assert time.process_time() - started < 4  # half of it on the machine that was measured
    assert np.bincount(found.train.labels_N).tolist() == [6000] * 10
    assert np.bincount(found.heldout.labels_N).tolist() == [1000] * 10
    # The published beginnings of both files: ankle boot, T-shirt, T-shirt; ankle boot, pullover, trouser.
    assert [found.classes[label] for label in found.train.labels_N[:3]] == ["Ankle boot", "T-shirt/top", "T-shirt/top"]
    assert [found.classes[label] for label in found.heldout.labels_N[:3]] == ["Ankle boot", "Pullover", "Trouser"]


def test_an_icons_name_is_held_out_in_every_theme_or_in_none(monkeypatch: pytest.MonkeyPatch):
    opened("icons", monkeypatch)
    asked: list[Pictures] = []
    held_out = images._held_out
    monkeypatch.setattr(images, "_held_out", lambda found, digests: asked.append(found) or held_out(found, digests))

    found = open_images("icons")

    held = as_bytes(found.heldout)
    by_name: dict[str, set[bool]] = {}
    for name, image_HWC in zip(asked[0].groups, asked[0].images_NHWC, strict=True):
        by_name.setdefault(name, set()).add(image_HWC.tobytes() in held)
    assert [name for name, where in by_name.items() if len(where) > 1] == []
    assert found.domains == ("gnome", "mate", "oxygen", "tango")
    assert found.heldout.domains_N is not None
    assert np.bincount(found.heldout.domains_N).min() > 30


def test_a_named_set_in_another_size(monkeypatch: pytest.MonkeyPatch):
    opened("digits", monkeypatch)

    assert open_images("digits", size=(28, 20)).train.images_NHWC.shape[1:] == (28, 20, 1)


def test_a_users_folder(tmp_path: Path):
    noise_NHWC = np.random.default_rng(0).integers(0, 256, (20, 4, 4, 3), np.uint8)
    for number, image_HWC in enumerate(noise_NHWC):
        file = tmp_path / "pets" / ("cat" if number % 2 else "dog") / f"{number}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image_HWC).save(file)

    found = open_images(tmp_path / "pets")

    assert (found.name, found.licence, found.source) == ("pets", "not stated", str(tmp_path / "pets"))
    assert (len(found.train), len(found.heldout)) == (16, 4)
    assert as_bytes(found.train) | as_bytes(found.heldout) == set(map(bytes, noise_NHWC))
    assert open_images(str(tmp_path / "pets"), size=(2, 2)).train.images_NHWC.shape == (16, 2, 2, 3)


def test_the_division_does_not_depend_on_the_order():
    found = pictures([0] * 25 + [1] * 10)
    turned = replace(found, images_NHWC=found.images_NHWC[::-1], labels_N=found.labels_N[::-1])

    ours, theirs = divided(found), divided(turned)

    assert np.bincount(ours.heldout.labels_N).tolist() == [5, 2]
    assert as_bytes(ours.heldout) == as_bytes(theirs.heldout)
    assert ours.fingerprint == divided(found).fingerprint


def test_equal_images_go_the_same_way():
    found = pictures([0] * 40 + [1] * 10)
    found.images_NHWC[20:40] = found.images_NHWC[:20]

    parts = divided(found)

    assert as_bytes(parts.train) & as_bytes(parts.heldout) == set()
    assert (parts.heldout.labels_N == 0).sum() == 8


def test_an_image_with_two_labels_is_never_held_out():
    found = pictures([0] * 6 + [1] * 6)
    found.images_NHWC[6:9] = found.images_NHWC[:3]

    parts = divided(found)

    assert parts.notes == ("6 images that also occur in another class are trained on, never held out",)
    assert as_bytes(parts.heldout) & as_bytes(divided(found).train) == set()
    assert set(map(bytes, found.images_NHWC[:3])) <= as_bytes(parts.train)


def test_a_group_is_not_divided():
    found = pictures([0] * 30 + [1] * 30, groups=tuple(f"g{n % 10}" for n in range(60)))

    parts = divided(found)

    group_of = dict(zip(map(bytes, found.images_NHWC), found.groups, strict=True))
    train, heldout = ({group_of[image] for image in as_bytes(part)} for part in (parts.train, parts.heldout))
    assert train & heldout == set()
    assert len(heldout) == 2


def test_the_smallest_sets():
    parts = divided(pictures([0, 0, 1]))
    assert (len(parts.train), len(parts.heldout)) == (2, 1)
    assert parts.notes == ("classes of which nothing is held out: b",)

    with pytest.raises(UserError, match="too few pictures to hold some out"):
        divided(pictures([0, 1]))
    with pytest.raises(UserError, match="has the class a alone"):
        divided(pictures([0, 0, 0]))


def test_a_division_of_the_source_is_kept_and_what_it_repeats_is_told():
    found = pictures([0, 1, 0, 1], heldout_N=np.array([False, False, True, True]))
    found.images_NHWC[2] = found.images_NHWC[0]

    parts = divided(found)

    assert parts.heldout.labels_N.tolist() == [0, 1]
    assert parts.notes == ("1 held-out images are in train too, pixel for pixel; the source divides so",)


def test_classes_that_are_held_out_and_never_trained_on():
    heldout_N = np.array([False, False, True, True, True, True, True, True, True])

    with pytest.raises(UserError, match="never trained on: c, d, e, f, g and 1 more\n"):
        divided(pictures([0, 1, 2, 3, 4, 5, 6, 7, 0], heldout_N=heldout_N))


def test_classes_without_a_picture_are_left_out():
    parts = divided(pictures([1, 1, 1, 3, 3, 3]))

    assert parts.classes == ("b", "d")
    assert set(parts.train.labels_N.tolist()) == {0, 1}
    assert parts.notes == ("classes without a picture left out: a, c",)


def test_the_fingerprint_sees_pixels_labels_and_names():
    found = pictures([0] * 5 + [1] * 5, domains_N=np.array([0, 1] * 5), domains=("x", "y"))
    heldout_N = np.array([False, True] * 5)
    found = replace(found, heldout_N=heldout_N)
    pixel = found.images_NHWC.copy()
    pixel[0, 0, 0, 0] ^= 1
    others = (
        replace(found, images_NHWC=pixel),
        replace(found, images_NHWC=found.images_NHWC.reshape(10, 2, 8, 1)),
        replace(found, labels_N=1 - found.labels_N),
        replace(found, classes=("a", "z")),
        replace(found, domains=("x", "z")),
        replace(found, domains_N=1 - np.array([0, 1] * 5)),
        replace(found, heldout_N=~heldout_N),
    )

    known = {divided(each).fingerprint for each in (found, *others)}

    assert len(known) == 1 + len(others)
    assert {len(fingerprint) for fingerprint in known} == {16}


@pytest.mark.parametrize(
    ("path", "says"),
    [
        ("fashion-mnits", "did you mean 'fashion-mnist'?"),
        ("nowhere", "neither a name nor an existing path"),
        ("pets.zip", "unpack it and give the directory"),
        ("words.txt", "a folder for each class, an .npz, Parquet"),
        ("empty", "empty has no folders"),
    ],
)
def test_what_cannot_be_opened(path: str, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    for name in ("pets.zip", "words.txt"):
        Path(name).touch()
    Path("empty").mkdir()

    with pytest.raises(UserError) as caught:
        open_images(path)
    assert says in str(caught.value)


@pytest.mark.parametrize("size", [(32,), (0, 32), (32.0, 32), (1, 2, 3)])
def test_a_size_that_is_none(size: tuple):
    with pytest.raises(UserError, match="height and width in pixels"):
        open_images("digits", size=size)


def test_they_are_listed():
    shown, told = overhaul("data", "list"), json.loads(overhaul("data", "list", "--json").out)

    assert [each["name"] for each in told["images"]] == NAMES
    assert told["corpora"]
    assert all(f"\n{name} " in shown.out for name in NAMES)


def test_the_page_says_what_the_list_says():
    page = (Path(__file__).parents[2] / "docs" / "reference" / "images.md").read_text()

    for info in named_image_sets():
        height, width, channels = info.size
        colours = "RGB" if channels == 3 else "grey"
        row = f"| `{info.name}` | {info.what} | {info.images:,} | {info.classes} | {height} x {width} {colours} |"
        assert row in page


def test_importing_it_is_light():
    code = "import sys, overhaul.images as i; i.named_image_sets()\n"
    code += "print({'torch', 'numpy', 'PIL', 'pyarrow', 'sklearn', 'datasets'} & set(sys.modules))"

    assert python(code).out == "set()\n"
