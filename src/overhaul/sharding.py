"""Training on several processes: data parallel by torch's DDP, or sharded by its FSDP2.

`accelerate launch` says which. The optimizer is never handed to accelerate: its wrapper returns None from
`step(closure)` and may skip a step.
"""

from __future__ import annotations

import contextlib
import copy
import os
from collections.abc import Iterator, Mapping
from typing import Any, TypeVar

import torch
from accelerate import Accelerator, PartialState
from torch import Tensor, distributed, nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from overhaul.errors import UserError

Loss = TypeVar("Loss", bound=nn.Module)


def distribute(accelerator: Accelerator, loss: Loss, optimizer: torch.optim.Optimizer) -> tuple[nn.Module, Loss]:
    """Prepares a loss module for the processes that were launched.

    Returns:
        What to call, and the module inside that holds the parameters which are trained: `loss` itself, or under
        FSDP2 a sharded twin, from which `gather` brings the result back.
    """
    if accelerator.num_processes == 1:
        return loss, loss
    if is_sharded():
        twin = _sharded(loss, optimizer)
        return twin, twin
    return accelerator.prepare_model(loss), loss


def is_sharded() -> bool:
    """Whether the launch asked for FSDP; on CPUs accelerate takes such a launch for plain data parallelism."""
    return os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"


def refuse_sharded(flag: str) -> None:
    """Raises `UserError` for a flag that reads or writes whole parameters, where the launch asked for FSDP."""
    if is_sharded():
        raise UserError(f"{flag} needs whole parameters, which FSDP has not", hint="accelerate launch --multi_gpu")


def num_processes() -> int:
    """How many the launch has started."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def _sharded(loss: Loss, optimizer: torch.optim.Optimizer) -> Loss:
    """A copy whose blocks are FSDP units, the rest being the root's; the optimizer gets the sharded parameters.

    A copy, because torch cannot take its hooks off again, and what comes after the training runs on one process.
    """
    names = {id(p): name for name, p in loss.named_parameters()}
    groups = [[names[id(p)] for p in group["params"]] for group in optimizer.param_groups]
    twin = copy.deepcopy(loss)
    for module in list(twin.modules()):
        if isinstance(module, nn.ModuleList):
            for block in module:
                fully_shard(block)
    fully_shard(twin)
    sharded = dict(twin.named_parameters())
    for group, own in zip(optimizer.param_groups, groups, strict=True):
        group["params"] = [sharded[name] for name in own]
    return twin


@contextlib.contextmanager
def without_sync(loss: nn.Module) -> Iterator[None]:
    """Gradients stay on their process: for all micro-batches of a step but the last."""
    if isinstance(loss, DistributedDataParallel):
        with loss.no_sync():
            yield
    elif isinstance(loss, FSDPModule):
        loss.set_requires_gradient_sync(False)
        yield
        loss.set_requires_gradient_sync(True)
    else:
        yield


@contextlib.contextmanager
def callable_parts(loss: nn.Module) -> Iterator[None]:
    """The model inside can be called without the loss around it, to measure it."""
    if isinstance(loss, FSDPModule):
        loss.unshard()
    yield
    if isinstance(loss, FSDPModule):
        loss.reshard()


def whole(value: Any) -> Any:
    """Nested data with every sharded tensor put together; all processes must call it."""
    if isinstance(value, DTensor):
        return value.full_tensor()
    if isinstance(value, Mapping):
        return {key: whole(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(whole(inner) for inner in value)
    return value


def like(tensor: Tensor, other: Tensor) -> Tensor:
    """A whole tensor, sharded as `other` is."""
    return distribute_tensor(tensor, other.device_mesh, other.placements) if isinstance(other, DTensor) else tensor


def load_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Loads a state of whole tensors into an optimizer whose parameters may be sharded."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    state["state"] = {
        index: {
            name: like(value, parameters[index]) if getattr(value, "shape", None) == parameters[index].shape else value
            for name, value in one.items()
        }
        for index, one in state["state"].items()
    }
    optimizer.load_state_dict(state)


@torch.no_grad()
def gather(trained: nn.Module, into: nn.Module) -> None:
    """Copies the trained parameters to the whole module they were sharded from; does nothing for the same module."""
    if trained is into:
        return
    sharded = dict(trained.named_parameters())
    for name, parameter in into.named_parameters():
        parameter.copy_(whole(sharded[name]))


def wait_for_all(device: torch.device) -> None:
    """Returns when all processes have come here; at once where there is only one."""
    if num_processes() > 1:
        PartialState(cpu=device.type == "cpu").wait_for_everyone()


def leave() -> None:
    """Ends the process group, if there is one, when all processes are through with their work.

    Not at the end of a training: a group that ends with a data-parallel wrapper still alive, or with a reduction
    still to be put away, can wait for the interpreter's lock that its own destructor holds.
    """
    if distributed.is_available() and distributed.is_initialized():
        distributed.barrier()
        distributed.destroy_process_group()
