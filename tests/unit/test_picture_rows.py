"""Pictures one by one: what they are known by, and which of them are trained on."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from PIL import Image

from overhaul.errors import UserError
from overhaul.images import open_images
from overhaul.picture_rows import PIXELS, PictureRow, hashes_at, open_pictures

COLOURS = np.random.default_rng(0).integers(0, 255, (6, 4, 5, 3)).astype(np.uint8)


def saved(path: Path, pixels: np.ndarray) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)
    return path


def hashes(rows: tuple[PictureRow, ...]) -> list[str]:
    assert all(row.tags[0][0] == PIXELS for row in rows)
    return [row.tags[0][1] for row in rows]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for number, pixels in enumerate(COLOURS):
        saved(tmp_path / "pictures" / "ab"[number % 2] / f"{number}.png", pixels)
    return tmp_path / "pictures"


def test_a_picture_is_known_by_its_pixels_in_whatever_layout(folder: Path, tmp_path: Path):
    """A folder, an .npz, Parquet: the same rows, but for their order."""
    labels = ["a", "b"] * 3
    np.savez(tmp_path / "all.npz", images=COLOURS, labels=labels, user=np.arange(6) // 2)
    contents = [(folder / label / f"{n}.png").read_bytes() for n, label in enumerate(labels)]
    columns = {"image": contents, "label": labels, "user": [0, 0, 1, None, 2, 2]}
    pa.parquet.write_table(pa.table(columns), tmp_path / "all.parquet")
    found = {name: open_pictures(str(tmp_path / name)).train for name in ("pictures", "all.npz", "all.parquet")}
    assert len({tuple(sorted(row.id for row in rows)) for rows in found.values()}) == 1
    assert len(set(hashes(found["all.npz"]))) == 6
    assert hashes(found["all.npz"]) == hashes(found["all.parquet"]) == hashes_at(tmp_path / "all.npz")
    assert hashes(found["pictures"]) == hashes_at(folder), "in the order of the files"
    assert [row.label for row in found["all.parquet"]] == labels

    users = [[row.tags[1:] for row in open_pictures(str(tmp_path / f"all.{end}"), ["user"]).train]
             for end in ("npz", "parquet")]  # fmt: skip
    assert users[0] == [(("user", str(n // 2)),) for n in range(6)]
    assert users[1] == [*users[0][:3], (), *users[0][4:]]
    assert open_pictures(str(folder), ["file"]).train[0].tags[1:] == (("file", "a/0.png"),)


def test_grey_is_grey_in_whatever_mode_it_was_saved(tmp_path: Path):
    grey_HW = COLOURS[0, ..., 0]
    one = saved(tmp_path / "one.png", grey_HW)
    other = saved(tmp_path / "other.bmp", grey_HW[..., None].repeat(3, axis=-1))
    turned = saved(tmp_path / "turned.png", grey_HW.T)
    assert hashes_at(one) == hashes_at(other) != hashes_at(turned)
    assert hashes_at(one) != hashes_at(saved(tmp_path / "coloured.png", COLOURS[0]))


def test_the_label_belongs_to_the_content_and_the_place_does_not(folder: Path):
    saved(folder / "a" / "again.bmp", COLOURS[0])
    saved(folder / "b" / "other.png", COLOURS[0])
    rows = open_pictures(str(folder))
    alike = [row for row in rows.train if row.tags[0][1] == hashes_at(folder / "a" / "0.png")[0]]
    assert [row.where for row in alike] == ["a/0.png", "a/again.bmp", "b/other.png"]
    assert alike[0].id == alike[1].id != alike[2].id
    assert rows.notes == ("1 exact duplicates kept",)


def test_what_a_source_holds_out_is_not_trained_on(folder: Path, tmp_path: Path):
    whole = open_pictures(str(folder))
    assert (len(whole.train), len(whole.heldout)) == (6, 0), "nothing else is held out"
    saved(tmp_path / "divided" / "test" / "a" / "z.png", COLOURS[5])
    folder.rename(tmp_path / "divided" / "train")
    divided = open_pictures(str(tmp_path / "divided"))
    assert hashes(divided.train) == hashes(whole.train)
    assert [row.where for row in divided.heldout] == ["test/a/z.png"]
    assert whole.fingerprint != divided.fingerprint
    np.savez(tmp_path / "all.npz", images=COLOURS, labels=[0, 1] * 3, heldout=np.arange(6) > 4)
    assert (
        len(open_pictures(str(tmp_path / "all.npz")).train),
        len(open_pictures(str(tmp_path / "all.npz")).heldout),
    ) == (5, 1)


def test_a_named_set_is_divided_as_it_is():
    found, wanted = open_pictures("digits"), open_images("digits")
    assert (len(found.train), len(found.heldout)) == (len(wanted.train), len(wanted.heldout))
    assert np.array_equal(found.train[7].pixels_HWC, wanted.train.images_NHWC[7])
    assert found.train[7].label == wanted.classes[wanted.train.labels_N[7]]
    assert not set(hashes(found.train)) & set(hashes(found.heldout))


def test_pictures_at_a_path_are_all_read_or_none(folder: Path, tmp_path: Path):
    (folder / "notes.txt").write_text("no picture")
    assert len(hashes_at(folder)) == 6, "files of other kinds are none"
    (folder / "a" / "x.png").write_text("no picture")
    assert len(open_pictures(str(folder)).train) == 6
    with pytest.raises(UserError, match=r"1 pictures of .* cannot be read, such as a/x.png: not a picture"):
        hashes_at(folder)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="holds no pictures"):
        hashes_at(tmp_path / "empty")


def test_what_is_all_held_out_cannot_be_trained_on(tmp_path: Path):
    np.savez(tmp_path / "all.npz", images=COLOURS, labels=[0, 1] * 3, heldout=np.ones(6, bool))
    with pytest.raises(UserError, match="has no picture that is trained on"):
        open_pictures(str(tmp_path / "all.npz"))
    with pytest.raises(UserError, match="has no array 'user'"):
        open_pictures(str(tmp_path / "all.npz"), ["user"])
    with pytest.raises(UserError, match="--tags pixels: by these every picture is known already"):
        open_pictures("digits", [PIXELS])
