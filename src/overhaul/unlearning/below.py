"""What flows into the blocks that are trained: below them is the bare model, so it is computed once for all stages.

Letters of shapes: T tokens of a window, D model width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from overhaul import machine
from overhaul.errors import UserError
from overhaul.input_statistics import StopForward
from overhaul.interop import hf
from overhaul.interop.classifier import PENULTIMATE, classified
from overhaul.interop.fused import fused
from overhaul.kinds import Kind, is_classifier, kind_of_model
from overhaul.layers import adapters_off
from overhaul.progress import say
from overhaul.walk import decoder_blocks

SAME = 1e-3
"""How far apart, over their norm, the last states may be with and without the blocks below: rounding is less."""


@dataclass(frozen=True, slots=True, eq=False)
class Window:
    """Part of one example, alone.

    Attributes:
        content: `{"input_ids": (T,), "labels": (T,)}` int64; of a text with a class `attention_mask` too, one label;
            of an image with a class what `alone` makes the model's input of.
        number: among all windows of the data.
    """

    content: Mapping[str, Tensor]
    number: int


class Below:
    """The states between the blocks of the bare model, `(T, D)` for each window.

    Each window is run alone, so that its states depend on no other one.

    Args:
        model: its adapters are left out.
        dtype: of matrix products.
        alone: a window's content -> what the model reads of it.
    """

    def __init__(
        self,
        model: nn.Module,
        dtype: torch.dtype,
        alone: Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]] = lambda content: content,
    ) -> None:
        self.model, self.dtype, self.alone = model, dtype, alone
        self._of_images = kind_of_model(model) is Kind.IMAGE_CLASSIFIER
        self._fed: _Fed | None = None
        blocks = list(blocks_of(model).items())
        self._list = blocks[0][0].rpartition(".")[0]
        self._blocks = [block for _, block in blocks]
        self.places: tuple[int, ...] = ()
        self._states: dict[int, dict[int, Tensor]] = {}

    def try_out(self, places: Sequence[int], windows: Sequence[Window], *, gigabytes: float) -> None:
        """Decides from which blocks on the model is run alone: nowhere, where it cannot be.

        The model is tried on the first window.

        Args:
            places: numbers of blocks, counted from 0.
            windows: whose states are needed at one time.
            gigabytes: that their states may take.

        Raises:
            UserError: they take more.
        """
        if not places or not windows:
            return
        self.places = tuple(sorted(places))
        states = self._run(windows[0])
        per_token = sum(states_TD[0].nbytes for states_TD in states.values())
        patches = states[self.places[0]]  # of which all images have as many
        different = {window.number: len(window.content.get("input_ids", patches)) for window in windows}
        size = per_token * sum(different.values())
        if size > gigabytes * 1e9:
            # Doing without by itself would round otherwise, by how much other data there is.
            raise UserError(
                f"what flows into the trained blocks takes {size / 1e9:.1f} GB for {len(windows):,} windows",
                allowed=f"up to --cache-gb {gigabytes:g}",
                hint="--no-cache, or more shards",
            )
        if not all(self._is_same(windows[0], place) for place in places):
            say(f"note: {type(self.model).__name__} does not run from the middle: each stage runs the whole")
            self.places = ()
        self.forget()

    def forget(self) -> None:
        """Lets go of all states: others will be asked for."""
        self._states.clear()

    def _is_same(self, window: Window, place: int) -> bool:
        with torch.no_grad(), self._bare():
            whole_XD = self._read(window.content)
            self.cut(place)
            try:
                above_XD = self._read(self.with_states(window, place))
            finally:
                self.whole(self.model)
        return bool((above_XD - whole_XD).norm() <= SAME * whole_XD.norm())

    def _read(self, content: Mapping[str, Tensor]) -> Tensor:
        """`(T, D)`: what the output embedding reads of a window; `(1, D)`: what a classifier's head reads of a text."""
        one = self._one(content)
        if is_classifier(self.model):
            return classified(self.model, one, (PENULTIMATE,)).features[PENULTIMATE].float()
        return hf.hidden_states(self.model, one)[0].float()

    def _one(self, content: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: t[None].to(self._device) for name, t in self.alone(content).items() if name != "labels"}

    @property
    def _device(self) -> torch.device:
        return next(self.model.parameters()).device

    def with_states(self, window: Window, place: int) -> dict[str, Tensor]:
        """A window's content, with what flows into a block where the model is run from there on.

        Args:
            window: one of those that were tried.
            place: number of the block.
        """
        if place not in self.places:
            return dict(window.content)
        if window.number not in self._states:
            self._states[window.number] = self._run(window)
        return {**window.content, "inputs_embeds": self._states[window.number][place]}

    @torch.no_grad()
    def _run(self, window: Window) -> dict[int, Tensor]:
        """By block what flows into it; nothing above the last one is computed."""
        found: dict[int, Tensor] = {}

        def catch(place: int) -> Any:
            def seen(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                states_BTD = args[0] if args else kwargs["hidden_states"]
                found[place] = states_BTD[0].cpu().clone()
                if place == self.places[-1]:
                    raise StopForward

            return seen

        training = self.model.training
        hooks = [self._blocks[place].register_forward_pre_hook(catch(place), with_kwargs=True) for place in self.places]
        self.model.eval()
        blocks = self._swapped(self._blocks)
        try:
            with self._bare():
                if self._of_images:
                    classified(self.model, self._one(window.content))
                else:
                    hf.hidden_states(self.model, self._one(window.content))
        except StopForward:
            pass
        finally:
            self._swapped(blocks)
            for hook in hooks:
                hook.remove()
            self.model.train(training)
        return found

    @contextmanager
    def _bare(self) -> Iterator[None]:
        """Inside, the whole model runs without adapters, and rounds as it does in the loop, whatever that runs now.

        The loop fuses the blocks that it finds, which a stage has cut off from those below.
        """
        with fused(self.model), machine.autocast(self._device, self.dtype), adapters_off(self.model):
            yield

    def cut(self, place: int) -> None:
        """Takes the blocks below one out, so that the model is run on what flows into it."""
        if place in self.places:
            self._swapped(self._blocks[place:])
            if self._of_images:
                self._fed = _Fed(self.model, self._blocks[place])

    def whole(self, model: nn.Module) -> nn.Module:
        """Puts them back; returns the model."""
        self._swapped(self._blocks)
        if self._fed is not None:
            self._fed.remove()
            self._fed = None
        return model

    def _swapped(self, blocks: Sequence[nn.Module]) -> list[nn.Module]:
        """Gives the model other blocks; returns those that it had."""
        where, _, name = self._list.rpartition(".")
        parent: Any = self.model.get_submodule(where)
        before = list(getattr(parent, name))
        setattr(parent, name, nn.ModuleList(blocks))
        return before


class _Fed:
    """Lets a classifier of images take `inputs_embeds` `(B, T, D)`, which none does: its first block reads them.

    The patches are embedded for nothing, which is little work beside a block.

    Args:
        model: the classifier.
        block: that is called first.
    """

    def __init__(self, model: nn.Module, block: nn.Module) -> None:
        self._states_BTD: Tensor | None = None
        self._hooks = (
            model.register_forward_pre_hook(self._take, with_kwargs=True),
            block.register_forward_pre_hook(self._give, with_kwargs=True),
        )

    def remove(self) -> None:
        """Leaves both as they were."""
        for hook in self._hooks:
            hook.remove()

    def _take(self, _module: nn.Module, args: tuple[Any, ...], given: dict[str, Any]) -> Any:
        others = {name: value for name, value in given.items() if name != "inputs_embeds"}
        self._states_BTD = given.get("inputs_embeds")
        return args, others

    def _give(self, _module: nn.Module, args: tuple[Any, ...], given: dict[str, Any]) -> Any:
        if self._states_BTD is None:
            return args, given
        return ((self._states_BTD, *args[1:]), given) if args else ((), given | {"hidden_states": self._states_BTD})


def blocks_of(model: nn.Module) -> dict[str, nn.Module]:
    """The blocks that stages are groups of, by name, as `decoder_blocks` finds them; of images all are alike.

    Raises:
        UserError: there are none, or they differ in shape, as where an image is merged on its way.
    """
    if kind_of_model(model) is not Kind.IMAGE_CLASSIFIER:
        return decoder_blocks(model)
    allowed = "image classifiers that are a stack of equal transformer blocks: ViT, DeiT, BEiT, DINOv2, CCT"
    try:
        blocks = decoder_blocks(model)
    except UserError as error:
        raise UserError(
            f"{type(model).__name__} has no blocks with linear layers, which adapters are for", allowed=allowed
        ) from error
    shapes = {tuple(parameter.shape for parameter in block.parameters()) for block in blocks.values()}
    if len(shapes) > 1:
        raise UserError(f"the {len(blocks)} stages of {type(model).__name__} have different shapes", allowed=allowed)
    return blocks
