"""A library of increments beside a frozen language model: each task's with keys, found by what a text is like.

model/banks/000.safetensors   the first task's keys (G, P, C), and of each layer its A (P, R, O) and B (P, R, I)
model/encoder/                where texts are known by another model than the language model itself

A further task adds a file. For each text the entries with the likest keys are found, over all tasks, and what they add
goes to the attention's output projections (scalable language model, Peng et al., ICLR 2024).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from overhaul import banks, encoders
from overhaul.encoders import Encoder
from overhaul.errors import UserError
from overhaul.interop import hf
from overhaul.interop.attention import OUTPUTS
from overhaul.layers import swap
from overhaul.layers.joint import Choice, JointlyAdapted
from overhaul.retrieval import Found, find

METHOD = "slm"
CENTRE, KEYS = "centre_D", "keys_GPC"
FINDING = ("top_k", "unknown")
"""Settings of how entries are found, which a further task may have otherwise."""


class Library:
    """A frozen language model with entries beside it.

    Args:
        model: frozen; layers with room for increments are put into it, in place.
        rank: of an increment.
        entries: of each task.
        top_k: entries that are found for each text.
        groups: of a key.
        query_tokens: tokens of a text by which it is known, its first ones.
        unknown: similarity below which a text is left to the frozen model.
        encoder: what makes queries of texts.
        centre_D: what is taken off every query: the mean of texts in general, by which no two would differ.

    Raises:
        UserError: the model has no attention whose output projection is known, or groups do not divide its width.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        rank: int,
        entries: int,
        top_k: int,
        groups: int,
        query_tokens: int,
        unknown: float,
        encoder: Encoder,
        centre_D: Tensor,
    ) -> None:
        if encoder.width % groups:
            raise UserError(
                f"{groups} groups do not divide the {encoder.width} numbers of a query",
                allowed=", ".join(str(n) for n in range(1, 17) if encoder.width % n == 0),
            )
        self.fingerprint = banks.fingerprint(model)
        self.model, self.choice = model, Choice()
        self.encoder, self.centre_D = encoder, centre_D
        self.rank, self.entries, self.top_k, self.groups = rank, entries, top_k, groups
        self.query_tokens, self.unknown = query_tokens, unknown
        self.tasks: list[str] = []
        self.keys: list[Tensor] = []
        self.finding: list[dict[str, Any]] = []
        """How entries were found when each task was learnt; the last one's holds for a directory."""
        self.blocks: list[dict[str, Tensor]] = []
        names = outputs_of(model)
        self.layers = swap(model, names, lambda old: JointlyAdapted(old, self.choice, entries=entries, rank=rank))

    def settings(self) -> dict[str, Any]:
        """What two runs must have in common for one to take the other's entries."""
        names = ("rank", "entries", "groups", "query_tokens")
        return {"encoder": self.encoder.identity, **{name: getattr(self, name) for name in names}}

    def begin(self) -> None:
        """Room for the entries of a new task alone, which change nothing yet."""
        for layer in self.layers.values():
            weight = layer.linear.weight
            shape = self.entries, self.rank
            layer.down_PRI.data = torch.randn(*shape, layer.linear.in_features, device=weight.device)
            layer.up_PRO.data = torch.zeros(*shape, layer.linear.out_features, device=weight.device)

    def parameters(self) -> list[nn.Parameter]:
        """What is trained of a task, when its keys are there."""
        return [p for layer in self.layers.values() for p in (layer.up_PRO, layer.down_PRI)]

    def keep(self, task: str, keys_GPC: Tensor) -> None:
        """Adds what is in the layers as the entries of a task.

        Args:
            task: its name, which no other one has.
            keys_GPC: of its entries.
        """
        self.tasks.append(task)
        self.keys.append(keys_GPC.detach().clone())
        self.finding.append({name: getattr(self, name) for name in FINDING})
        self.blocks.append({
            f"{name}.{own}": getattr(layer, own).detach().clone()
            for name, layer in self.layers.items()
            for own in ("up_PRO", "down_PRI")
        })  # fmt: skip

    def use_all(self) -> None:
        """Puts the entries of all tasks into the layers, one task after the other."""
        for name, layer in self.layers.items():
            for own in ("up_PRO", "down_PRI"):
                getattr(layer, own).data = torch.cat([block[f"{name}.{own}"] for block in self.blocks])

    def block_of(self, task: int) -> slice:
        """The places of a task's entries among all."""
        return slice(task * self.entries, (task + 1) * self.entries)

    @torch.no_grad()
    def queries(self, ids: Sequence[Tensor]) -> Tensor:
        """`(B, D)`: what the encoder makes of the first tokens of each text, less the centre.

        Args:
            ids: tokens of each text, `(T,)`, at least one.
        """
        with self.frozen():
            queries_BD = self.encoder([one[: self.query_tokens] for one in ids])
        return queries_BD - self.centre_D.to(queries_BD.device)

    def found(self, queries_BD: Tensor, tasks: Sequence[int] | None = None) -> Found:
        """The entries for some texts.

        Args:
            queries_BD: of the texts.
            tasks: whose entries may be found; None for all.
        """
        keys_GPC = torch.cat(self.keys, dim=1).to(queries_BD.device)
        allowed_P = None
        if tasks is not None:
            allowed_P = torch.zeros(keys_GPC.shape[1], dtype=torch.bool, device=queries_BD.device)
            for task in tasks:
                allowed_P[self.block_of(task)] = True
        return find(queries_BD, keys_GPC, self.top_k, allowed_P, self.unknown)

    def tasks_of(self, found: Found) -> list[str]:
        """Of each text the task whose entry was the nearest."""
        nearest_B, is_known_B = found.entries_BK[:, 0] // self.entries, found.weights_BK.sum(dim=1) > 0
        pairs = zip(nearest_B.tolist(), is_known_B.tolist(), strict=True)
        return [self.tasks[place] if is_known else banks.FROZEN for place, is_known in pairs]

    @contextmanager
    def frozen(self) -> Iterator[None]:
        """Inside, the model is the frozen one."""
        before = self.choice.entries_BK, self.choice.weights_BK
        self.choice.nothing()
        try:
            yield
        finally:
            self.choice.entries_BK, self.choice.weights_BK = before

    def note(self) -> None:
        """Leaves all entries to be written beside the weights."""
        for place, task in enumerate(self.tasks):
            tensors = {CENTRE: self.centre_D, KEYS: self.keys[place], **self.blocks[place]}
            told = {"method": METHOD, "settings": self.settings(), "base": self.fingerprint, "task": task}
            told |= self.finding[place]
            banks.note_file(place, told, tensors)
        self.encoder.note()

    def read(self, directory: Path) -> None:
        """Takes over the entries of a directory, in the order in which tasks were learnt.

        Raises:
            UserError: a file is damaged, or of another model, method or settings.
        """
        own = {"method": METHOD, "settings": self.settings(), "base": self.fingerprint}
        device = next(self.model.parameters()).device
        for told, tensors in banks.read_files(directory, own):
            self.tasks.append(told["task"])
            self.keys.append(tensors.pop(KEYS).to(device))
            self.finding.append({name: told[name] for name in FINDING})
            self.centre_D = tensors.pop(CENTRE)
            self.blocks.append({name: tensor.to(device) for name, tensor in tensors.items()})

    def restore(self) -> nn.Module:
        """The frozen model as it was, without room for increments."""
        self.choice.nothing()
        swap(self.model, list(self.layers), lambda layer: layer.linear)
        return self.model


def outputs_of(model: nn.Module) -> list[str]:
    """The output projections of all attentions, by name.

    Raises:
        UserError: there are none that are known.
    """
    found = [
        name
        for name, module in model.named_modules()
        if type(module) is nn.Linear
        and name.rpartition(".")[2] in OUTPUTS
        and "attn" in name.rpartition(".")[0].lower()
    ]
    if not found:
        raise UserError(
            f"{type(model).__name__} has no attention whose output projection is known",
            allowed=f"linear layers called {', '.join(OUTPUTS)}",
        )
    return found


def is_there(directory: Path) -> bool:
    """Whether a directory has a library."""
    return bool(banks.files(directory)) and banks.first(directory)[0]["method"] == METHOD


def attached(model: nn.Module, directory: Path) -> nn.Module:
    """The model with the library of its directory, which answers each text by what it is like.

    A text is known by its first tokens when it is read; while it is written on, what was found for it stays.

    Args:
        model: as it lies in the directory.
        directory: with banks of `learn slm`.
    """
    told, tensors = banks.last(directory)
    settings: Mapping[str, Any] = told["settings"]
    how: dict[str, Any] = {
        **settings,
        **{name: told[name] for name in FINDING},
        "encoder": encoders.beside(directory, settings["encoder"], model),
    }
    library = Library(model, centre_D=tensors[CENTRE], **how)
    library.read(directory)
    library.use_all()
    inner: Any = hf.body(model)
    inner.register_forward_pre_hook(_choosing(library), with_kwargs=True)
    return model


def _choosing(library: Library) -> Callable[..., None]:
    busy: list[bool] = []

    def choose(_module: nn.Module, args: tuple[Any, ...], given: dict[str, Any]) -> None:
        ids_BT = given.get("input_ids", args[0] if args else None)
        cache = given.get("past_key_values")
        if busy or ids_BT is None or (cache is not None and cache.get_seq_length() > 0):
            return
        busy.append(True)
        try:
            mask_BT = given.get("attention_mask")
            rows = [row if mask_BT is None else row[mask_BT[number].bool()] for number, row in enumerate(ids_BT)]
            found = library.found(library.queries(rows))
        finally:
            busy.clear()
        library.choice.take(found.entries_BK, found.weights_BK)
        banks.note_answered(library.model, library.tasks_of(found))

    return choose
