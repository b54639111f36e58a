"""Folders of pictures as people have them: every format, and what is wrong with some of them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from overhaul.errors import UserError
from overhaul.image_files import decoded, gathered, in_folder, numbered, parts_among, resized


def save(path: Path, colour: object, mode: str = "RGB", size: tuple[int, int] = (6, 4), **options: object) -> Path:
    """A picture of one colour, 6 wide and 4 high."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, colour).save(path, **options)
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two classes of three pictures each."""
    for label in ("cat", "dog"):
        for number in range(3):
            save(tmp_path / "pets" / label / f"{number}.png", (number, 10, 20 if label == "cat" else 30))
    return tmp_path / "pets"


def test_a_folder_for_each_class(folder: Path):
    found = gathered(in_folder(folder))

    assert found.images_NHWC.shape == (6, 4, 6, 3)
    assert found.images_NHWC.dtype == np.uint8
    assert found.classes == ("cat", "dog")
    assert found.labels_N.tolist() == [0, 0, 0, 1, 1, 1]
    assert found.images_NHWC[:, 0, 0].tolist() == [[n, 10, blue] for blue in (20, 30) for n in range(3)]
    assert found.heldout_N is None
    assert found.notes == ()


@pytest.mark.parametrize("other", ["test", "val", "valid", "heldout", "Test"])
def test_a_division_that_is_there_is_kept(folder: Path, other: str):
    top = folder.parent / "divided"
    top.mkdir()
    folder.rename(top / "train")
    save(top / other / "dog" / "a.png", "red")

    found = gathered(in_folder(top))

    assert found.heldout_N is not None
    assert found.heldout_N.tolist() == [False] * 6 + [True]
    assert found.labels_N[-1] == 1


def test_of_two_parts_that_are_held_out_one_is_read():
    assert parts_among(["train", "val", "test"], "x") == ({"train": "train", "test": "heldout"}, ("val left out",))
    assert parts_among(["train"], "x") == ({"train": ""}, ())
    with pytest.raises(UserError, match="x has val, test, but no part 'train'"):
        parts_among(["val", "test"], "x")


def test_formats_are_mixed_and_folders_nest(folder: Path):
    for suffix in ("jpg", "bmp", "gif", "webp", "tiff"):
        save(folder / "cat" / "more" / f"a.{suffix}", (200, 100, 50))
    save(folder / "dog" / "palette.png", 0, "P")

    found = gathered(in_folder(folder))

    assert len(found.labels_N) == 12
    assert np.abs(found.images_NHWC[3:8].astype(int) - [200, 100, 50]).max() <= 8


def test_grey_stays_one_channel_only_if_all_are_grey(tmp_path: Path):
    for label, mode, colour in (("a", "L", 7), ("b", "1", 1), ("b", "LA", (9, 255))):
        save(tmp_path / label / f"{mode}.png", colour, mode)

    grey = gathered(in_folder(tmp_path))
    assert grey.images_NHWC.shape == (3, 4, 6, 1)
    assert grey.images_NHWC[:, 0, 0, 0].tolist() == [7, 255, 9]

    save(tmp_path / "b" / "z.png", (1, 2, 3))
    assert gathered(in_folder(tmp_path)).images_NHWC[:, 0, 0].tolist() == [[7] * 3, [255] * 3, [9] * 3, [1, 2, 3]]


def test_sixteen_bits_are_scaled_and_not_clipped(tmp_path: Path):
    Image.fromarray(np.array([[0, 257, 65535]], np.uint16)).save(tmp_path / "a.png")

    assert decoded(tmp_path / "a.png")[..., 0].tolist() == [[0, 1, 255]]


def test_thirty_two_bits_have_no_scale(tmp_path: Path):
    Image.fromarray(np.ones((2, 2), np.float32)).save(tmp_path / "a.tiff")

    with pytest.raises(ValueError, match="32 bits"):
        decoded(tmp_path / "a.tiff")


def test_what_is_transparent_is_white_and_exif_turns(tmp_path: Path):
    half = save(tmp_path / "half.png", (0, 0, 0, 0), "RGBA")
    assert decoded(half).min() == 255

    turned = Image.new("RGB", (6, 4), "black")
    turned.putpixel((0, 0), (255, 255, 255))
    exif = Image.Exif()
    exif[0x0112] = 6  # turn a quarter, clockwise
    turned.save(tmp_path / "turned.png", exif=exif)

    upright = decoded(tmp_path / "turned.png")
    assert upright.shape == (6, 4, 3)
    assert upright[0, 3].tolist() == [255, 255, 255]


def test_pictures_of_several_sizes_need_one(folder: Path):
    save(folder / "dog" / "large.png", "red", size=(9, 5))

    with pytest.raises(UserError, match=r"cat.0.png is 4 x 6, dog.large.png is 5 x 9") as caught:
        gathered(in_folder(folder))
    assert caught.value.hint == "size=(32, 32)"
    assert gathered(in_folder(folder), (8, 2)).images_NHWC.shape == (7, 8, 2, 3)


def test_resizing_arrays_is_resizing_files(tmp_path: Path):
    noise_NHWC = np.random.default_rng(0).integers(0, 256, (2, 8, 12, 3), np.uint8)
    Image.fromarray(noise_NHWC[1]).save(tmp_path / "a.png")

    assert (resized(noise_NHWC, (4, 5))[1] == decoded(tmp_path / "a.png", (4, 5))).all()
    assert resized(noise_NHWC[..., :1], (4, 5)).shape == (2, 4, 5, 1)
    assert resized(noise_NHWC, (8, 12)) is noise_NHWC


def test_what_cannot_be_read_is_left_out_and_counted(folder: Path):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (4, 6, 3), np.uint8))
    for name in ("cut.jpg", "cut.png"):
        noise.save(folder / "cat" / name)
        (folder / "cat" / name).write_bytes((folder / "cat" / name).read_bytes()[:-40])
    (folder / "dog" / "words.png").write_text("no picture")
    (folder / "dog" / "empty.png").touch()

    found = gathered(in_folder(folder))

    assert len(found.labels_N) == 6
    assert found.notes[0].startswith("4 unreadable pictures left out; first cat/cut.jpg: ")


def test_more_than_half_unreadable_is_an_error(folder: Path):
    for number in range(7):
        (folder / "dog" / f"x{number}.png").write_text("no picture")

    with pytest.raises(UserError, match=r"7 of the 13 pictures in .* cannot be read; first dog/x0.png: not a picture"):
        gathered(in_folder(folder))


def test_postscript_is_not_run(folder: Path):
    (folder / "dog" / "a.png").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 6 4\nshowpage\n")

    assert "dog/a.png: not a picture" in gathered(in_folder(folder)).notes[0]


def test_hidden_files_are_ignored_and_others_noted(folder: Path):
    for name in (".DS_Store", "cat/.hidden.png", ".cache/x/a.png", "__MACOSX/cat/a.png"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("x")
    assert gathered(in_folder(folder)).notes == ()

    for name in ("cat/labels.txt", "README.md"):
        (folder / name).write_text("x")
    assert gathered(in_folder(folder)).notes == (
        f"2 files ignored that are no pictures in a class folder; first {folder / 'README.md'}",
    )


def test_an_empty_class_is_named(folder: Path):
    (folder / "eel").mkdir()
    with pytest.raises(UserError, match=r"eel holds no picture\n") as caught:
        gathered(in_folder(folder))
    assert caught.value.hint == "remove eel/ or put pictures into it"

    (folder / "eel" / "a.heic").touch()
    with pytest.raises(UserError, match=r"eel holds no picture \(1 files of other kinds, first a.heic\)"):
        gathered(in_folder(folder))


def test_fewer_than_two_classes(folder: Path, tmp_path: Path):
    save(tmp_path / "flat" / "a.png", "red")
    with pytest.raises(UserError, match="flat has no folders"):
        gathered(in_folder(tmp_path / "flat"))

    save(tmp_path / "one" / "cat" / "a.png", "red")
    with pytest.raises(UserError, match="the class cat alone") as caught:
        gathered(in_folder(tmp_path / "one"))
    assert "FOLDER/CLASS/picture.png" in caught.value.allowed


def test_labels_are_numbered_in_order():
    labels_N, names = numbered([7, 3, 7], "x", "class")
    assert (labels_N.tolist(), names) == ([1, 0, 1], ("3", "7"))
    labels_N, names = numbered(["b", "a"], "x", "class", ["c", "b", "a"])
    assert (labels_N.tolist(), names) == ([1, 2], ("c", "b", "a"))


@pytest.mark.parametrize(
    ("labels", "names", "says"),
    [
        ([0, 3], ["a", "b"], "x has the class 3, which is not one of the 2 it names\nallowed: 0 to 1"),
        ([-1, 0], ["a", "b"], "the class -1"),
        (["z"], ["a", "b"], "the class 'z'"),
        ([0], ["a", "a"], "names the class 'a' twice"),
        ([0, "a"], None, "of type int, str\nallowed: all whole numbers, or all text"),
        ([0.5], None, "of type float"),
        ([None, 1], None, "of type NoneType, int"),
        ([True], None, "of type bool"),
    ],
)
def test_labels_that_are_none(labels: list[object], names: list[str] | None, says: str):
    with pytest.raises(UserError) as caught:
        numbered(labels, "x", "class", names)
    assert says in str(caught.value)
