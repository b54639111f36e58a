"""Half-Reset, the pilot study of Half Fine-Tuning: half of a tuned model's matrices become those of its base again."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from overhaul.adapt.hft import PAPER
from overhaul.errors import UserError
from overhaul.halves import Halves, Halving
from overhaul.method import Transform

if TYPE_CHECKING:
    from torch import Tensor, nn

    from overhaul.data import Data
    from overhaul.matrices import Listed
    from overhaul.stream import Stream


class HalfReset(Halving, Transform):
    """Put a random half of a tuned model's matrices back to its base: knowledge returns, most of the skill stays.

    The half is drawn as `adapt hft` draws it, and balanced alike; what lies outside of the blocks stays tuned unless it
    is named.
    """

    paper: ClassVar[str] = PAPER

    base: str = Field(min_length=1, description="Model that it was tuned from.")
    reset_embeddings: bool = Field(False, description="Put the embeddings back too, and a head tied to them.")
    reset_head: bool = Field(False, description="Put the output embedding back too, where it is a matrix of its own.")
    reset_final_norm: bool = Field(False, description="Put the norms outside of the blocks back too.")

    def others(self) -> tuple[str, ...]:
        """The base."""
        return (self.base,)

    def check(self, model: nn.Module, data: Data | None) -> None:
        """Compares names and shapes with the base, whose weights are not read for that, and draws the half.

        Raises:
            UserError: the base has other tensors or a format that is not read here, or the half cannot be drawn.
        """
        from overhaul.artifact import check_weights, directories, weight_files
        from overhaul.matrices import manifest

        path, whole = directories(self.base)
        check_weights(whole)
        if path != whole or any(file.suffix != ".safetensors" for file in weight_files(whole)) or _is_packed(self.base):
            raise UserError(
                f"--base {self.base} is no directory of whole weights", allowed="dense weights in safetensors"
            )
        listed = manifest(model)
        named = self._names(listed, 0)
        with _opened(self.base) as base:
            for one in listed:
                shape, there = tuple(one.parameter.shape), base.shape(one.name)
                if (one.block is not None or one.name in named) and there != shape:
                    raise UserError(
                        f"--base {self.base}: {one.name} is {there or 'not there'}, but {shape} in the tuned model",
                        hint="the model that it was tuned from",
                    )

    def _names(self, listed: tuple[Listed, ...], seed: int) -> frozenset[str]:
        """The parameters that are put back, by draw 0: those of `adapt hft` are counted from 1."""
        from overhaul.halves import outside, select

        tuned = Halves(
            share=self.share,
            level=self.level,
            freeze_embeddings=self.reset_embeddings,
            freeze_head=self.reset_head,
            freeze_final_norm=self.reset_final_norm,
        )
        beside = {one.name for one in listed if one.block is None} - outside(listed, tuned)
        return select(listed, self, seed=seed, number=0) | beside

    def apply(self, model: nn.Module, calib: Stream | None) -> nn.Module:
        """Reads one tensor of the base after the other; pruned weights stay zero."""
        import torch

        from overhaul.layers.masked import MaskedLinear
        from overhaul.matrices import manifest
        from overhaul.progress import say

        listed = manifest(model)
        names = self._names(listed, torch.initial_seed())  # the run's --seed
        with _opened(self.base) as base:
            for one in listed:
                if one.name in names:
                    one.parameter.copy_(base.read(one.name))
        for module in model.modules():
            if isinstance(module, MaskedLinear):
                module.enforce()
        sizes = [(one.parameter.numel(), one.name in names) for one in listed]
        share = sum(size for size, is_back in sizes if is_back) / sum(size for size, _ in sizes)
        say(f"{len(names)} tensors with {share:.1%} of all parameters are those of {self.base} again")
        return model


class _Opened:
    """The safetensors files of a directory, opened: tensors by name, read when they are asked for."""

    def __init__(self, files: Iterable[Any]) -> None:
        self.holder = {name: file for file in files for name in file.keys()}  # noqa: SIM118 - no dict

    def shape(self, name: str) -> tuple[int, ...] | None:
        """Of a tensor, without reading it; None where there is none."""
        return tuple(self.holder[name].get_slice(name).get_shape()) if name in self.holder else None

    def read(self, name: str) -> Tensor:
        """The tensor."""
        return self.holder[name].get_tensor(name)


@contextlib.contextmanager
def _opened(ref: str) -> Iterator[_Opened]:
    from safetensors import safe_open

    from overhaul.artifact import directories, weight_files

    with contextlib.ExitStack() as stack:
        files = weight_files(directories(ref)[1])
        yield _Opened([stack.enter_context(safe_open(file, framework="pt")) for file in files])


def _is_packed(ref: str) -> bool:
    from overhaul.artifact import read_config

    return getattr(read_config(ref), "quantization_config", None) is not None
