"""Banks: a frozen model, and for each task a small set of tensors that makes it a model of that task.

model/                    the frozen model, which plain transformers loads
model/banks/000.safetensors   the first task's tensors, with its name, its classes and what they fit

A bank is written once and never again: learning one more task adds a file. It says of which model it is, and no other
one takes it.
"""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from overhaul import journal
from overhaul.errors import UserError, did_you_mean
from overhaul.interop.classifier import INPUTS, classes_of, head_of, name_classes
from overhaul.kinds import is_classifier

FOLDER = "banks"
"""Where they lie, beside the weights."""
_KEY = "overhaul"
"""Under which a bank's file has what is not a tensor."""
_TOLD = ("method", "settings", "base", "task", "classes", "parent")
"""What is told of every bank."""


@dataclass(frozen=True, slots=True, eq=False)
class Bank:
    """What is of one task.

    Attributes:
        name: of the task.
        classes: names of its classes, in the order of its head's rows; none of a language model, which keeps its own.
        tensors: by the dotted names that they have in the model with its sockets.
        parent: the task whose bank it began as; None for the frozen model.
        beside: what else its file says of it: plain data.
    """

    name: str
    classes: tuple[str, ...]
    tensors: Mapping[str, Tensor]
    parent: str | None = None
    beside: Mapping[str, Any] = field(default_factory=dict)

    @property
    def num_values(self) -> int:
        """Numbers that it holds, the integers that count batches left out."""
        return sum(tensor.numel() for tensor in self.tensors.values() if tensor.is_floating_point())

    @property
    def nbytes(self) -> int:
        """Bytes of its tensors."""
        return sum(tensor.nbytes for tensor in self.tensors.values())


class Sockets(ABC):
    """The places in a frozen model that the tensors of a bank go to. A method says which they are."""

    method: str
    """The method's name, which a bank remembers."""

    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """What two runs must have in common for one to take the other's banks: plain data."""

    @abstractmethod
    def fit(self, model: nn.Module) -> None:
        """Puts the sockets in, in place; until a bank is made the model computes what it did.

        Raises:
            UserError: the model has no place for them.
        """

    @abstractmethod
    def remove(self, model: nn.Module) -> None:
        """Takes them out again, in place."""

    @abstractmethod
    def names(self, model: nn.Module) -> tuple[str, ...]:
        """Of the parameters and buffers that are a task's own, but for those of the head; in a fixed order."""

    @abstractmethod
    def begin(self, model: nn.Module) -> dict[str, Tensor]:
        """New tensors that a task begins with, by name; those that are left out begin as they are in the model."""

    def merge(self, model: nn.Module) -> None:
        """Puts the bank in use into the weights, in place, so that no sockets are needed.

        Raises:
            UserError: this method's banks have no such form.
        """
        raise UserError(
            f"banks of {self.method} cannot be put into the weights of the model", hint="the model as it is"
        )


class Banked:
    """A frozen model with banks, one of which is in use at a time; changing to another one copies nothing.

    Args:
        model: a classifier, or a language model, whose banks have no head; sockets are put into it, in place.
        sockets: where banks go.

    Raises:
        UserError: the model has no place for them.
    """

    def __init__(self, model: nn.Module, sockets: Sockets) -> None:
        self.model, self.sockets = model, sockets
        self.banks: list[Bank] = []
        self.freeze()

    def freeze(self) -> None:
        """Takes the model, which has no sockets, for the frozen one as it is now, and puts them in.

        Raises:
            UserError: the model has no place for them.
        """
        model, sockets = self.model, self.sockets
        self.fingerprint = fingerprint(model)
        self._head = head_of(model)[0] if is_classifier(model) else None
        sockets.fit(model)
        head = [] if self._head is None else model.get_submodule(self._head).named_parameters(self._head)
        self._places = {name: _tensor(model, name) for name in (*sockets.names(model), *(name for name, _ in head))}
        self._base, self._parent = self._taken(""), None

    def parameters(self) -> list[nn.Parameter]:
        """What is trained of a task."""
        return [place for place in self._places.values() if isinstance(place, nn.Parameter)]

    def begin(self, classes: Sequence[str] = (), parent: int | None = None) -> None:
        """Makes the model ready for a new task, with new tensors in the sockets and, of a classifier, a new head.

        Args:
            classes: of the task; a language model has none.
            parent: the place of the bank that it begins as; None for the frozen model.
        """
        source = self._base if parent is None else self.banks[parent]
        self._put(source)
        head = {} if self._head is None else self._new_head(self._head, len(classes))
        tensors = {name: tensor.clone() for name, tensor in source.tensors.items()}
        self._put(Bank("", tuple(classes), tensors | self.sockets.begin(self.model) | head))
        self._parent = None if parent is None else source.name

    def _new_head(self, where: str, rows: int) -> dict[str, Tensor]:
        old: Any = self.model.get_submodule(where)
        made = nn.Linear(old.in_features, rows, bias=old.bias is not None).to(old.weight)
        return {f"{where}.{name}": tensor.data for name, tensor in made.named_parameters()}

    def keep(self, name: str, beside: Mapping[str, Any] | None = None) -> Bank:
        """Adds what is in the sockets as the bank of a task.

        Args:
            name: of the task; no other bank has it.
            beside: what else is to be known of it, as plain data.
        """
        self.banks.append(bank := replace(self._taken(name), parent=self._parent, beside=dict(beside or {})))
        return bank

    def use(self, place: int) -> None:
        """Makes the model that of a task, counted from 0 in the order in which they were learnt."""
        self._put(self.banks[place])

    def find(self, name: str) -> int:
        """The place of a task's bank.

        Raises:
            UserError: there is no such task.
        """
        names = [bank.name for bank in self.banks]
        if name not in names:
            allowed = ", ".join(names) or "none: nothing was learnt"
            raise UserError(f"there is no task {name!r}", allowed=allowed, hint=did_you_mean(name, names))
        return names.index(name)

    @torch.no_grad()
    def logits(self, batch: Mapping[str, Tensor], tasks_B: Tensor) -> list[Tensor]:
        """What each example's own task says of it; a batch may hold examples of several.

        Args:
            batch: `{"pixel_values": (B, ...)}` and the like.
            tasks_B: `(B,)` places of the banks.

        Returns:
            For each example `(C,)` logits of its task's classes.
        """
        found: dict[int, Tensor] = {}
        called: Any = self.model.eval()
        for task in tasks_B.unique().tolist():
            rows = torch.where(tasks_B == task)[0]
            self.use(task)
            logits = called(**{name: batch[name][rows] for name in INPUTS if name in batch}).logits
            found |= dict(zip(rows.tolist(), logits, strict=True))
        return [found[row] for row in range(len(tasks_B))]

    def restore(self) -> nn.Module:
        """The frozen model as it was, without sockets."""
        self._put(self._base)
        self.sockets.remove(self.model)
        return self.model

    def _put(self, bank: Bank) -> None:
        for name, place in self._places.items():
            place.data = bank.tensors[name]
        if self._head is None:
            return
        head: Any = self.model.get_submodule(self._head)
        head.out_features = len(bank.classes)
        name_classes(self.model, bank.classes)

    def _taken(self, name: str) -> Bank:
        classes = () if self._head is None else classes_of(self.model)
        return Bank(name, classes, {at: place.detach().clone() for at, place in self._places.items()})

    def merge(self) -> nn.Module:
        """The model of the task in use as a plain one: the bank goes into the weights, in place, and is no longer one.

        Raises:
            UserError: banks of this method have no such form.
        """
        self.sockets.merge(self.model)
        return self.model

    def note(self) -> None:
        """Leaves all banks to be written beside the weights."""
        for place, bank in enumerate(self.banks):
            told = {
                "method": self.sockets.method, "settings": self.sockets.settings(), "base": self.fingerprint,
                "task": bank.name, "classes": bank.classes, "parent": bank.parent, **bank.beside,
            }  # fmt: skip
            note_file(place, told, bank.tensors)

    def read(self, directory: Path) -> None:
        """Takes over the banks of a directory, in the order in which they were learnt; those of none are none.

        Raises:
            UserError: a file is damaged, or its bank is of another model, another method or other settings.
        """
        own = {"base": self.fingerprint, "method": self.sockets.method, "settings": self.sockets.settings()}
        for told, tensors in read_files(directory, own):
            if missing := [name for name in self._places if name not in tensors]:
                raise UserError(
                    f"the bank of {told['task']} in {directory} lacks the tensor {missing[0]}",
                    hint="a sound copy of the directory",
                )
            device = next(self.model.parameters()).device
            tensors = {name: tensor.to(device) for name, tensor in tensors.items()}
            beside = {name: value for name, value in told.items() if name not in _TOLD}
            self.banks.append(Bank(told["task"], tuple(told["classes"]), tensors, told.get("parent"), beside))

    def settle(self) -> None:
        """Gives all banks the precision that the model has in memory: to be used, and not to be written again."""
        for number, bank in enumerate(self.banks):
            tensors = {name: tensor.to(self._base.tensors[name].dtype) for name, tensor in bank.tensors.items()}
            self.banks[number] = replace(bank, tensors=tensors)


def note_file(place: int, told: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Leaves the bank of one task to be written beside the weights.

    Args:
        place: of the task in the order in which they are learnt, from 0.
        told: what is not a tensor; `base`, `method`, `settings` and `task` are among it.
        tensors: of the task.
    """
    # One entry: several would be written in an order that changes from run to run.
    metadata = {_KEY: json.dumps(told, sort_keys=True)}
    kept = {name: tensor.contiguous() for name, tensor in tensors.items()}
    journal.note_tensors(f"{FOLDER}/{place:03d}.safetensors", kept, metadata)


def refuse_known(tasks: Iterable[str], known: Container[str]) -> None:
    """`UserError` where one of some tasks is among those of which there are banks."""
    if name := next((name for name in tasks if name in known), None):
        raise UserError(f"there is a bank of a task named {name} already", allowed="tasks with other names")


def read_files(directory: Path, own: Mapping[str, Any]) -> Iterator[tuple[dict[str, Any], dict[str, Tensor]]]:
    """What is told of each bank of a directory, and its tensors, the first task's first.

    Args:
        directory: one without banks has none.
        own: the `base`, `method` and `settings` that they must have.

    Raises:
        UserError: a file is damaged, or its bank is of another model, another method or other settings.
    """
    for path in files(directory):
        told, tensors = _read(path)
        _refuse_others(path, told, json.loads(json.dumps(own)))
        yield told, tensors


def first(directory: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What is told of a directory's first bank, and its tensors.

    Raises:
        UserError: there are none, or it is damaged.
    """
    return _read(_some(directory)[0])


def last(directory: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What is told of the bank of the task that was learnt last, and its tensors; raises as `first`."""
    return _read(_some(directory)[-1])


def _some(directory: Path) -> list[Path]:
    if not (there := files(directory)):
        raise UserError(f"{directory} has no banks", allowed="a directory that learn wrote, with banks of tasks")
    return there


def files(directory: Path) -> list[Path]:
    """The files of a directory's banks, the first task's first."""
    return sorted((directory / FOLDER).glob("*.safetensors"))


def made_with(directory: Path) -> tuple[str, dict[str, Any]]:
    """The method of a directory's banks, and what its settings must be for it to read them.

    Raises:
        UserError: there are none, or the first one is damaged.
    """
    told, _ = first(directory)
    return told["method"], told["settings"]


def tasks_of(directory: Path) -> list[str]:
    """The tasks of which a directory has banks.

    Raises:
        UserError: a file is damaged.
    """
    return [_read(path)[0]["task"] for path in files(directory)]


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    try:
        with safe_open(path, framework="pt") as stored:
            told = json.loads((stored.metadata() or {})[_KEY])
            return told, {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118 - not a dict
    except (SafetensorError, OSError, KeyError, json.JSONDecodeError) as error:
        raise UserError(f"{path} is damaged or no bank: {error}", hint="a sound copy of the directory") from error


def _refuse_others(path: Path, told: Mapping[str, Any], own: Mapping[str, Any]) -> None:
    if told["method"] != own["method"]:
        raise UserError(f"{path} is a bank of {told['method']}", allowed=f"banks of {own['method']}")
    for name, value in own["settings"].items():
        if told["settings"].get(name) != value:
            raise UserError(
                f"{path} was learnt with {name} {told['settings'].get(name)}, and this is {value}",
                hint="the same settings for all tasks of a directory",
            )
    if told["base"] != own["base"]:
        raise UserError(
            f"{path} is a bank of another model: the weights beside it are not those that it was learnt on",
            hint="the directory as it was written; a bank fits no other weights",
        )


FROZEN = "no task"
"""Instead of a task's name: the frozen model answered."""


def note_answered(model: nn.Module, tasks: Sequence[str]) -> None:
    """Leaves with a model which task each row of the last batch was taken for; `FROZEN` stands for none."""
    inner: Any = model
    inner.answered_by = tuple(tasks)


def answered_by(model: nn.Module) -> tuple[str, ...]:
    """Which task each text that a model read last was taken for; none where nothing beside it answers."""
    return getattr(model, "answered_by", ())


def fingerprint(model: nn.Module) -> str:
    """Hash of a model's tensors, names and values as they lie on disk, in whatever precision they are in memory."""
    inner: Any = model
    stored, digest = inner.config.dtype, hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        kept = tensor.detach().cpu()
        kept = kept.to(stored) if kept.is_floating_point() and stored is not None else kept
        digest.update(f"{name} {tuple(kept.shape)}\n".encode())
        digest.update(kept.contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def _tensor(model: nn.Module, name: str) -> Tensor:
    """A parameter or a buffer by its dotted name."""
    where, _, own = name.rpartition(".")
    return getattr(model.get_submodule(where), own)
