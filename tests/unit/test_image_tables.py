"""Pictures in arrays and in the columns of tables."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from overhaul.errors import UserError
from overhaul.image_files import gathered
from overhaul.image_tables import in_parquet, in_saved, is_saved, read_npz

IMAGES_NHWC = np.arange(4 * 3 * 5 * 3, dtype=np.uint8).reshape(4, 3, 5, 3)
LABELS_N = np.array([0, 1, 1, 0])


def png(number: int) -> bytes:
    held = io.BytesIO()
    Image.fromarray(IMAGES_NHWC[number]).save(held, "PNG")
    return held.getvalue()


def npz(folder: Path, **arrays: Any) -> Path:
    np.savez(folder / "a.npz", **arrays)
    return folder / "a.npz"


def parquet(path: Path, **columns: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path)
    return path


def test_arrays(tmp_path: Path):
    found = read_npz(npz(tmp_path, images=IMAGES_NHWC, labels=LABELS_N))
    assert (found.images_NHWC == IMAGES_NHWC).all()
    assert (found.labels_N.tolist(), found.classes) == ([0, 1, 1, 0], ("0", "1"))
    assert found.heldout_N is found.domains_N is None

    grey = npz(
        tmp_path,
        images=IMAGES_NHWC[..., 0],
        labels=np.array(["b", "a", "a", "b"]),
        classes=["a", "b"],
        domains=[2001, 2001, 1999, 1999],
        heldout=np.array([True, False, False, False]),
    )
    found = read_npz(grey, (6, 5))
    assert found.images_NHWC.shape == (4, 6, 5, 1)
    assert (found.labels_N.tolist(), found.classes) == ([1, 0, 0, 1], ("a", "b"))
    assert found.domains_N is not None
    assert (found.domains_N.tolist(), found.domains) == ([1, 1, 0, 0], ("1999", "2001"))
    assert found.heldout_N is not None
    assert found.heldout_N.tolist() == [True, False, False, False]


@pytest.mark.parametrize(
    ("arrays", "says"),
    [
        ({"image": IMAGES_NHWC, "labels": LABELS_N}, "has no array 'images', but image, labels"),
        ({"images": IMAGES_NHWC}, "has no array 'labels'"),
        ({"images": IMAGES_NHWC, "labels": LABELS_N[:3]}, r"labels in .* has the shape \(3,\), images that of 4"),
        ({"images": IMAGES_NHWC / 255, "labels": LABELS_N}, r"float64 [\s\S]*try: \(images \* 255\)"),
        ({"images": IMAGES_NHWC.transpose(0, 3, 1, 2), "labels": LABELS_N}, r"try: images.transpose\(0, 2, 3, 1\)"),
        ({"images": IMAGES_NHWC[0, 0], "labels": LABELS_N}, r"uint8 of the shape \(5, 3\)"),
        ({"images": IMAGES_NHWC, "labels": LABELS_N, "heldout": LABELS_N}, "heldout in .* is int64"),
        ({"images": IMAGES_NHWC, "labels": LABELS_N / 2}, "of type float"),
        ({"images": IMAGES_NHWC, "labels": LABELS_N, "classes": ["a"]}, "the class 1, which is not one of the 1"),
        ({"images": IMAGES_NHWC, "labels": np.array([{}] * 4)}, "cannot be read as .npz: Object arrays"),
    ],
)
def test_arrays_that_do_not_fit(tmp_path: Path, arrays: dict[str, Any], says: str):
    with pytest.raises(UserError, match=says):
        read_npz(npz(tmp_path, **arrays))


def test_a_file_that_is_no_npz(tmp_path: Path):
    path = npz(tmp_path, images=IMAGES_NHWC, labels=LABELS_N)
    for content in (path.read_bytes()[:200], b"words", b""):
        path.write_bytes(content)
        with pytest.raises(UserError, match=r"cannot be read as .npz"):
            read_npz(path)


@pytest.mark.parametrize("kind", ["bytes", "struct"])
def test_a_parquet_file(tmp_path: Path, kind: str):
    content = [png(n) for n in range(4)]
    image = content if kind == "bytes" else [{"bytes": each, "path": None} for each in content]

    found = gathered(in_parquet(parquet(tmp_path / "a.parquet", image=image, label=list("cabc"), domain=[1, 1, 2, 2])))

    assert (found.images_NHWC == IMAGES_NHWC).all()
    assert (found.labels_N.tolist(), found.classes) == ([2, 0, 1, 2], ("a", "b", "c"))
    assert (found.domains, found.heldout_N) == (("1", "2"), None)


def test_a_picture_may_be_a_file_beside_the_table_or_missing(tmp_path: Path):
    (tmp_path / "p.png").write_bytes(png(1))
    image = [{"bytes": None, "path": "p.png"}, {"bytes": png(2), "path": "gone.png"}, {"bytes": None, "path": None}]

    found = gathered(in_parquet(parquet(tmp_path / "a.parquet", image=image, label=[0, 1, 1])))

    assert (found.images_NHWC == IMAGES_NHWC[1:3]).all()
    assert found.notes == (f"1 unreadable pictures left out; first {tmp_path / 'a.parquet'}:3: not a picture",)


@pytest.mark.parametrize("below", ["", "data"])
def test_a_directory_of_parquet_files_keeps_its_division(tmp_path: Path, below: str):
    for name, numbers in (("train-0-of-2", [0, 1]), ("train-1-of-2", [2]), ("test-0-of-1", [3])):
        columns = {"image": [png(n) for n in numbers], "label": [int(LABELS_N[n]) for n in numbers]}
        parquet(tmp_path / below / f"{name}.parquet", **columns)

    found = gathered(in_parquet(tmp_path))

    assert found.heldout_N is not None
    assert sorted(zip(found.heldout_N.tolist(), found.labels_N.tolist(), strict=True)) == [
        (False, 0), (False, 1), (False, 1), (True, 0),
    ]  # fmt: skip


def test_tables_that_do_not_fit(tmp_path: Path):
    with pytest.raises(UserError, match=r"has no column 'image', but img, label[\s\S]*try: did you mean 'img'"):
        gathered(in_parquet(parquet(tmp_path / "a.parquet", img=[png(0)], label=[0])))
    with pytest.raises(UserError, match=r"the column image of .* holds int"):
        gathered(in_parquet(parquet(tmp_path / "a.parquet", image=[1], label=[0])))
    (tmp_path / "a.parquet").write_text("words")
    with pytest.raises(UserError, match=r"a.parquet is not a Parquet file"):
        gathered(in_parquet(tmp_path / "a.parquet"))


def test_what_datasets_saved(tmp_path: Path):
    from datasets import ClassLabel, Dataset, DatasetDict, Features
    from datasets import Image as ImageColumn

    rows = {"image": [{"bytes": png(n), "path": None} for n in range(4)], "label": LABELS_N.tolist()}
    features = Features({"image": ImageColumn(), "label": ClassLabel(names=["owl", "ant"])})
    whole = Dataset.from_dict(rows, features=features)
    whole.save_to_disk(tmp_path / "whole")
    whole.to_parquet(tmp_path / "whole.parquet")
    DatasetDict(train=whole.select([2, 0, 1]), test=whole.select([3])).save_to_disk(tmp_path / "parts")

    assert is_saved(tmp_path / "whole")
    assert is_saved(tmp_path / "parts")
    for found in (gathered(in_saved(tmp_path / "whole")), gathered(in_parquet(tmp_path / "whole.parquet"))):
        assert (found.images_NHWC == IMAGES_NHWC).all()
        assert (found.labels_N.tolist(), found.classes, found.heldout_N) == ([0, 1, 1, 0], ("owl", "ant"), None)
    parts = gathered(in_saved(tmp_path / "parts"))
    assert (parts.images_NHWC == IMAGES_NHWC[[2, 0, 1, 3]]).all()
    assert parts.heldout_N is not None
    assert parts.heldout_N.tolist() == [False, False, False, True]
