"""Block by block through a decoder, each block fed by the blocks already changed: `for block in walk(model, calib)`.

Letters of shapes: B windows in a batch, T tokens in a window, D model width, N tokens, I input features.

The inputs of block 0 are caught once. When the loop body is done with a block, its outputs are computed with the
CHANGED block and become the inputs of the next, so memory holds one set of hidden states and the statistics of one
block (SparseGPT, arXiv:2301.00774, section 4; PERP, arXiv:2312.15230, section 3.3).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from overhaul.errors import UserError
from overhaul.progress import Bar

TOKENS_PER_FORWARD = 4096
"""Large enough for efficient matrix products, small enough for a block's activations to stay near the cache."""

Statistic = Literal["input_norm", "hessian", "absmax"]


@dataclass(frozen=True, slots=True)
class Call:
    """One call of a block during calibration.

    Attributes:
        hidden_BTD: what flows in, in the model's dtype.
        args, kwargs: the other arguments, as the model passes them to this block: positions, attention mask.
        real_BT: which tokens are not padding; None when all are real.
    """

    hidden_BTD: Tensor
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    real_BT: Tensor | None


@dataclass(frozen=True, slots=True)
class Block:
    """One decoder block and the calibration data that reaches it.

    Attributes:
        name: qualified name in the model, such as `model.layers.3`.
        module: the block itself; change it in place.
        calls: its inputs, one per batch; empty when walking without calibration data.
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
        out = self.module(call.hidden_BTD, *call.args, **call.kwargs)
        return out[0] if isinstance(out, tuple) else out

    @torch.no_grad()
    def outputs(self) -> list[Tensor]:
        """The outputs (B, T, D) of the block as it is now, one per call."""
        return [self(call) for call in self.calls]

    def statistics(self, kind: Statistic) -> dict[str, Tensor]:
        """One statistic of the inputs of each linear layer, in fp32 and over all real tokens, in one pass.

        Args:
            kind: `input_norm`: the 2-norm of each input channel (I,). `absmax`: its largest magnitude (I,).
                `hessian`: `2/N sum x x^T` (I, I), the second derivative of the layer's squared output error.

        Returns:
            Qualified name -> statistic. Layers that read the same tensor (q, k, v; gate, up) share one.

        Raises:
            UserError: there is no calibration data, a layer was never reached (a mixture's expert that no token
                was routed to), or its inputs are not finite.
        """
        if not self.calls:
            raise UserError(f"{kind} of {self.name} needs calibration data", hint="--data sample")
        return _collect(self, kind)


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
    calls_of = _catch_calls(model, list(blocks.values()), calib) if calib is not None else [()] * len(blocks)
    hidden = [call.hidden_BTD for call in calls_of[0]]
    with Bar(title, len(blocks), quiet=not title) as bar:
        for index, (name, module) in enumerate(blocks.items()):
            calls = tuple(
                Call(x_BTD, call.args, call.kwargs, call.real_BT)
                for x_BTD, call in zip(hidden, calls_of[index], strict=True)
            )
            block = Block(name, module, calls)
            hidden = []
            yield block
            if index + 1 < len(blocks):
                hidden = block.outputs()
            bar.step(name)


def decoder_blocks(model: nn.Module) -> dict[str, nn.Module]:
    """The decoder's repeated blocks by qualified name: the largest list of modules that hold linear layers.

    Raises:
        UserError: there is none; there are an encoder's and a decoder's; or the blocks keep weight matrices in
            something else than `nn.Linear`, which would silently stay as they are.
    """
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        raise UserError(
            f"{type(model).__name__} is an encoder-decoder", allowed="decoder-only language models"
        )
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
    return {
        f"{prefix}.{name}": child for name, child in module.named_modules() if isinstance(child, nn.Linear)
    }


def _has_matrices(block: nn.Module) -> bool:
    return any(isinstance(module, nn.Linear) or _is_conv1d(module) for module in block.modules())


def _is_conv1d(module: nn.Module) -> bool:
    # GPT-2's transposed linear layer lives in transformers, which this module need not import.
    return type(module).__name__ == "Conv1D"


def _refuse_hidden_matrices(block_name: str, block: nn.Module) -> None:
    for name, module in block.named_modules():
        if _is_conv1d(module):
            raise UserError(
                f"{block_name}.{name} is a Conv1D (a transposed linear layer, as in GPT-2), not nn.Linear",
                allowed="blocks whose matrices are nn.Linear: Llama, Qwen, Mistral, OPT, GPT-NeoX and many more",
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


class _Stop(Exception):
    """Everything needed from this forward pass has been seen."""


def _catch_calls(
    model: nn.Module, blocks: list[nn.Module], calib: Iterable[Mapping[str, Tensor]]
) -> list[tuple[Call, ...]]:
    """The calls of each block, all with the hidden states that enter block 0: no block is run.

    Arguments are caught per block because they may differ: sliding and full attention, rotary on and off.
    """
    calls_of: list[list[Call]] = [[] for _ in blocks]
    device = next(model.parameters()).device
    for batch in _resized(calib, TOKENS_PER_FORWARD):
        batch = {name: tensor.to(device) for name, tensor in batch.items()}
        with torch.no_grad(), _stubs(blocks, calls_of, _real_tokens(batch)):
            try:
                model(**batch)
            except _Stop:
                continue
        raise RuntimeError("the model's forward did not reach its last block")
    if not calls_of[0]:
        raise UserError("the calibration data is empty", hint="--data sample, or a longer text")
    return [tuple(calls) for calls in calls_of]


def _real_tokens(batch: Mapping[str, Tensor]) -> Tensor | None:
    mask_BT = batch.get("attention_mask")
    return None if mask_BT is None or bool(mask_BT.all()) else mask_BT.bool()


def _resized(calib: Iterable[Mapping[str, Tensor]], num_tokens: int) -> Iterator[dict[str, Tensor]]:
    """The same windows in the same order, in batches of about `num_tokens`; only what a decoder reads is kept."""
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


@contextmanager
def _stubs(blocks: list[nn.Module], calls_of: list[list[Call]], real_BT: Tensor | None) -> Iterator[None]:
    """Within the context each block only records its arguments; the last one ends the forward pass.

    A cache is left out of the recorded arguments: each block is called several times on the same tokens.
    """
    entering: list[Tensor] = []

    def stub(index: int) -> Callable[..., Tensor]:
        def record(*args: Any, **kwargs: Any) -> Tensor:
            kwargs = {
                name: False
                if name == "use_cache"
                else None
                if name in ("past_key_values", "layer_past")
                else value
                for name, value in kwargs.items()
            }
            hidden_BTD = args[0] if args else kwargs.pop("hidden_states")
            # What a stub returns is ignored by the next one, whether the model takes it whole or its item 0.
            entering.append(hidden_BTD)
            calls_of[index].append(Call(entering[0], args[1:], kwargs, real_BT))
            if index == len(blocks) - 1:
                raise _Stop
            return entering[0]

        return record

    for index, block in enumerate(blocks):
        block.forward = stub(index)
    try:
        yield
    finally:
        for block in blocks:
            del block.forward  # uncovers the class's own


class _Sums:
    """Running statistics of the inputs of a block's linear layers, one for all that read the same tensor.

    That two layers read the same tensor is a property of the block's code, so the first pass decides it. The
    tensor seen last is held, hence `is` cannot be fooled by a freed tensor's reused address.
    """

    def __init__(self, kind: Statistic) -> None:
        self.kind = kind
        self.sums: dict[str, Tensor] = {}
        self.counts: dict[str, int] = {}
        self.leader: dict[str, str] = {}
        self.finished: dict[str, Tensor] = {}
        self.last_input: Tensor | None = None
        self.last_name = ""

    def see(self, name: str, x: Tensor, real_BT: Tensor | None) -> None:
        """Adds the input of the layer `name`."""
        if name not in self.leader:
            self.leader[name] = self.leader[self.last_name] if x is self.last_input else name
        self.last_input, self.last_name = x, name
        if self.leader[name] != name:
            return
        x_NI = _rows(x, real_BT)
        self.counts[name] = self.counts.get(name, 0) + len(x_NI)
        if name not in self.sums:
            width = x_NI.shape[1]
            shape = (width, width) if self.kind == "hessian" else (width,)
            self.sums[name] = torch.zeros(shape, dtype=torch.float32, device=x.device)
        if len(x_NI):
            _ADD[self.kind](self.sums[name], x_NI)

    def result(self, name: str) -> Tensor:
        """The statistic of the layer `name`, shared with the other readers of its input."""
        leader = self.leader.get(name)
        if leader is None or self.counts[leader] == 0:
            raise UserError(
                f"no calibration token reaches {name}, so nothing is known about its inputs",
                hint="more or more varied calibration data: --samples, --data",
            )
        if leader not in self.finished:
            self.finished[leader] = _finish(self.kind, self.sums.pop(leader), self.counts[leader])
            if not self.finished[leader].isfinite().all():
                raise UserError(f"the inputs of {name} contain NaN or infinity", hint="--dtype float32")
        return self.finished[leader]


@torch.no_grad()
def _collect(block: Block, kind: Statistic) -> dict[str, Tensor]:
    linears = block.linears
    sums = _Sums(kind)
    waiting: set[str] = set()
    real_BT: Tensor | None = None

    def before(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def see(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            sums.see(name, args[0], real_BT)
            waiting.discard(name)
            if not waiting:  # the last product, often the largest, need not be computed
                raise _Stop

        return see

    handles = [linear.register_forward_pre_hook(before(name)) for name, linear in linears.items()]
    try:
        for call in block.calls:
            waiting.update(linears)
            real_BT = call.real_BT
            with suppress(_Stop):
                block(call)
            sums.last_input = None
    finally:
        for handle in handles:
            handle.remove()
    return {name: sums.result(name) for name in linears}


def _rows(x: Tensor, real_BT: Tensor | None) -> Tensor:
    """The tokens (N, I) of a layer's input, without padding where the layout still shows which they are.

    A mixture's expert gets a selection of tokens whose origin is lost: there padding cannot be told apart.
    """
    x_NI = x.flatten(0, -2)
    return x_NI if real_BT is None or len(x_NI) != real_BT.numel() else x_NI[real_BT.flatten()]


def _add_squares(sum_I: Tensor, x_NI: Tensor) -> None:
    # Small pieces stay in the cache between the conversion, the square and the sum.
    for piece_NI in x_NI.split(128):
        sum_I += piece_NI.float().square_().sum(dim=0)


def _add_products(sum_II: Tensor, x_NI: Tensor) -> None:
    """Adds the upper triangle of `x^T x`, in block rows; what is below the diagonal blocks stays 0."""
    with _exact_bf16_products(x_NI.dtype):
        x_NI = x_NI.float()
        for start in range(0, x_NI.shape[1], 384):
            rows = slice(start, start + 384)
            sum_II[rows, start:].addmm_(x_NI[:, rows].T, x_NI[:, start:])


def _add_absmax(sum_I: Tensor, x_NI: Tensor) -> None:
    torch.maximum(sum_I, x_NI.abs().amax(dim=0).float(), out=sum_I)


_ADD: Mapping[Statistic, Callable[[Tensor, Tensor], None]] = {
    "input_norm": _add_squares,
    "hessian": _add_products,
    "absmax": _add_absmax,
}


def _finish(kind: Statistic, total: Tensor, count: int) -> Tensor:
    if kind == "input_norm":
        return total.sqrt_()
    if kind == "hessian":
        upper_II = total.triu_().mul_(2 / count)
        return upper_II + upper_II.triu(1).T
    return total


@contextmanager
def _exact_bf16_products(dtype: torch.dtype) -> Iterator[None]:
    """Lets fp32 products round their operands to bf16, where that changes nothing because they are bf16 values.

    The sums stay fp32; on processors with bf16 instructions this is up to three times as fast.
    """
    settings = torch.backends.mkldnn.matmul  # pyright: ignore[reportAttributeAccessIssue]
    before = settings.fp32_precision
    if dtype == torch.bfloat16:
        settings.fp32_precision = "bf16"
    try:
        yield
    finally:
        settings.fp32_precision = before
