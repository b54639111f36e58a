"""Adapters trained stage by stage, from the top of a model downwards, each on more slices (S3T, ICLR 2025).

A stage trains the adapters of one group of blocks, on all slices that its sequence has so far. Those above it are there
and frozen, those below are not there yet. A classifier's head is trained in every stage, from where the one before it
left it, and each stage keeps a copy of its own. Whatever a stage depends on is of these slices: its tensors are the
same, bit for bit, whether or not other data exists.
"""

from __future__ import annotations

import copy
import hashlib
import itertools
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from overhaul import machine
from overhaul.deletion.sequences import Order, prefixes
from overhaul.errors import UserError
from overhaul.interop.classifier import draw_head
from overhaul.kinds import Kind, kind_of_model
from overhaul.layers import swap
from overhaul.layers.lora import LoRALinear, start_at_zero
from overhaul.optim.build import build
from overhaul.schedules import schedule
from overhaul.select import select_linears
from overhaul.stream import Batch, Map, Repeat, Rows, Shuffle
from overhaul.train import Plan
from overhaul.unlearning.answering import Answering, ByClass, ByWord, Content
from overhaul.unlearning.below import Below, Window, blocks_of
from overhaul.unlearning.by_image import ByImage
from overhaul.unlearning.slices import Member, divided

if TYPE_CHECKING:
    from overhaul.data import Data
    from overhaul.forget.s3t import S3T
    from overhaul.picture_data import PictureData

ANSWERING: dict[Kind, type[Answering]] = {Kind.TEXT_CLASSIFIER: ByClass, Kind.IMAGE_CLASSIFIER: ByImage}
"""What kinds of model answer with; others answer with words."""


def groups_of(num_blocks: int, num_stages: int, *, uneven: bool = False) -> tuple[range, ...]:
    """The blocks whose adapters each stage trains, the first stage's at the top.

    Args:
        num_blocks: of the model.
        num_stages: L.
        uneven: whether the first stages may have one block more than the last.

    Raises:
        UserError: there are fewer blocks than stages, or they do not divide.
    """
    each, over = divmod(num_blocks, num_stages)
    if not each:
        raise UserError(f"{num_stages} slices for {num_blocks} blocks", allowed=f"1 to {num_blocks} slices")
    if over and not uneven:
        even = ", ".join(str(n) for n in range(1, num_blocks + 1) if num_blocks % n == 0)
        raise UserError(
            f"{num_blocks} blocks in {num_stages} stages of {each} leave {over} over",
            allowed=f"slices that divide them: {even}",
            hint="--uneven, which gives the first stages one block more",
        )
    found, end = [], num_blocks
    for stage in range(num_stages):
        begin = end - each - (stage < over)
        found.append(range(begin, end))
        end = begin
    return tuple(found)


class Stagewise:
    """Trains every beginning of every sequence of every shard, once.

    Args:
        method: how.
        model: adapters are put over its layers, in place.
        data: all of whose rows are trained on.

    Raises:
        UserError: blocks or examples do not divide, or a target fits no layer.
    """

    def __init__(self, method: S3T, model: nn.Module, data: Data | PictureData) -> None:
        self.method, self.model, self.data = method, model, data
        blocks = blocks_of(model)
        answering = ANSWERING.get(kind_of_model(model), ByWord)
        self.answering: Answering = answering(model, data, method.seq_len)
        together = method.together or self.answering.together
        self.members = divided(data.corpus.train, method.shards, method.slices, seed=data.seed, together=together)
        self.orders = (method.orders(),) * method.shards
        self.groups = groups_of(len(blocks), method.slices, uneven=method.uneven)
        names = select_linears(model, method.targets)
        own = [tuple(f"{block}." for number, block in enumerate(blocks) if number in group) for group in self.groups]
        self.names = [[name for name in names if name.startswith(blocks)] for blocks in own]
        model.requires_grad_(False)
        self.bare = {name: model.get_submodule(name) for name in names}
        self.layers = swap(model, names, lambda old: LoRALinear.from_linear(old, method.rank, method.scaled()))
        heads = [self.answering.head] if self.answering.head else []
        self.bare |= {name: model.get_submodule(name) for name in heads}
        self.heads: dict[str, nn.Linear] = swap(model, heads, lambda old: copy.deepcopy(old).float())
        self.kept: dict[tuple[int, Order], dict[str, Tensor]] = {}
        count = itertools.count()
        self.windows = {cell: list(self._windows(members, count)) for cell, members in self.members.items()}
        self.below = Below(model, data.dtype, self.answering.alone)
        if method.cache:
            of_shards = [
                [window for place in range(method.slices) for window in self.windows[shard, place]]
                for shard in range(method.shards)
            ]
            places = [group.start for group in self.groups if group.start]
            self.below.try_out(places, max(of_shards, key=len), gigabytes=method.cache_gb)

    def all(self) -> Iterator[tuple[int, Order]]:
        """What is trained: shards with beginnings of their sequences, each behind those that it goes on from."""
        for shard, orders in enumerate(self.orders):
            self.below.forget()
            for order in prefixes(orders):
                yield shard, order

    def _windows(self, members: Sequence[Member], count: Iterator[int]) -> Iterator[Window]:
        """The examples of a slice, each in windows of its own: none is read after another."""
        read = self.answering.contents([member.row for member in members])
        for member, contents in zip(members, read, strict=True):
            for content in contents:
                yield from [Window(content, next(count))] * member.copies

    def plan(self, shard: int, order: Order) -> Plan:
        """How the stage of a beginning is trained, on top of those that it begins with."""
        method, stage = self.method, len(order) - 1
        torch.manual_seed(seed := self._seed(shard, order))  # what a model drops is the stage's own too
        trained = self._put(shard, order, torch.Generator().manual_seed(seed))
        windows = [window for place in order for window in self.windows[shard, place]]
        if not windows:
            raise UserError(
                f"no example of shard {shard} and slices {', '.join(map(str, order))} has two tokens to learn from",
                allowed="longer examples",
            )
        told = " ".join(map(str, (shard, *order)))
        rows = Rows(windows, name=f"shard and slices {told}", fingerprint=hashlib.sha256(told.encode()).hexdigest())
        first = self.groups[stage].start
        shuffled = Map(Repeat(Shuffle(rows, seed=seed)), lambda window: self._seen(window, first), name="")
        a_step = method.batch_size * method.accumulate
        self.below.cut(first)
        return Plan(
            model=self.model,
            objective=self.answering.loss(),
            stream=Batch(shuffled, batch_size=method.batch_size),
            optimizer=build(method, trained, model=self.model),
            schedule=schedule(method.schedule, method.warmup),
            finish=self.below.whole,
            steps=method.steps if method.epochs is None else max(1, round(method.epochs * len(windows) / a_step)),
            unit=self.answering.unit,
        )

    def _seen(self, window: Window, first: int) -> Content:
        """A window as a batch takes it, for a model that is run from the first block that is trained."""
        return self.answering.filled(self.below.with_states(window, first))

    def _put(self, shard: int, order: Order, dice: torch.Generator) -> list[nn.Parameter]:
        """Puts the adapters of a beginning into the layers, the last ones new; returns what is trained.

        A head goes on from the stage before; that of a first stage is new.
        """
        stage = len(order) - 1
        for number, names in enumerate(self.names):
            for name in names:
                layer: Any = self.layers[name]
                layer.enabled = number <= stage
                layer.lora_A.requires_grad_(False)
                layer.lora_B.requires_grad_(False)
        for length in range(1, len(order)):
            own = self._own(length - 1)
            for name, tensor in self.kept[shard, order[:length]].items():
                own[name].data = tensor.clone()
        for name in self.names[stage]:
            layer = self.layers[name]
            A_RI, B_OR = start_at_zero(layer, layer.rank, dice)
            layer.lora_A.data, layer.lora_B.data = A_RI.to(layer.weight.device), B_OR.to(layer.weight.device)
        for head in self.heads.values() if stage == 0 else ():
            draw_head(head, dice)
        trained = list(self._own(stage).values())
        for place in trained:
            place.requires_grad_(True)
        return trained

    def _own(self, stage: int) -> dict[str, nn.Parameter]:
        """What a stage trains, by the names under which it is kept."""
        layers: dict[str, Any] = {name: self.layers[name] for name in self.names[stage]}
        adapters = {
            f"{name}.{own}": getattr(layer, own) for name, layer in layers.items() for own in ("lora_A", "lora_B")
        }
        heads = {f"{name}.{own}": place for name, head in self.heads.items() for own, place in head.named_parameters()}
        return adapters | heads

    def _seed(self, shard: int, order: Order) -> int:
        """Of everything that is drawn in a stage: by the run's seed and the stage, not by what came before it."""
        return machine.derived_seed(self.data.seed, shard, order)

    def keep(self, shard: int, order: Order) -> None:
        """Takes the adapters that were just trained, with the head."""
        own = self._own(len(order) - 1)
        self.kept[shard, order] = {name: place.detach().clone() for name, place in own.items()}

    def restore(self) -> None:
        """The model as it was, without adapters and with its own head; a pruned one with what it knows of its zeros."""
        for name, layer in self.bare.items():
            self.model.set_submodule(name, layer)
