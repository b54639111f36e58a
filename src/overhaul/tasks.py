"""Task sequences: labelled examples that a model learns one task after the other.

Examples are images or texts. Three kinds are common (van de Ven and Tolias, 2019): of every task other classes, of one
set (class-incremental) or of several; or the same classes in pictures that look otherwise (domain-incremental).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from overhaul.errors import UserError, did_you_mean, refuse_twice
from overhaul.images import ImageSet, Labelled, open_images
from overhaul.labelled_texts import LabelledTexts, TextSet, joined

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

PLAIN = "plain"


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Task:
    """What is learnt at one time.

    Attributes:
        name: of no other task of the sequence.
        classes: its classes, by their places in the sequence's, ascending.
        train, heldout: examples; their labels are places in the sequence's classes.
        aside: examples that are neither, by which what was learnt is chosen; None where nothing is.
    """

    name: str
    classes: tuple[int, ...]
    train: Labelled | LabelledTexts
    heldout: Labelled | LabelledTexts
    aside: Labelled | LabelledTexts | None = None

    @property
    def num_classes(self) -> int:
        """How many it has."""
        return len(self.classes)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TaskSequence:
    """Tasks in the order in which they are learnt.

    Attributes:
        name: how the user called it.
        tasks: one after the other; all images have one size.
        classes: of all tasks, in the order in which they come up, so that a head grows at its end.
        licence: what the examples may be used under.
        notes: what was left out, one sentence each.
        fingerprint: hash of all examples, in order.
        unit: what the examples are: `images` or `texts`.
    """

    name: str
    tasks: tuple[Task, ...]
    classes: tuple[str, ...]
    licence: str
    notes: tuple[str, ...]
    fingerprint: str
    unit: str = "images"

    @property
    def has_same_classes(self) -> bool:
        """Whether all tasks have the same classes: then a task cannot be told by a class."""
        return all(task.classes == self.tasks[0].classes for task in self.tasks)

    def first(self, count: int) -> TaskSequence:
        """The first so many tasks.

        Raises:
            UserError: there are not as many.
        """
        if count > len(self.tasks):
            raise UserError(f"first_tasks {count} of {self.name}", allowed=f"1 to {len(self.tasks)}")
        return replace(
            self,
            tasks=self.tasks[:count],
            classes=self.classes[: self.num_classes(count)],
            fingerprint=_hash([self.fingerprint, "first", count]),
        )

    def validating(self, share: float) -> TaskSequence:
        """The same tasks with a share of the training examples, drawn once for all, in place of the held-out ones.

        Raises:
            UserError: of a task nothing would be left to train on.
        """
        import numpy as np

        tasks = []
        for number, task in enumerate(self.tasks):
            back_N = _drawn(task, share, np.random.default_rng(number))
            tasks.append(replace(task, train=task.train.chosen(~back_N), heldout=task.train.chosen(back_N)))
        return replace(self, tasks=tuple(tasks), fingerprint=_hash([self.fingerprint, "validating", share]))

    def choosing(self, share: float) -> TaskSequence:
        """The same tasks with a share of the training examples aside, the same ones at whatever place a task stands.

        Raises:
            UserError: of a task nothing would be left to train on.
        """
        import numpy as np

        tasks = []
        for task in self.tasks:
            aside_N = _drawn(task, share, np.random.default_rng(int(_hash([task.name]), 16)))
            tasks.append(replace(task, train=task.train.chosen(~aside_N), aside=task.train.chosen(aside_N)))
        return replace(self, tasks=tuple(tasks), fingerprint=_hash([self.fingerprint, "choosing", share]))

    def classes_of(self, tasks: Sequence[int]) -> tuple[int, ...]:
        """The classes of some tasks, counted from 0, by their places, ascending."""
        return tuple(sorted({place for number in tasks for place in self.tasks[number].classes}))

    def num_classes(self, tasks: int) -> int:
        """Classes of the first so many tasks together."""
        return 1 + max(place for task in self.tasks[:tasks] for place in task.classes)


def open_tasks(
    paths: Sequence[str],
    *,
    split: int | None = None,
    variants: Sequence[str] = (),
    order: int | None = None,
    size: tuple[int, int] | None = None,
) -> TaskSequence:
    """A sequence of image sets, or made of one set.

    Args:
        paths: image sets as `open_images` reads them. Of several, each is a task with classes of its own.
        split: of one set, tasks that its classes are divided into, in their order, the first with one more where they
            do not come out even.
        variants: of one set, a task for each: `plain`, `invert`, `rotate=DEGREES`, `permute=SEED` (of the pixels),
            `domain=NAME` (the pictures of one domain), or `domains` for one task a domain.
        order: seed of the order of the classes before they are divided, or of the variants or sets; None leaves it.
        size: (height, width) in pixels that all images are resized to.

    Raises:
        UserError: a set cannot be read, sets differ in size or channels, or what is asked for does not fit.
    """
    _refuse_what_does_not_fit(paths, split, variants)
    sets = [open_images(path, size=size) for path in paths]
    if split is not None:
        tasks, classes = _divided(sets[0], split, order)
    elif variants:
        tasks, classes = _varied(sets[0], variants)
    else:
        _refuse_unlike(sets)
        tasks, classes = _joined(sets)
    if order is not None and split is None:
        tasks = [tasks[place] for place in _permutation(len(tasks), order)]
        tasks, classes = _as_they_come(tasks, classes)
    return TaskSequence(
        name=" ".join(paths),
        tasks=tuple(tasks),
        classes=classes,
        licence="; ".join(dict.fromkeys(one.licence for one in sets)),
        notes=tuple(dict.fromkeys(note for one in sets for note in one.notes)),
        fingerprint=_fingerprint(sets, tasks, classes),
    )


def tasks_of_texts(
    sets: Sequence[TextSet], *, name: str, split: int | None = None, order: int | None = None
) -> TaskSequence:
    """A sequence of labelled texts: a task for each set, or the classes of all sets divided.

    Args:
        sets: of which no two have a class in common.
        name: how the user called them.
        split: tasks that the classes are divided into, as in `open_tasks`.
        order: seed of the order of the classes before they are divided, or of the sets.

    Raises:
        UserError: a class is in two sets, there is one class in all, or what is asked for does not fit.
    """
    whole = joined(sets)
    if len(whole.classes) < 2:
        raise UserError(f"{name} has the class {', '.join(whole.classes)} alone", allowed="two classes or more")
    tasks, classes = _divided(whole, split, order) if split is not None else _joined(sets)
    if order is not None and split is None:
        tasks = [tasks[place] for place in _permutation(len(tasks), order)]
        tasks, classes = _as_they_come(tasks, classes)
    return TaskSequence(
        name=name,
        tasks=tuple(tasks),
        classes=classes,
        licence=whole.licence,
        notes=(*whole.notes, *_repeated(whole)),
        fingerprint=_fingerprint(sets, tasks, classes),
        unit="texts",
    )


def _repeated(whole: TextSet) -> tuple[str, ...]:
    """What is held out of one set and trained on in another, under another label."""
    trained = set(whole.train.texts)
    count = sum(text in trained for text in whole.heldout.texts)
    return (f"{count:,} held-out texts are trained on in another task, under another label",) if count else ()


def _drawn(task: Task, share: float, dice: np.random.Generator) -> NDArray[np.bool_]:
    """`(N,)`: which of a task's training examples are that share of them.

    Raises:
        UserError: all are.
    """
    drawn_N = dice.permutation(len(task.train)) < share * len(task.train)
    if drawn_N.all():
        raise UserError(f"{len(task.train)} examples of {task.name} are too few to put {share:g} of them aside")
    return drawn_N


def _refuse_what_does_not_fit(paths: Sequence[str], split: int | None, variants: Sequence[str]) -> None:
    if not paths:
        raise UserError("no image set is named", hint="tasks fashion-mnist")
    refuse_twice(paths, "each set once, or variants of one set")
    if split is not None and variants:
        raise UserError("split divides classes and variants keep them", hint="one of the two")
    if len(paths) > 1 and (split is not None or variants):
        what = "split" if split is not None else "variants"
        raise UserError(f"{what} is of one set, and {len(paths)} are named", hint=f"one set, or no {what}")


def _refuse_unlike(sets: Sequence[ImageSet]) -> None:
    for one, other in pairwise(sets):
        (h, w, c), (height, width, channels) = (s.train.images_NHWC.shape[1:] for s in (one, other))
        if (h, w) != (height, width):
            raise UserError(
                f"images of {one.name} are {h} x {w} and those of {other.name} {height} x {width}",
                hint=f"size {max(h, height)} {max(w, width)}",
            )
        if c != channels:
            raise UserError(f"images of {one.name} have {c} channels and those of {other.name} {channels}")


def _divided(images: ImageSet | TextSet, split: int, order: int | None) -> tuple[list[Task], tuple[str, ...]]:
    """The classes in groups; places in the sequence's classes are those in the order that was asked for."""
    import numpy as np

    count = len(images.classes)
    if not 1 <= split <= count:
        raise UserError(f"split {split} of {images.name}", allowed=f"1 to {count}, as it has {count} classes")
    order_C = np.arange(count) if order is None else _permutation(count, order)
    places_C = np.argsort(order_C)
    train, heldout = (part.relabelled(places_C) for part in (images.train, images.heldout))
    classes = tuple(images.classes[number] for number in order_C)
    tasks = []
    for group in np.array_split(np.arange(count), split):
        own = tuple(int(place) for place in group)
        parts = [part.chosen(np.isin(part.labels_N, group)) for part in (train, heldout)]
        tasks.append(Task(name=_listed([classes[p] for p in own]), classes=own, train=parts[0], heldout=parts[1]))
    return tasks, classes


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names) if len(names) <= 2 else f"{names[0]} to {names[-1]}"


def _joined(sets: Sequence[ImageSet] | Sequence[TextSet]) -> tuple[list[Task], tuple[str, ...]]:
    """A task for each set, whose classes are new ones: of images `digits/3` is not `mnist/3`."""
    import numpy as np

    tasks, classes = list[Task](), list[str]()
    for images in sets:
        places_C = len(classes) + np.arange(len(images.classes))
        alone = len(sets) == 1 or isinstance(images, TextSet)  # of texts no name is in two sets
        classes += [name if alone else f"{images.name}/{name}" for name in images.classes]
        train, heldout = (part.relabelled(places_C) for part in (images.train, images.heldout))
        own = tuple(int(place) for place in places_C)
        tasks.append(Task(name=images.name, classes=own, train=train, heldout=heldout))
    return tasks, tuple(classes)


def _varied(images: ImageSet, variants: Sequence[str]) -> tuple[list[Task], tuple[str, ...]]:
    """A task for each variant, with the same classes."""
    named = [f"domain={domain}" for domain in images.domains] if list(variants) == ["domains"] else list(variants)
    if list(variants) == ["domains"] and not named:
        raise UserError(f"{images.name} has no domains", hint=f"variants {PLAIN} invert")
    if len(set(named)) < len(named):
        raise UserError(f"variants {' '.join(named)}", allowed="each variant once")
    own = tuple(range(len(images.classes)))
    tasks = []
    for name in named:
        vary = _variant(name, images)
        tasks.append(Task(name=name, classes=own, train=vary(images.train), heldout=vary(images.heldout)))
    return tasks, images.classes


def _variant(name: str, images: ImageSet) -> Callable[[Labelled], Labelled]:
    """What a variant makes of examples.

    Raises:
        UserError: there is no such variant, or it needs a number or a domain that is not there.
    """
    import numpy as np

    kind, _, value = name.partition("=")
    match kind:
        case "plain" if not value:
            return lambda part: part
        case "invert" if not value:
            return lambda part: replace(part, images_NHWC=255 - part.images_NHWC)
        case "rotate":
            degrees = _number(name, value, float)
            return lambda part: replace(part, images_NHWC=_rotated(part.images_NHWC, degrees))
        case "permute":
            height, width = images.train.images_NHWC.shape[1:3]
            order_P = np.random.default_rng(_number(name, value, int)).permutation(height * width)
            return lambda part: replace(part, images_NHWC=_permuted(part.images_NHWC, order_P))
        case "domain":
            return _domain(value, images)
    allowed = "plain, invert, rotate=DEGREES, permute=SEED, domain=NAME, domains"
    raise UserError(f"there is no variant {name!r}", allowed=allowed, hint=did_you_mean(kind, _VARIANTS))


_VARIANTS = ("plain", "invert", "rotate", "permute", "domain", "domains")


def _number(name: str, value: str, kind: Callable[[str], Any]) -> Any:
    try:
        return kind(value)
    except ValueError:
        raise UserError(f"variant {name!r} needs a number", hint="rotate=30, permute=0") from None


def _domain(name: str, images: ImageSet) -> Callable[[Labelled], Labelled]:
    if name not in images.domains:
        raise UserError(
            f"{images.name} has no domain {name!r}",
            allowed=", ".join(images.domains) or "none: its images are of one kind",
            hint=did_you_mean(name, images.domains),
        )
    place = images.domains.index(name)

    def chosen(part: Labelled) -> Labelled:
        assert part.domains_N is not None
        return part.chosen(part.domains_N == place)

    return chosen


def _rotated(images_NHWC: NDArray[np.uint8], degrees: float) -> NDArray[np.uint8]:
    """Counterclockwise about the centre, bilinear, black where nothing was."""
    import numpy as np
    from scipy import ndimage

    return np.asarray(ndimage.rotate(images_NHWC, degrees, axes=(2, 1), reshape=False, order=1), np.uint8)


def _permuted(images_NHWC: NDArray[np.uint8], order_P: NDArray[np.int64]) -> NDArray[np.uint8]:
    """The pixels of every image in one order; the channels of a pixel stay together."""
    flat_NPC = images_NHWC.reshape(len(images_NHWC), -1, images_NHWC.shape[-1])
    return flat_NPC[:, order_P].reshape(images_NHWC.shape)


def _as_they_come(tasks: Sequence[Task], classes: tuple[str, ...]) -> tuple[list[Task], tuple[str, ...]]:
    """The same tasks with classes numbered in the order in which tasks bring them up."""
    import numpy as np

    order_C = np.array(list(dict.fromkeys(place for task in tasks for place in task.classes)))
    places_C = np.argsort(order_C)
    renumbered = [
        Task(
            name=task.name,
            classes=tuple(sorted(int(places_C[place]) for place in task.classes)),
            train=task.train.relabelled(places_C),
            heldout=task.heldout.relabelled(places_C),
        )
        for task in tasks
    ]
    return renumbered, tuple(classes[place] for place in order_C)


def _permutation(count: int, seed: int) -> NDArray[np.int64]:
    import numpy as np

    return np.random.default_rng(seed).permutation(count)


def _fingerprint(sets: Sequence[ImageSet] | Sequence[TextSet], tasks: Sequence[Task], classes: tuple[str, ...]) -> str:
    """Of the sets, whose own fingerprints hold every pixel, and of what was made of them."""
    return _hash([*(one.fingerprint for one in sets), classes, *((task.name, task.classes) for task in tasks)])


def _hash(told: Sequence[Any]) -> str:
    return hashlib.sha256(json.dumps(told).encode()).hexdigest()[:16]
