"""Training on several processes: accelerate's data-parallel wrapper, or torch's FSDP2."""

from __future__ import annotations

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import nn


def distribute(accelerator: Accelerator, loss: nn.Module, optimizer: torch.optim.Optimizer) -> nn.Module:
    """Wraps the loss module for the processes that were launched; a single process gets it back as it is.

    The optimizer is not handed to accelerate: its wrapper returns None from `step(closure)` and may skip a step.
    """
    if accelerator.distributed_type == DistributedType.FSDP:
        return _shard(loss, optimizer)
    if accelerator.num_processes > 1:
        return accelerator.prepare_model(loss)
    return loss


def _shard(loss: nn.Module, optimizer: torch.optim.Optimizer) -> nn.Module:
    """FSDP2: every block is a unit, the rest is the root's; the optimizer gets the sharded parameters by name."""
    from torch.distributed.fsdp import fully_shard

    names = {id(p): name for name, p in loss.named_parameters()}
    groups = [[names[id(p)] for p in group["params"]] for group in optimizer.param_groups]
    for module in loss.modules():
        if isinstance(module, nn.ModuleList):
            for block in module:
                fully_shard(block)
    fully_shard(loss)
    sharded = dict(loss.named_parameters())
    for group, own in zip(optimizer.param_groups, groups, strict=True):
        group["params"] = [sharded[name] for name in own]
    return loss
