"""Labelled images by name or by path, each set divided into train and heldout."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from overhaul import image_files, image_sets, image_tables
from overhaul.errors import UserError, did_you_mean
from overhaul.image_files import FILE, Pictures, Size, Undecoded
from overhaul.image_sets import ImageSetInfo, named_image_sets
from overhaul.split import held_out

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

__all__ = ["ImageSet", "ImageSetInfo", "Labelled", "named_image_sets", "open_images"]

LISTED = 5
"""Names in a note or an error; of the others, how many there are."""
NOTHING_READ = "a folder for each class, an .npz, Parquet, or a directory that datasets saved"


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Labelled:
    """Images and what they show.

    Attributes:
        images_NHWC: uint8, 0 to 255; C is 1 (grey) or 3 (RGB).
        labels_N: int64, places in the set's `classes`.
        domains_N: int64, places in the set's `domains`, if it has any.
    """

    images_NHWC: NDArray[np.uint8]
    labels_N: NDArray[np.int64]
    domains_N: NDArray[np.int64] | None = None

    def __len__(self) -> int:
        return len(self.labels_N)

    def chosen(self, kept_N: NDArray[np.bool_]) -> Labelled:
        """Some of them."""
        domains_N = None if self.domains_N is None else self.domains_N[kept_N]
        return Labelled(images_NHWC=self.images_NHWC[kept_N], labels_N=self.labels_N[kept_N], domains_N=domains_N)

    def relabelled(self, places_C: NDArray[np.int64]) -> Labelled:
        """The same with other labels: for each one that there is, its new one."""
        return replace(self, labels_N=places_C[self.labels_N])


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ImageSet:
    """Labelled images in two parts; where they were divided here, no image is in both.

    Attributes:
        name: as it was asked for.
        licence: what the images may be used under.
        source: the packages and versions, or the path they were read from.
        classes: their names, in the order of the labels; each has images in train.
        train, heldout: for training, for measuring; all images have one size.
        domains: names of what differs between images of the same class, such as who drew them; often none.
        notes: what was left out, resized or is in both parts, one sentence each.
        fingerprint: SHA-256 over pixels, labels and names, its first 16 hex digits.
    """

    name: str
    licence: str
    source: str
    classes: tuple[str, ...]
    train: Labelled
    heldout: Labelled
    domains: tuple[str, ...] = ()
    notes: tuple[str, ...]
    fingerprint: str


def open_images(path: str | Path, *, size: Size | None = None) -> ImageSet:
    """Reads a set of labelled images and divides it, if its source does not.

    Args:
        path: a name of `named_image_sets`; a directory with a folder for each class, with train/ and test/ above them
            or not; an `.npz`; a Parquet file, a directory of them, or one that `datasets` saved. Of a string a name
            wins over a path: write `./digits` for a folder called `digits`.
        size: (height, width) in pixels that all images are resized to; needed where they have several sizes.

    Raises:
        UserError: it does not exist or cannot be fetched or read, images differ in size, there are fewer than two
            classes, or some are held out and never trained on.
    """
    _check_size(size)
    if isinstance(path, str) and path in image_sets.NAMED:
        info, read = image_sets.NAMED[path]
        return _divided(info.name, info.licence, info.source, read(size or info.size[:2]))
    there = existing(path)
    return _divided(there.resolve().name, "not stated", str(path), _read(there, size))


def existing(path: str | Path) -> Path:
    """A path to images that is there, or `UserError`."""
    there = Path(path)
    if not there.exists():
        raise UserError(
            f"images {str(path)!r} are neither a name nor an existing path",
            allowed=f"{', '.join(image_sets.NAMED)}, or {NOTHING_READ}",
            hint=did_you_mean(str(path), image_sets.NAMED) or "overhaul data list",
        )
    return there


def _check_size(size: Size | None) -> None:
    if size is not None and (len(size) != 2 or any(not isinstance(edge, int) or edge < 1 for edge in size)):
        raise UserError(f"size = {size!r}", allowed="height and width in pixels", hint="size=(32, 32)")


def _read(path: Path, size: Size | None) -> Pictures:
    if path.suffix == ".npz" and path.is_file():
        return image_tables.read_npz(path, size)
    return image_files.gathered(undecoded(path), size)


def undecoded(path: Path, tags: Sequence[str] = ()) -> Undecoded:
    """Where the pictures of a directory or a Parquet file are.

    Args:
        path: it exists.
        tags: columns that each picture keeps beside its content.

    Raises:
        UserError: it is of another kind, what is in it fits no layout, or it has no such column.
    """
    if path.is_dir():
        if image_tables.is_saved(path):
            return image_tables.in_saved(path, tags)
        if image_tables.parquet_files(path):
            return image_tables.in_parquet(path, tags)
        if strange := next((name for name in tags if name != FILE), None):
            raise UserError(f"{path} is a folder of pictures, and has no column {strange!r}", allowed=f"--tags {FILE}")
        return image_files.in_folder(path)
    if path.suffix == ".parquet":
        return image_tables.in_parquet(path, tags)
    raise UserError(
        f"{path} is a file of a kind that is not read as images",
        allowed=NOTHING_READ,
        hint="unpack it and give the directory"
        if path.suffix in (".zip", ".tar", ".gz", ".tgz", ".bz2", ".xz")
        else "",
    )


def _divided(name: str, licence: str, source: str, found: Pictures) -> ImageSet:
    import numpy as np

    found = _without_empty_classes(replace(found, images_NHWC=np.ascontiguousarray(found.images_NHWC)))
    if len(found.classes) < 2:
        raise UserError(f"{source} has the class {_listed(found.classes)} alone", allowed="two classes or more")
    digests = [hashlib.sha256(image_HWC).digest() for image_HWC in found.images_NHWC]
    if found.heldout_N is None:
        heldout_N, notes = _held_out(found, digests)
    else:
        heldout_N, notes = found.heldout_N, _repeated(found.heldout_N, digests)
    notes = (*found.notes, *notes, *_checked(found, heldout_N, source))
    train, heldout = (
        Labelled(
            images_NHWC=found.images_NHWC[part_N],
            labels_N=found.labels_N[part_N],
            domains_N=None if found.domains_N is None else found.domains_N[part_N],
        )
        for part_N in (~heldout_N, heldout_N)
    )
    return ImageSet(
        name=name,
        licence=licence,
        source=source,
        classes=found.classes,
        train=train,
        heldout=heldout,
        domains=found.domains,
        notes=notes,
        fingerprint=_fingerprint((train, heldout), found.classes, found.domains),
    )


def _without_empty_classes(found: Pictures) -> Pictures:
    import numpy as np

    counts_C = np.bincount(found.labels_N, minlength=len(found.classes))
    if counts_C.all():
        return found
    empty = [name for name, count in zip(found.classes, counts_C, strict=True) if not count]
    return replace(
        found,
        labels_N=(np.cumsum(counts_C > 0) - 1)[found.labels_N],
        classes=tuple(name for name in found.classes if name not in empty),
        notes=(*found.notes, f"classes without a picture left out: {_listed(empty)}"),
    )


def _held_out(found: Pictures, digests: Sequence[bytes]) -> tuple[NDArray[np.bool_], tuple[str, ...]]:
    """A fifth of each class, by content or group. One with several labels is trained on: it could not be told right."""
    import numpy as np

    groups = [hashlib.sha256(group.encode()).digest() for group in found.groups]
    heldout, contradictory = held_out(found.labels_N.tolist(), digests, groups)
    if not contradictory:
        return np.array(heldout), ()
    told = f"{contradictory:,} images that also occur in another class are trained on, never held out"
    return np.array(heldout), (told,)


def _repeated(heldout_N: NDArray[np.bool_], digests: Sequence[bytes]) -> tuple[str, ...]:
    """What the source itself has in both parts: told, because its division is what others measure on too."""
    trained = {digest for digest, held in zip(digests, heldout_N, strict=True) if not held}
    count = sum(digest in trained for digest, held in zip(digests, heldout_N, strict=True) if held)
    return (f"{count:,} held-out images are in train too, pixel for pixel; the source divides so",) if count else ()


def _checked(found: Pictures, heldout_N: NDArray[np.bool_], source: str) -> tuple[str, ...]:
    """Refuses a division that cannot be learnt from; notes one that does not measure every class."""
    trained, held = (Counter(found.labels_N[part_N].tolist()) for part_N in (~heldout_N, heldout_N))
    if not held:
        raise UserError(f"{source} has too few pictures to hold some out", allowed="two different ones of some class")
    if unseen := [name for label, name in enumerate(found.classes) if label not in trained]:
        raise UserError(
            f"{source} holds out classes that are never trained on: {_listed(unseen)}",
            allowed="classes that have pictures in train too",
        )
    unmeasured = [name for label, name in enumerate(found.classes) if label not in held]
    return (f"classes of which nothing is held out: {_listed(unmeasured)}",) if unmeasured else ()


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - LISTED:,} more" if len(names) > LISTED else ""
    return ", ".join(names[:LISTED]) + more


def _fingerprint(parts: Sequence[Labelled], classes: Sequence[str], domains: Sequence[str]) -> str:
    digest = hashlib.sha256(json.dumps([classes, domains]).encode())
    for part in parts:
        digest.update(str(part.images_NHWC.shape).encode())
        digest.update(part.images_NHWC.data)
        for numbers_N in (part.labels_N, part.domains_N):
            if numbers_N is not None:
                digest.update(
                    numbers_N.astype("<i8").data
                )  # the same on a machine that counts bytes from the other end
    return digest.hexdigest()[:16]
