"""The hooks by which the shortcuts of a layer act while it runs."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ...compat.peft import adapters_disabled
from ...compat.torch import is_replica
from ...compat.transformers import checkpoint_function, checkpoints, checkpoints_call, set_checkpoint_function
from .structure import ATTRIBUTE as ATTRIBUTE
from .structure import Parts


class _Live:
    """
    What the hooks of a layer note while it runs. Tensors of its own are held weakly: the layer holds them until its
    residual is added, and nothing is left over when a checkpointed layer is recomputed in part. Nothing of it is
    copied or pickled but whether the layer is pre-norm.
    """

    def __init__(self, pre: bool | None = None) -> None:
        self.pre = pre
        self.input: Any = None
        self.norm: tuple[Any, Any] | None = None
        self.join: str | None = None
        self.values: dict[str, Any] = {}
        self.previous: Tensor | None = None
        self.carried: Tensor | None = None
        self.recording = self.grad = self.bound = False
        self.checkpoint: Callable[..., Any] | None = None

    def __reduce__(self) -> Any:
        return _Live, (self.pre,)


@dataclass
class _Bound:
    """What one checkpoint keeps for a layer, and whether the layer has run, so that it runs again to be recomputed."""

    previous: Tensor | None
    grad: bool
    ran: bool = False


class LayerShortcuts(nn.Module):
    """
    The shortcuts of one layer, and the hooks by which they act. Registered on the layer, so that they move, train and
    are counted with it.

    Gradient checkpointing of transformers wraps a layer's `forward`: the hooks of the layer itself run once, those of
    its children again at the recomputation. So everything that a child's hook reads is noted by another child's hook
    of the same run, except what comes from the layer before, which is bound to the checkpointed function.

    Where it wraps `__call__` (see [`~diffora_trainer.compat.checkpoints_call`]), the hooks of the layer itself run
    again too, and the first of them is too late to bind anything. There it is bound by a hook of the module that holds
    the layers, before it runs.
    """

    def __init__(
        self,
        shortcuts: Mapping[str, nn.Module],
        config: Any,
        name: str,
        layer: nn.Module,
        parts: Parts,
        owner: nn.Module,
    ) -> None:
        super().__init__()
        self.config = config
        for kind, shortcut in shortcuts.items():
            self.add_module(kind, shortcut)
        self.kinds, self.name, self.live = tuple(shortcuts), name, _Live()
        self.parts = parts
        self.owner = (owner,)  # in a tuple, or the model would be a part of its own part
        self.before: tuple[LayerShortcuts, ...] = ()
        self.after = False
        first: list[tuple[nn.Module, Callable[..., Any]]] = [
            (layer, self._start),
            (parts.attention, self._enter_attention),
            (parts.enters, self._enter_feed_forward),
        ]
        last: list[tuple[nn.Module, Callable[..., Any]]] = []
        if parts.sums:
            first += [
                (norm, partial(self._read_sum, join))
                for norm, join in zip(parts.sums, ("attention", "ffn"), strict=True)
            ]
        else:
            first += [(norm, partial(self._read_sum, None)) for norm in parts.norms]
            last += [(norm, self._note_norm) for norm in parts.norms]
            last += [
                (parts.attention, partial(self._leave, "attention")),
                (parts.leaves, partial(self._leave, "ffn")),
            ]
        self.handles: list[RemovableHandle] = [
            *(module.register_forward_pre_hook(hook, with_kwargs=True) for module, hook in first),
            *(module.register_forward_hook(hook, with_kwargs=True) for module, hook in last),
            layer.register_forward_hook(self._end, with_kwargs=True, always_call=True),
        ]
        if checkpoints_call(layer):
            around = _holder(owner, layer)
            self.handles += [
                around.register_forward_pre_hook(partial(self._bind, layer)),
                around.register_forward_hook(partial(self._unbind, layer), always_call=True),
            ]

    @property
    def _off(self) -> bool:
        # The adapters of the `PeftModel` are switched off to have the base model, say as the reference of DPO.
        return adapters_disabled(self.owner[0])

    def _acts(self, kind: str) -> bool:
        return kind in self.kinds and getattr(self, kind).enabled and not self._off

    def _start(self, layer: Any, args: Any, kwargs: Any) -> None:
        if is_replica(layer):
            raise RuntimeError(
                "Shortcuts do not work under `nn.DataParallel`. Please use one process for each device."
            )
        live = self.live
        live.input = _first(args, kwargs)
        if live.bound:
            return
        live.grad, live.recording = torch.is_grad_enabled(), self.after
        if "shortcut2" not in self.kinds:
            return
        live.previous = self._take_previous()
        if checkpoints(layer) and layer.training and live.checkpoint is None:
            if checkpoints_call(layer):
                raise RuntimeError(
                    f"{self.name!r} has a shortcut from the layer before it and checkpoints its activations, but was "
                    "called without the module that holds the layers. Please call the model, or leave `shortcut2` out."
                )
            original, previous = checkpoint_function(layer), live.previous
            live.checkpoint = original
            set_checkpoint_function(
                layer, lambda function, *args: original(partial(self._with_previous, previous, function), *args)
            )

    def _take_previous(self) -> Tensor:
        noted = self.before[0].live
        previous, noted.carried = noted.carried, None
        if previous is None:
            raise RuntimeError(
                f"{self.name!r} has a shortcut from the layer before it, which did not run just before it. Layers "
                "cannot be skipped, and of gradient checkpointing only that of transformers is supported."
            )
        return previous

    def _bind(self, layer: Any, *args: Any) -> None:
        """Before the layers run: let a checkpoint around the hooks of this one keep what comes from outside of it."""
        live = self.live
        crosses = self.after or "shortcut2" in self.kinds
        if not crosses or not checkpoints(layer) or not layer.training or live.checkpoint is not None:
            return
        original = live.checkpoint = checkpoint_function(layer)

        def checkpoint(function: Callable[..., Any], *args: Any) -> Any:
            previous = self._take_previous() if "shortcut2" in self.kinds else None
            return original(partial(self._run, _Bound(previous, torch.is_grad_enabled()), function), *args)

        set_checkpoint_function(layer, checkpoint)

    def _unbind(self, layer: Any, *args: Any) -> None:
        if self.live.checkpoint is not None:
            set_checkpoint_function(layer, self.live.checkpoint)
            self.live.checkpoint = None

    def _run(self, bound: _Bound, function: Callable[..., Any], *args: Any) -> Any:
        live = self.live
        live.previous, live.grad = bound.previous, bound.grad
        live.recording, bound.ran = self.after and not bound.ran, True
        live.bound = True
        try:
            return function(*args)
        finally:
            live.bound = False

    def _with_previous(self, previous: Tensor, function: Callable[..., Any], *args: Any) -> Any:
        self.live.previous = previous
        return function(*args)

    def _end(self, layer: Any, args: Any, kwargs: Any, output: Any) -> Any:
        live = self.live
        if live.checkpoint is not None:
            set_checkpoint_function(layer, live.checkpoint)
        value = live.input
        live.input = live.norm = live.join = live.previous = live.checkpoint = None
        live.values, live.recording = {}, False
        if output is None or not self._acts("shortcut1"):  # None: the layer has failed
            return None
        return _added(output, self.get_submodule("shortcut1")(value))

    def _note_norm(self, norm: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        self.live.norm = weakref.ref(_first(args, kwargs)), weakref.ref(output)

    def _residual(self, value: Tensor, join: str) -> None:
        # What the residual around this block carries: in a pre-norm layer, what the norm before the block has read.
        live = self.live
        norm, live.norm, live.join = live.norm, None, None
        normed = norm is not None and norm[1]() is value
        if join == "attention":
            if live.pre is None and not normed and value is not live.input:
                raise ValueError(
                    f"In {self.name!r} the attention reads neither the layer's input nor a norm of it, so it is not "
                    "known what its residual is. Please leave out the shortcuts for this model."
                )
            live.pre = normed if live.pre is None else live.pre
        if live.pre and not normed:
            raise RuntimeError(f"In {self.name!r} the {join} no longer reads what the norm before it gives.")
        source = norm[0]() if live.pre and norm is not None else value
        live.values[join] = weakref.ref(source)
        if join == "ffn" and live.recording:
            if live.grad and not torch.is_grad_enabled():
                raise ValueError(
                    "Reentrant gradient checkpointing cuts the gradient of `shortcut2` to the layer before. Please "
                    "set `gradient_checkpointing_kwargs={'use_reentrant': False}`."
                )
            live.carried = source

    def _enter_attention(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        self._residual(_first(args, kwargs), "attention")

    def _enter_feed_forward(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        self._residual(_first(args, kwargs), "ffn")

    def _leave(self, join: str, module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        if not self.live.pre:  # the norm that comes next reads the sum
            self.live.join = join
            return None
        return self._joined(join, output)

    def _read_sum(self, join: str | None, norm: nn.Module, args: Any, kwargs: Any) -> Any:
        join, self.live.join = join or self.live.join, None
        if join is None:
            return None
        return (self._joined(join, _first(args, kwargs)), *args[1:]), {} if not args else kwargs

    def _joined(self, join: str, output: Any) -> Any:
        live = self.live
        found = live.values.pop(join)()
        deltas = []
        kind = "residual1" if join == "attention" else "residual2"
        if self._acts(kind):
            if found is None:
                raise RuntimeError(f"In {self.name!r} the residual of the {join} was gone before it was added.")
            deltas.append(self.get_submodule(kind)(found))
        if join == "attention" and self._acts("shortcut2"):
            if live.previous is None:
                raise RuntimeError(
                    f"{self.name!r} is recomputed without what its shortcut from the layer before read. Of gradient "
                    "checkpointing only that of transformers is supported with `shortcut2`."
                )
            deltas.append(self.get_submodule("shortcut2")(live.previous))
        if join == "attention":
            live.previous = None
        for delta in deltas:
            output = _added(output, delta)
        return output


def _holder(model: nn.Module, layer: nn.Module) -> nn.Module:
    """The module of a model that holds the list of a layer."""
    stack = next(m for m in model.modules() if isinstance(m, nn.ModuleList) and any(each is layer for each in m))
    return next(module for module in model.modules() if any(child is stack for child in module.children()))


def _first(args: Any, kwargs: Any) -> Tensor:
    value = args[0] if args else kwargs["hidden_states"] if "hidden_states" in kwargs else next(iter(kwargs.values()))
    return value


def _added(output: Any, delta: Tensor) -> Any:
    if not isinstance(output, Tensor):
        return (_added(output[0], delta), *output[1:])
    return output + delta.to(output.dtype).reshape(output.shape)  # OPT flattens the tokens for its feed-forward
