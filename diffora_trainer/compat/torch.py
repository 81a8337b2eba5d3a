"""Private and version-dependent names of torch, and what accelerate knows of them."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Collection
from typing import Any

import torch
from accelerate.utils import is_compiled_module
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


SCHEDULER_LISTS = (
    *("base_lrs", "lr_lambdas", "_last_lr", "min_lrs", "max_lrs", "base_momentums", "max_momentums"),
    "_init_lrs",  # the `GreedyLR` of transformers
)
"""
What schedulers hold in lists with one entry for each group of the optimizer. Goes with a public call that
takes a group out of an optimizer.
"""


def inner_schedulers(scheduler: Any) -> tuple[Any, ...]:
    """The schedulers of a `SequentialLR` or `ChainedScheduler`: `_schedulers`, which has no other name."""
    return tuple(getattr(scheduler, "_schedulers", ()))


def forward_hooks(module: nn.Module) -> dict[int, Callable[..., Any]]:
    """
    The forward hooks of a module by the number in their handles, to be exchanged in place: `Module._forward_hooks`, in
    all versions. Goes with a way for a `RemovableHandle` to be switched off for a while, or one for transformers to
    tell and forget its hook (see [`is_input_gradient_hook`]).
    """
    return module._forward_hooks


def noted_structure(model: nn.Module) -> Callable[[], None]:
    """
    What puts the modules of a model, and the hooks on them, back to what they are now: `Module._modules` and the
    dictionaries of the four kinds of hooks, in all versions. Goes with public ways to take any child and hook away.
    """
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    noted = [
        (module, dict(module._modules), {k: set(getattr(module, k)) for k in kinds}) for module in model.modules()
    ]

    def put_back() -> None:
        for module, children, hooks in noted:
            module._modules.clear()
            module._modules.update(children)
            for kind, known in hooks.items():
                found = getattr(module, kind)
                for key in set(found) - known:
                    del found[key]

    return put_back


def saved_buffers(module: nn.Module) -> list[tuple[str, Tensor]]:
    """
    Those of a module's own buffers that are saved, with their names: what stands in `_buffers`, but not in
    `_non_persistent_buffers_set`. Goes when `named_buffers` tells them apart.
    """
    hidden = module._non_persistent_buffers_set
    return [(name, buffer) for name, buffer in module._buffers.items() if buffer is not None and name not in hidden]


def convolved(module: Any, inputs: Tensor, weight: Tensor) -> Tensor:
    """
    A convolution with the stride, padding and dilation of a module, by another weight: `_conv_forward` in all versions
    (seen in torch 2.13). The public functions do not know its padding mode.
    """
    found: Tensor = module._conv_forward(inputs, weight, None)
    return found


def is_compiled(module: nn.Module) -> bool:
    """
    Whether a module is compiled: made by `torch.compile`, or by its own `compile()`, which leaves
    `_compiled_call_impl`. Goes with a public property.
    """
    return is_compiled_module(module) or module._compiled_call_impl is not None


def uncompiled(module: Any) -> Any:
    """
    The module that `torch.compile` was given, by what it gave back: `_orig_mod`. Another module is itself. Goes with a
    public name.
    """
    return module._orig_mod if is_compiled_module(module) else module


def is_replica(module: nn.Module) -> bool:
    """Whether `nn.DataParallel` made a module: it sets `_is_replica`. Goes with `nn.DataParallel`."""
    return getattr(module, "_is_replica", False)


FSDP_GROUPS = ("_fsdp_param_groups", "_fsdp_param_group")
"""Where FSDP2 keeps what it gathers for a module: several groups in torch 2.13, one in 2.6. Goes with
[`remove_fsdp_parameters`]."""


def knows_fsdp2() -> bool:
    """Whether the FSDP2 of this torch has the names that [`remove_fsdp_parameters`] touches."""
    try:
        from torch.distributed.fsdp._fully_shard._fsdp_state import FSDPState
    except ImportError:
        return False
    state = FSDPState()
    return hasattr(getattr(state, "_state_ctx", None), "all_states") and any(hasattr(state, n) for n in FSDP_GROUPS)


def remove_fsdp_parameters(module: Any, gone: Collection[nn.Parameter], present: Collection[nn.Module]) -> None:
    """
    Take parameters that have left a model out of what FSDP2 gathers and scatters for one of its modules.

    FSDP2 collects them once, and has no public call for this; the names were run with torch 2.13 and read in torch
    2.6, for whose FSDP2 accelerate is too new (see [`knows_fsdp2`]). Goes with such a call.

    Args:
        module (`FSDPModule`): a module that was wrapped itself.
        gone (`Collection`): the sharded parameters that left the model.
        present (`Collection`): all modules of the model.
    """
    state = module._get_fsdp_state()
    found = next(getattr(state, name) for name in FSDP_GROUPS if hasattr(state, name))
    for group in found if isinstance(found, (list, tuple)) else [] if found is None else [found]:
        group.fsdp_params = [p for p in group.fsdp_params if p.sharded_param not in gone]
        for handles in (
            group._module_to_pre_save_state_dict_hook_handle,
            group._module_to_pre_load_state_dict_hook_handle,
        ):
            for other in [other for other in handles if other not in present]:
                handles.pop(other).remove()
    # A removed module may have been wrapped itself.
    states = state._state_ctx.all_states
    states[:] = [other for other in states if any(inner in present for inner in other._modules)]


class LiveBytes(TorchDispatchMode):
    """
    Follows the storages that operations make while they live, in the operations of the backward pass too.

    A `TorchDispatchMode` of `torch.utils._python_dispatch`, with `tree_leaves` of `torch.utils._pytree`; storages are
    told apart by `_cdata`. All of them in torch 2.6 to 2.13. It goes with a public count of memory on the CPU, such as
    `torch.cuda.max_memory_allocated` is on a GPU.

    Attributes:
        now (`int`): bytes of those that live.
        peak (`int`): the largest number of them so far.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: dict[int, weakref.ref] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        # What an operation was given was there before it, or is known: a view or an in-place result is not new memory.
        given = {_key(leaf) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and leaf.device.type != "meta" and _key(leaf) not in given:
                self._follow(leaf.untyped_storage())
        return result

    def _follow(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._known and self._known[key]() is not None:
            return

        def gone(_: weakref.ref) -> None:
            self.now -= size
            self._known.pop(key, None)

        self._known[key] = weakref.ref(storage, gone)
        self.now += size
        self.peak = max(self.peak, self.now)


def _key(tensor: Tensor) -> int:
    try:
        return int(tensor.untyped_storage()._cdata)
    except (NotImplementedError, RuntimeError):  # a tensor without a storage, such as a sparse one
        return id(tensor)
