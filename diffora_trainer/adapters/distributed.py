"""Wrappers for several processes that have to notice when modules leave the model."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ..compat.torch import remove_fsdp_parameters


def rebuild_ddp(wrapper: Any, handler: Any = None) -> None:
    """
    Let distributed data parallelism notice that parameters are gone. Its reducer is built once, and would wait for
    them.

    The training loop holds the wrapper in a local variable, so the wrapper is built anew in its place.

    Args:
        wrapper: the model as it is trained; nothing happens to one that is not a `DistributedDataParallel`.
        handler (`accelerate.DistributedDataParallelKwargs`, *optional*): the options that it was built with.
    """
    if not isinstance(wrapper, DistributedDataParallel):
        return
    kwargs = handler.to_kwargs() if handler is not None else {}
    wrapper.__init__(  # type: ignore[misc]
        wrapper.module,
        device_ids=wrapper.device_ids,
        output_device=wrapper.output_device,
        **kwargs,
    )
    if handler is not None:
        handler.register_comm_hook(wrapper)


def reshard(model: nn.Module) -> None:
    """
    Put the sharded parameters of FSDP2 back into their modules. After a forward pass without a backward pass some
    modules still hold gathered ones, and a change of these would be lost.
    """
    for module in _sharded_modules(model):
        module.reshard()


def unregister_fsdp_parameters(model: nn.Module, parameters: Iterable[nn.Parameter]) -> None:
    """
    Take parameters that have left a model out of what FSDP2 gathers and scatters for it.

    FSDP2 collects the parameters of a wrapped module once, and would go on to gather those of modules that are gone.

    Args:
        model (`nn.Module`): the model; nothing happens to one that is not sharded.
        parameters (`Iterable[nn.Parameter]`): the sharded parameters that left it.
    """
    gone, present = set(parameters), set(model.modules())
    for module in _sharded_modules(model):
        remove_fsdp_parameters(module, gone, present)


def add_to_weight(weight: nn.Parameter, update: Tensor) -> None:
    """
    Add to a weight, of which FSDP2 may hold a part on each process.

    Args:
        weight (`nn.Parameter`): the weight, or its shard.
        update (`Tensor`): what is added to all of it, the same on every process.
    """
    shard: Any = weight.data
    if hasattr(shard, "device_mesh"):
        from torch.distributed.tensor import distribute_tensor

        update = distribute_tensor(update.contiguous(), shard.device_mesh, shard.placements)
    with torch.no_grad():
        weight.add_(update)


def _sharded_modules(model: nn.Module) -> list[Any]:
    if "torch.distributed.fsdp" not in sys.modules:  # not imported for those who do not use it: it takes a while
        return []
    from torch.distributed.fsdp import FSDPModule

    return [module for module in model.modules() if isinstance(module, FSDPModule)]
