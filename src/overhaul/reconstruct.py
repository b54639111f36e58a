"""Layer-wise reconstruction: each block is trained to give the output of its dense self (PERP, section 3.3).

For block l with input X from the changed stream, minimise mean((block_pruned(X) - block_dense(X))^2), merge, go on.
Only one block has gradients, and only one dense block is in memory, at a time.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from overhaul.errors import UserError
from overhaul.journal import note_part, note_tokens
from overhaul.layers.masked import MaskedLinear
from overhaul.objective import Batch, Forward, Term
from overhaul.optim.build import build
from overhaul.schedules import schedule
from overhaul.stream import Batch as Batches
from overhaul.stream import Repeat, Rows, Shuffle
from overhaul.train import Plan
from overhaul.trainable import has_norms, prepare
from overhaul.walk import Block, Call, walk
from overhaul.watch import KeepZeros

if TYPE_CHECKING:
    from overhaul.adapt.perp import Perp
    from overhaul.data import Data


class Reconstruction(Term):
    """Mean squared difference between a part's output and a stored target."""

    name = "reconstruction"

    def __init__(self, run: Callable[[Tensor], Tensor]) -> None:
        self.run = run

    def total(self, forward: Forward, batch: Batch) -> Tensor:
        return (self.run(batch["inputs"]).float() - batch["targets"].float()).square().sum()

    def count(self, batch: Batch) -> int:
        return batch["targets"].numel()


@dataclass(frozen=True, slots=True)
class Part:
    """Something to reconstruct at once: a block, its attention or MLP, or one linear layer.

    Attributes:
        name: qualified name of `module`.
        module: what is trained.
        inputs: what flows into it, one tensor a window `(1, T, D)`.
        targets: what its dense self makes of that.
        run: the part as a function of its input.
    """

    name: str
    module: nn.Module
    inputs: list[Tensor]
    targets: list[Tensor]
    run: Callable[[Tensor], Tensor]


def reconstruction_plans(model: nn.Module, data: Data, method: Perp) -> Iterator[Plan]:
    """One plan for every part of every block, in order; the walk goes on from what each plan left.

    Raises:
        UserError: the dense weights cannot be found.
    """
    if data.dense_tensors is None:
        raise UserError(
            "--reconstruct needs the dense model that this one was pruned from; the lineage does not lead to it",
            hint="prune with overhaul, or keep the parent directory where it was",
        )
    calib = data.calibration(samples=method.samples, seq_len=method.seq_len)
    note_tokens(calib.tokens() or 0)  # every part is trained on these windows: they are read once
    for block in walk(model, calib, title="reconstruct"):
        dense = copy.deepcopy(block.module)
        _load_dense(dense, data.dense_tensors(f"{block.name}."))
        for part in _PARTS[method.granularity](block, dense):
            before = _error(part)
            yield _plan(part, method, data.seed)
            note_part(part.name, before=before, after=_error(part))
        del dense


@torch.no_grad()
def _error(part: Part) -> float:
    """Mean squared difference over all windows, as the part is now."""
    gaps = [(part.run(x).float() - y.float()).square().mean() for x, y in zip(part.inputs, part.targets, strict=True)]
    return float(torch.stack(gaps).mean())


def _plan(part: Part, method: Perp, seed: int) -> Plan:
    # An attention or a single matrix has no norms: what else was chosen is trained there.
    groups = tuple(group for group in method.train if group != "norms" or has_norms(part.module))
    if not groups:
        raise UserError(f"{part.name} has no norms to train", hint="--granularity block, or --train norms mask_lora")
    # Trained tensors become fp32; the blocks after this one are fed in the model's own type again.
    dtype = next(part.module.parameters()).dtype
    selected = prepare(part.module, method.model_copy(update={"train": groups}))
    windows = [{"inputs": x[0], "targets": y[0]} for x, y in zip(part.inputs, part.targets, strict=True)]
    rows = Rows(windows, name=part.name, fingerprint=part.name)
    return Plan(
        model=part.module,
        objective=Reconstruction(part.run),
        stream=Batches(Repeat(Shuffle(rows, seed=seed)), batch_size=min(method.batch_size, len(windows))),
        optimizer=build(method, selected.parameters),
        schedule=schedule(method.schedule, method.warmup),
        watchers=(KeepZeros(),) if "full" in method.train else (),
        finish=lambda module: selected.finish(module).to(dtype),
    )


def _load_dense(block: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Puts the dense weights into a copy of a block; masks are dropped with it."""
    with torch.no_grad():
        for name, parameter in block.named_parameters():
            parameter.copy_(tensors[name])


@torch.no_grad()
def _whole_block(block: Block, dense: nn.Module) -> Iterator[Part]:
    """The block itself."""
    twin = Block(block.name, dense, block.calls)
    inputs, targets = [], []
    for call in block.calls:
        inputs += call.hidden.split(1)
        targets += twin(call).split(1)
    template = _one_row(block.calls[0])
    yield Part(block.name, block.module, inputs, targets, lambda x: block(_with_input(template, x)))


def _attention_and_mlp(block: Block, dense: nn.Module) -> Iterator[Part]:
    """Each child of the block that holds linear layers, in the order they run."""
    names = [
        name
        for name, child in block.module.named_children()
        if any(isinstance(m, MaskedLinear) for m in child.modules())
    ]
    yield from _submodules(block, dense, names)


def _matrices(block: Block, dense: nn.Module) -> Iterator[Part]:
    """Each masked linear layer by itself."""
    yield from _submodules(block, dense, [n for n, m in block.module.named_modules() if isinstance(m, MaskedLinear)])


def _submodules(block: Block, dense: nn.Module, names: list[str]) -> Iterator[Part]:
    """Parts below the block; the inputs of each are caught after the parts before it were changed."""
    for name in names:
        module, twin = block.module.get_submodule(name), dense.get_submodule(name)
        caught = _catch(block, module)
        inputs, targets = [], []
        with torch.no_grad():
            for args, kwargs in caught:
                x, call = _first(args, kwargs)
                inputs += x.split(1)
                targets += _output(twin(*call[0], **call[1])).split(1)
        args, kwargs = _only_row(caught[0])

        def run(
            x: Tensor, args: tuple[Any, ...] = args, kwargs: Mapping[str, Any] = kwargs, name: str = name
        ) -> Tensor:
            own = block.module.get_submodule(name)
            if args:
                return _output(own(x, *args[1:], **kwargs))
            return _output(own(**{**kwargs, "hidden_states": x}))

        yield Part(f"{block.name}.{name}", _holder(block.module, name), inputs, targets, run)


def _holder(module: nn.Module, name: str) -> nn.Module:
    """The part, or for a bare linear layer a container whose swap reaches the block."""
    part = module.get_submodule(name)
    return _View(module, name) if isinstance(part, nn.Linear) else part


class _View(nn.Module):
    """One linear layer seen through its parent, so that replacing it here replaces it there."""

    def __init__(self, root: nn.Module, name: str) -> None:
        super().__init__()
        parent, _, self.child = name.rpartition(".")
        self.holder = (root.get_submodule(parent),)  # in a tuple: not a child of this module
        self.part = root.get_submodule(name)

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name == "part":
            setattr(self.holder[0], str(self.child), value)


_PARTS: dict[str, Callable[[Block, nn.Module], Iterator[Part]]] = {
    "block": _whole_block,
    "attn_mlp": _attention_and_mlp,
    "matrix": _matrices,
}


@torch.no_grad()
def _catch(block: Block, module: nn.Module) -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
    """The arguments of `module` while the block runs on its calls."""
    caught: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
    hook = module.register_forward_pre_hook(
        lambda _module, args, kwargs: caught.append((args, kwargs)), with_kwargs=True
    )
    block.outputs()
    hook.remove()
    return caught


def _first(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, tuple[tuple[Any, ...], dict[str, Any]]]:
    return (args[0] if args else kwargs["hidden_states"]), (args, kwargs)


def _output(made: Any) -> Tensor:
    return made[0] if isinstance(made, tuple) else made


def _one_row(call: Call) -> Call:
    """The call with everything that has a row per window cut to one row, which broadcasts."""
    rows = call.hidden.shape[0]
    args, kwargs = _only_row((call.args, dict(call.kwargs)), rows)
    return Call(call.hidden[:1], args, kwargs, None)


def _only_row(
    arguments: tuple[tuple[Any, ...], dict[str, Any]], rows: int | None = None
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    args, kwargs = arguments
    rows = rows or _first(args, kwargs)[0].shape[0]

    def cut(value: Any) -> Any:
        if isinstance(value, Tensor) and value.dim() > 1 and value.shape[0] == rows:
            return value[:1]
        return tuple(cut(inner) for inner in value) if isinstance(value, tuple) else value

    return tuple(cut(value) for value in args), {name: cut(value) for name, value in kwargs.items()}


def _with_input(call: Call, x_BTD: Tensor) -> Call:
    return Call(x_BTD, call.args, call.kwargs, None)
