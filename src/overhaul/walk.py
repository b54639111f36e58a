"""Block by block through a decoder, each fed by those already changed: `for block in walk(model, calib)`.

Letters of shapes: B windows in a batch, T tokens in a window, D model width, N tokens, I input features.

The inputs of block 0 are caught once. When the loop body is done with a block, its outputs are computed with
the CHANGED block and become the inputs of the next. Memory holds the inputs and outputs of one block and its
statistics, never those of the whole model (as in SparseGPT, arXiv:2301.00774, and Wanda, arXiv:2306.11695).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from overhaul.errors import UserError
from overhaul.input_statistics import Statistic, StopForward, collect
from overhaul.interop import hf
from overhaul.interop.fused import fused
from overhaul.layers import LinearLike
from overhaul.machine import release_memory
from overhaul.progress import Bar

TOKENS_PER_FORWARD = 1024
"""Matrix products run no faster with more, and a block's activations stay cheap."""


@dataclass(frozen=True, slots=True)
class Call:
    """One call of a block during calibration.

    Attributes:
        hidden: what flows in (B, T, D), in the model's dtype.
        args, kwargs: the other arguments, as the model passes them to this block: positions, attention mask.
        real: which tokens (B, T) are not padding; None when all are real.
    """

    hidden: Tensor
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    real: Tensor | None


@dataclass(frozen=True, slots=True)
class Block:
    """One decoder block and the calibration data that reaches it.

    Attributes:
        name: qualified name in the model, such as `model.layers.3`.
        module: the block itself; change it in place.
        calls: its inputs, one per batch, overwritten when the walk goes on; empty when walking without data.
    """

    name: str
    module: nn.Module
    calls: tuple[Call, ...] = field(default=(), repr=False)

    @property
    def linears(self) -> dict[str, nn.Linear]:
        """The block's linear layers (masked ones too) by qualified name, as they are now."""
        return linears_of(self.module, self.name)

    def __call__(self, call: Call) -> Tensor:
        """The block's output (B, T, D) as it is now; differentiable unless gradients are off."""
        # Only while it runs: in between the loop body may copy, change or train the block.
        with fused(self.module):
            out = self.module(call.hidden, *call.args, **call.kwargs)
        return out[0] if isinstance(out, tuple) else out

    @torch.no_grad()
    def outputs(self) -> list[Tensor]:
        """The outputs (B, T, D) of the block as it is now, one per call."""
        return [self(call) for call in self.calls]

    @torch.no_grad()
    def advance(self) -> list[Tensor]:
        """The outputs, written over the inputs: new tensors among the freed temporaries would keep the heap large."""
        return [_written_over(call.hidden, self(call)) for call in self.calls]

    def statistics(self, kind: Statistic) -> dict[str, Tensor]:
        """One statistic of the inputs of each linear layer, in fp32 and over all real tokens, in one pass.

        Args:
            kind: `input_norm`: the 2-norm of each input channel (I,). `absmax`: its largest magnitude (I,).
                `hessian`: `2/N sum x x^T` (I, I), the second derivative of the layer's squared output error.

        Returns:
            Qualified name -> statistic. Layers that read the same tensor (q, k, v; gate, up) share one.

        Raises:
            UserError: there is no calibration data, a layer was never reached (a mixture's expert that no
                token was routed to), or its inputs are not finite.
        """
        if not self.calls:
            raise UserError(f"{kind} of {self.name} needs calibration data", hint="--data sample")
        return collect(self.linears, [(partial(self, call), call.real) for call in self.calls], kind)


def walk(model: nn.Module, calib: Iterable[Mapping[str, Tensor]] | None, title: str = "") -> Iterator[Block]:
    """Yields the decoder's blocks in order; the loop body may change the block it holds.

    Args:
        model: a causal language model in evaluation mode.
        calib: finite batches `{"input_ids": (B, T) int64, "attention_mask": (B, T) optional}`, windows of any
            length, or None to walk without inputs.
        title: shown with the progress on stderr; no progress without.

    Raises:
        UserError: the model has no list of decoder blocks, or the calibration data is empty.
    """
    blocks = decoder_blocks(model)
    caught = _Caught(len(blocks)) if calib is None else _catch(model, list(blocks.values()), calib)
    hidden, caught.hidden = caught.hidden, []
    with Bar(title, len(blocks), quiet=not title) as bar:
        for index, (name, module) in enumerate(blocks.items()):
            calls = zip(hidden, caught.arguments[index], strict=True)
            block = Block(name, module, tuple(Call(x_BTD, *arguments) for x_BTD, arguments in calls))
            hidden = []
            yield block
            if index + 1 < len(blocks):
                hidden = block.advance()
            release_memory()
            bar.step(name)


def _written_over(old_BTD: Tensor, new_BTD: Tensor) -> Tensor:
    fits = (old_BTD.shape, old_BTD.dtype, old_BTD.is_contiguous()) == (new_BTD.shape, new_BTD.dtype, True)
    return old_BTD.copy_(new_BTD) if fits else new_BTD


def decoder_blocks(model: nn.Module) -> dict[str, nn.Module]:
    """The decoder's repeated blocks by qualified name: the largest list of modules that hold linear layers.

    Raises:
        UserError: there is none; there is an encoder too, or a second network; or the blocks keep weight matrices in
            something else than `nn.Linear`, which would silently stay as they are.
    """
    hf.refuse_two(model)
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        raise UserError(f"{type(model).__name__} is an encoder-decoder", allowed="decoder-only models")
    lists = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) and all(_has_matrices(child) for child in module)
    ]
    if not lists:
        raise UserError(
            f"{type(model).__name__} has no list of blocks with linear layers",
            allowed="decoder-only language models, such as Llama, Qwen, OPT, GPT-NeoX",
        )
    name, blocks = max(lists, key=lambda found: sum(p.numel() for p in found[1].parameters()))
    named = {f"{name}.{index}": block for index, block in enumerate(blocks)}
    for block_name, block in named.items():
        _refuse_hidden_matrices(block_name, block)
    return named


def linears_of(module: nn.Module, prefix: str) -> dict[str, nn.Linear]:
    """The linear layers inside `module`, by name below `prefix`."""
    return {f"{prefix}.{name}": child for name, child in module.named_modules() if isinstance(child, nn.Linear)}


def _has_matrices(block: nn.Module) -> bool:
    return any(isinstance(module, nn.Linear | LinearLike) or _is_conv1d(module) for module in block.modules())


def _is_conv1d(module: nn.Module) -> bool:
    # GPT-2's transposed linear layer lives in transformers, which this module need not import.
    return type(module).__name__ == "Conv1D"


def _refuse_hidden_matrices(block_name: str, block: nn.Module) -> None:
    for name, module in block.named_modules():
        if _is_conv1d(module):
            raise UserError(
                f"{block_name}.{name} is a Conv1D (a transposed linear layer, as in GPT-2), not nn.Linear",
                allowed="blocks whose matrices are nn.Linear: Llama, Qwen, Mistral, OPT, GPT-NeoX and more",
            )
        if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
            continue
        for own_name, parameter in module.named_parameters(recurse=False):
            if parameter.ndim > 2:
                raise UserError(
                    f"{block_name}.{name}.{own_name} holds the matrices of {len(parameter)} experts in one "
                    f"parameter of shape {tuple(parameter.shape)}, not in nn.Linear",
                    allowed="blocks whose matrices are nn.Linear",
                )


class _Caught:
    """What the blocks were called with: the inputs of block 0, and per block and batch all other arguments.

    The arguments may differ between blocks: sliding and full attention, rotary embedding on and off.
    """

    def __init__(self, num_blocks: int) -> None:
        self.hidden: list[Tensor] = []
        self.arguments: list[list[tuple[tuple[Any, ...], dict[str, Any], Tensor | None]]] = [
            [] for _ in range(num_blocks)
        ]


def _catch(model: nn.Module, blocks: list[nn.Module], calib: Iterable[Mapping[str, Tensor]]) -> _Caught:
    """Runs the model up to its blocks and past them, without running any."""
    caught = _Caught(len(blocks))
    device = next(model.parameters()).device
    for batch in _resized(calib, TOKENS_PER_FORWARD):
        batch = {name: tensor.to(device) for name, tensor in batch.items()}
        with torch.no_grad(), _stubs(blocks, caught, _real_tokens(batch)), suppress(StopForward):
            model(**batch)
    if not caught.hidden:
        raise UserError("the calibration data is empty", hint="--data sample, or a longer text")
    return caught


def _real_tokens(batch: Mapping[str, Tensor]) -> Tensor | None:
    mask_BT = batch.get("attention_mask")
    return None if mask_BT is None or bool(mask_BT.all()) else mask_BT.bool()


def _resized(calib: Iterable[Mapping[str, Tensor]], num_tokens: int) -> Iterator[dict[str, Tensor]]:
    """The same windows in the same order, in batches of about `num_tokens`, without labels and the like."""
    pending: list[dict[str, Tensor]] = []
    for batch in calib:
        rows = {name: batch[name] for name in ("input_ids", "attention_mask") if name in batch}
        if pending and (rows.keys() != pending[0].keys() or rows["input_ids"].shape[1] != _width(pending)):
            yield _joined(pending)
            pending = []
        size = max(1, num_tokens // rows["input_ids"].shape[1])
        for row in range(len(rows["input_ids"])):
            pending.append({name: tensor[row : row + 1] for name, tensor in rows.items()})
            if len(pending) == size:
                yield _joined(pending)
                pending = []
    if pending:
        yield _joined(pending)


def _width(rows: list[dict[str, Tensor]]) -> int:
    return rows[0]["input_ids"].shape[1]


def _joined(rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.cat([row[name] for row in rows]) for name in rows[0]}


_NO_CACHE = {"use_cache": False, "past_key_values": None, "layer_past": None}
"""A cache would grow: each block is called several times on the same tokens."""


@contextmanager
def _stubs(blocks: list[nn.Module], caught: _Caught, real_BT: Tensor | None) -> Iterator[None]:
    """Within the context each block only records its arguments; the last one ends the forward pass."""

    def stub(index: int) -> Callable[..., Tensor]:
        def record(*args: Any, **kwargs: Any) -> Tensor:
            hidden_BTD = args[0] if args else kwargs.pop("hidden_states")
            if index == 0:
                caught.hidden.append(hidden_BTD)
            kwargs |= {name: without for name, without in _NO_CACHE.items() if name in kwargs}
            caught.arguments[index].append((args[1:], kwargs, real_BT))
            if index == len(blocks) - 1:
                raise StopForward
            # The next stub ignores what it gets: no matter whether the model passes on this or its item 0.
            return caught.hidden[-1]

        return record

    for index, block in enumerate(blocks):
        block.forward = stub(index)
    try:
        yield
    finally:
        for block in blocks:
            del block.forward  # uncovers the class's own
