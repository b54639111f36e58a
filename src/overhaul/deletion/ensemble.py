"""One model that answers as the mean of a shard's each: its adapters on top of weights that all of them share.

Letters of shapes: B texts or images, C classes, S shards, T tokens, D model width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from overhaul import banks
from overhaul.deletion.book import FOLDER, Book, Stage
from overhaul.deletion.sequences import Order
from overhaul.errors import UserError
from overhaul.interop import hf
from overhaul.layers import swap
from overhaul.layers.joint import Choice, JointHead, JointlyAdapted

_ROWS = ("input_ids", "attention_mask", "token_type_ids", "position_ids", "inputs_embeds", "pixel_values")
"""Arguments of a model that have a row for each text or image."""


class Ensemble:
    """Puts the adapters of shards beside a model's layers; each text is read once with each.

    A decoder's last states are averaged over shards, and so are its logits, which are linear in them. Of a classifier
    each shard has a head of its own, and the logits are averaged.

    Args:
        model: with a bare layer under each adapter; changed in place.
        layers: names of the layers that have adapters.
        shards: how many there are.
        rank: of the adapters.
        scale: by which each increment B A is multiplied.
        head: name of a classifier's head; empty for a decoder.

    Raises:
        UserError: the logits of a decoder are not linear in its states.
    """

    def __init__(
        self, model: nn.Module, layers: Sequence[str], *, shards: int, rank: int, scale: float, head: str = ""
    ) -> None:
        if not head and not hf.has_linear_head(model):
            raise UserError(
                f"the logits of {type(model).__name__} are more than a linear map of its states",
                allowed="models with a plain output embedding",
            )
        self.model, self.scale, self.choice = model, scale, Choice()
        self.layers = swap(model, layers, lambda old: JointlyAdapted(old, self.choice, entries=shards, rank=rank))
        heads = [head] if head else []
        self.heads = swap(model, heads, lambda old: JointHead(old, self.choice, entries=shards))
        self.serving: tuple[int, ...] = ()
        answers: Any = model if head else hf.body(model)
        self._hooks = (
            answers.register_forward_pre_hook(self._spread, with_kwargs=True),
            answers.register_forward_hook(self._join),
        )

    @classmethod
    def of(cls, model: nn.Module, settings: Mapping[str, Any]) -> Ensemble:
        """One for a book's settings; without adapters yet."""
        names = [name for group in settings["layers"] for name in group]
        how = {name: settings[name] for name in ("shards", "rank", "scale")}
        return cls(model, names, **how, head=settings.get("head", ""))

    def take(self, adapters: Mapping[int, Mapping[str, Tensor]]) -> None:
        """Answers with these from here on.

        Args:
            adapters: of each shard that has some, at least one: `LAYER.lora_A` (R, I) and `LAYER.lora_B` (O, R), of
                those layers that have some; of a classifier `HEAD.weight` (C, D) and `HEAD.bias` (C,) too.
        """
        for name, layer in self.layers.items():
            down_SRI, up_SRO = torch.zeros_like(layer.down_PRI), torch.zeros_like(layer.up_PRO)
            for shard, own in adapters.items():
                if f"{name}.lora_A" in own:
                    down_SRI[shard] = own[f"{name}.lora_A"]
                    up_SRO[shard] = own[f"{name}.lora_B"].t()
            layer.down_PRI = nn.Parameter(down_SRI, requires_grad=False)
            layer.up_PRO = nn.Parameter(up_SRO, requires_grad=False)
        for name, head in self.heads.items():
            for shard, own in adapters.items():
                for part, place in head.own.items():
                    place.data[shard] = own[f"{name}.{part}"]
        self.serving = tuple(adapters)

    def remove(self) -> None:
        """Leaves the model as it was."""
        for hook in self._hooks:
            hook.remove()
        swap(self.model, [*self.layers, *self.heads], lambda layer: layer.linear)

    def _spread(
        self, _module: nn.Module, args: tuple[Any, ...], given: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Every text once for each shard: the rows of one shard behind those of another."""
        shards = self.serving
        args = tuple(arg.repeat(len(shards), *[1] * (arg.dim() - 1)) if torch.is_tensor(arg) else arg for arg in args)
        given = {
            name: value.repeat(len(shards), *[1] * (value.dim() - 1))
            if name in _ROWS and torch.is_tensor(value)
            else value
            for name, value in given.items()
        }
        words: Any = next(value for value in (*args, *(given.get(name) for name in _ROWS)) if torch.is_tensor(value))
        device, count = words.device, len(words) // len(shards)
        entries_N1 = torch.tensor(shards, device=device).repeat_interleave(count)[:, None]
        self.choice.take(entries_N1, torch.full(entries_N1.shape, self.scale, device=device))
        return args, given

    def _join(self, _module: nn.Module, _args: tuple[Any, ...], made: Any) -> Any:
        name = "logits" if self.heads else "last_hidden_state"
        of_shards_NX = made[name]
        made[name] = of_shards_NX.view(len(self.serving), -1, *of_shards_NX.shape[1:]).mean(dim=0)
        return made


class Served:
    """A model that answers with the adapters of its directory, and takes up what is deleted there.

    Args:
        model: as it lies in the directory; changed in place.
        directory: that `forget s3t` wrote.

    Raises:
        UserError: nothing is left of any shard, the book or a file is damaged, or the weights are not those that the
            adapters were trained on.
    """

    def __init__(self, model: nn.Module, directory: Path) -> None:
        self.directory, self._entries = directory, -1
        with Book(directory) as book:
            settings = book.settings
        if banks.fingerprint(model) != settings["base"]:
            raise UserError(
                f"the adapters in {directory} were trained on other weights than those beside them",
                hint="the directory as it was written",
            )
        self.ensemble = Ensemble.of(model, settings)
        self.refresh()

    def refresh(self) -> None:
        """Takes up what was deleted since: from the next text on nothing of it is used.

        Raises:
            UserError: nothing is left.
        """
        with Book(self.directory) as book:
            number = len(book.entries())
            if number == self._entries:
                return
            left = book.survivors()
            serving = {shard: left.serving(shard) for shard in range(len(book.orders)) if left.serving(shard)}
            if not serving:
                raise UserError(
                    f"nothing is left of {self.directory}: every shard has lost its last stage to deletions",
                    allowed="the weights beside it as they are, with none of the data in them",
                    hint="overhaul forget s3t on what is left of the data",
                )
            there = {(stage.shard, stage.sequence): stage for stage in book.stages()}
            folder = self.directory / FOLDER
            self.ensemble.take({shard: _adapters(folder, there, shard, order) for shard, order in serving.items()})
        self._entries = number


def _adapters(folder: Path, there: Mapping[tuple[int, Order], Stage], shard: int, order: Order) -> dict[str, Tensor]:
    """The tensors of all stages of a beginning; of the head, which each stage has its own of, those of the last."""
    found: dict[str, Tensor] = {}
    for length in range(1, len(order) + 1):
        found |= load_file(folder / there[shard, order[:length]].file)
    return found


def is_there(directory: Path) -> bool:
    """Whether a directory has adapters of shards."""
    return (directory / FOLDER).is_dir()


def attach(model: nn.Module, directory: Path) -> None:
    """Lets a model answer with the adapters of its directory, as their mean; a directory without any has none.

    Args:
        model: as it lies there; changed in place.
        directory: the model's.
    """
    if is_there(directory):
        Served(model, directory)
