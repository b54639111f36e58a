"""Banks beside a frozen language model that are put to use by what a text is like: nobody says of which task it is.

Letters of shapes: B texts, T tokens, V words, N prompts.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from functools import wraps
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from overhaul import banks, library
from overhaul.banks import Banked, Sockets
from overhaul.errors import UserError
from overhaul.identify import Telling, doubt_of_text, kept
from overhaul.interop import hf
from overhaul.kinds import is_classifier
from overhaul.sockets.channels import Channels
from overhaul.sockets.reprogramming import Reprogramming
from overhaul.sockets.reweighting import Reweighting

TELLING = "telling"
"""Under which the bank of a text has how texts are told."""


def sockets_of(model: nn.Module, directory: Path) -> Sockets:
    """Where the banks of a directory go, by what the first one says of itself.

    Args:
        model: the frozen one.
        directory: with banks of `learn clr` or `learn contracon`.

    Raises:
        UserError: there are none, or they are of another method.
    """
    method, settings = banks.made_with(directory)
    kinds = {"clr": Reprogramming if is_classifier(model) else Channels, "contracon": Reweighting}
    if method not in kinds:
        raise UserError(
            f"{directory} has banks of {method}, which are used together", allowed=f"banks of {' or '.join(kinds)}"
        )
    return kinds[method](**settings)


def read(model: nn.Module, directory: Path) -> Banked:
    """A model with the banks of its directory, in the precision that it has in memory.

    Raises:
        UserError: there are none, they are of another method, or they cannot be read.
    """
    banked = Banked(model, sockets_of(model, directory))
    banked.read(directory)
    banked.settle()
    return banked


@torch.no_grad()
def doubts(model: nn.Module, texts: Sequence[Tensor], how: Telling) -> Tensor:
    """`(N,)`: how much a model doubts each text, on the CPU.

    Args:
        model: a causal language model, with the bank of a task in use, in evaluation mode.
        texts: `(T,)` tokens of each, at least one.
        how: what is looked at.
    """
    device, found = next(model.parameters()).device, []
    for text in texts:
        ids_T = text[: how.tokens].to(device)
        places = [kept(len(ids_T), how.left_out, view).to(device) for view in range(how.views)]
        # Readings are filled up on the right, where a causal model does not look.
        ids_BT = pad_sequence([ids_T, *(ids_T[at] for at in places)], batch_first=True)
        logits_BTV = hf.logits(model, {"input_ids": ids_BT}).float()
        views = [(at, row_TV[: len(at)]) for at, row_TV in zip(places, logits_BTV[1:], strict=True)]
        found.append(doubt_of_text(logits_BTV[0], views, ids_T, how))
    return torch.tensor(found, dtype=torch.float64)


def attach(model: nn.Module, directory: Path) -> None:
    """Lets a language model answer with what its directory has beside it: a library, banks, or nothing.

    Args:
        model: as it lies in the directory; changed in place.
        directory: any.

    Raises:
        UserError: what lies there cannot be read, or is of another model.
    """
    if library.is_there(directory):
        library.attached(model, directory)
    elif banks.files(directory):
        Answering(read(model, directory)).attach()


class Answering:
    """Reads each text with the bank that doubts it least; while a text is written on, the bank stays.

    Args:
        banked: a language model and its banks, at least one. The last bank says how texts are told.
    """

    def __init__(self, banked: Banked) -> None:
        self.banked = banked
        self.how = Telling(**banked.banks[-1].beside.get(TELLING, {}))
        self.stays = False
        """Whether the bank in use reads whatever comes."""

    def tasks(self, texts: Sequence[Tensor]) -> Tensor:
        """`(B,)`: of each text the place of its bank."""
        stayed, self.stays = self.stays, True
        try:
            found = []
            for place in range(len(self.banked.banks)):
                self.banked.use(place)
                found.append(doubts(self.banked.model, texts, self.how))
        finally:
            self.stays = stayed
        tasks_B = torch.stack(found).argmin(dim=0)
        banks.note_answered(self.banked.model, [self.banked.banks[place].name for place in tasks_B.tolist()])
        return tasks_B

    def attach(self) -> None:
        """Changes what the model does when it is called, and when it generates."""
        model: Any = self.banked.model
        body: Any = hf.body(model)
        body.forward = self._by_task(body.forward)
        model.generate = self._written(model.generate)

    def _by_task(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        names = list(inspect.signature(forward).parameters)

        @wraps(forward)
        def read(*args: Any, **given: Any) -> Any:
            given |= dict(zip(names, args, strict=False))
            ids_BT, cache = given.get("input_ids"), given.get("past_key_values")
            goes_on = cache is not None and cache.get_seq_length() > 0
            if self.stays or ids_BT is None or goes_on:
                return forward(**given)
            tasks_B = self.tasks(_rows(ids_BT, given.get("attention_mask")))
            if len(tasks_B.unique()) > 1 and cache is not None:
                raise UserError(
                    "texts of several tasks cannot share a cache", hint="model.generate, or one text at a time"
                )
            parts = {}
            for task in tasks_B.unique().tolist():
                self.banked.use(task)
                rows_B = (tasks_B == task).to(ids_BT.device)
                parts[task] = forward(**(given if bool(rows_B.all()) else _only(given, rows_B)))
            return next(iter(parts.values())) if len(parts) == 1 else _joined(parts, tasks_B)

        return read

    def _written(self, generate: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(generate)
        def write(inputs: Tensor | None = None, *args: Any, **given: Any) -> Any:
            ids_BT = given.pop("input_ids", inputs)
            if self.stays or ids_BT is None:
                return generate(ids_BT, *args, **given)
            tasks_B = self.tasks(_rows(ids_BT, given.get("attention_mask")))
            self.stays, parts = True, {}
            try:
                for task in tasks_B.unique().tolist():
                    self.banked.use(task)
                    rows_B = (tasks_B == task).to(ids_BT.device)
                    own = given if bool(rows_B.all()) else _only(given, rows_B)
                    parts[task] = generate(ids_BT[rows_B], *args, **own)
            finally:
                self.stays = False
            return next(iter(parts.values())) if len(parts) == 1 else _side_by_side(parts, tasks_B, self._filler(given))

        return write

    def _filler(self, given: dict[str, Any]) -> int:
        """The token that follows the end of a text that is shorter than others."""
        model: Any = self.banked.model
        padding = given.get("pad_token_id", model.generation_config.pad_token_id)
        return 0 if padding is None else padding


def _rows(ids_BT: Tensor, mask_BT: Tensor | None) -> list[Tensor]:
    """The tokens of each text, without what it was filled up with."""
    return [row if mask_BT is None else row[mask_BT[number].bool()] for number, row in enumerate(ids_BT)]


def _only(given: dict[str, Any], rows_B: Tensor) -> dict[str, Any]:
    """The arguments of a call for some rows of its batch."""

    def has_rows(value: Any) -> bool:
        return isinstance(value, Tensor) and value.ndim > 1 and len(value) == len(rows_B)

    return {name: value[rows_B] if has_rows(value) else value for name, value in given.items()}


def _joined(parts: dict[int, Any], tasks_B: Tensor) -> Any:
    """What a model says of a batch, from what it says of each task's texts."""

    def whole(tensors: Sequence[Tensor]) -> Tensor:
        made = tensors[0].new_empty((len(tasks_B), *tensors[0].shape[1:]))
        for task, tensor in zip(parts, tensors, strict=True):
            made[(tasks_B == task).to(made.device)] = tensor
        return made

    first = next(iter(parts.values()))
    found: dict[str, Any] = {}
    for name, value in first.items():
        if isinstance(value, Tensor):
            found[name] = whole([part[name] for part in parts.values()])
        elif isinstance(value, tuple) and all(isinstance(one, Tensor) for one in value):
            found[name] = tuple(map(whole, zip(*(part[name] for part in parts.values()), strict=True)))
    return type(first)(**found)


def _side_by_side(parts: dict[int, Tensor], tasks_B: Tensor, filler: int) -> Tensor:
    """`(B, T)`: what was written to each text, filled up on the right."""
    if not all(isinstance(part, Tensor) for part in parts.values()):
        raise UserError("of texts of several tasks tokens alone are given back", hint="one text at a time")
    longest = max(part.shape[1] for part in parts.values())
    made_BT = next(iter(parts.values())).new_full((len(tasks_B), longest), filler)
    for task, part_BT in parts.items():
        rows = (tasks_B == task).nonzero()[:, 0]
        for row, text_T in zip(rows.tolist(), part_BT, strict=True):
            made_BT[row, : len(text_T)] = text_T
    return made_BT
