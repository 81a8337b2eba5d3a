"""The places of a layer where a shortcut reads and adds: found by structure, and reached by hooks."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ...compat import (
    adapters_disabled,
    checkpoint_function,
    checkpoints,
    checkpoints_call,
    is_replica,
    set_checkpoint_function,
)
from ...core.selection import sanitize


ATTRIBUTE = "diffora_shortcuts"
"""Name under which the shortcuts of a layer are registered on it."""


@dataclass(frozen=True)
class Parts:
    """
    Where a layer is entered and joined: its attention, the first and last module of its feed-forward, the norms that
    are its own children, and for BERT's kind the norms inside its output modules, which read the sums.
    """

    attention: nn.Module
    enters: nn.Module
    leaves: nn.Module
    norms: tuple[nn.Module, ...]
    sums: tuple[nn.Module, ...]
    width: int


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


def plan_layers(
    model: nn.Module, kinds: Sequence[str], names: Collection[str] | None = None
) -> list[tuple[str, nn.Module, Parts, tuple[str, ...]]]:
    """
    The layers with their names, their parts and the kinds that they get: all of `kinds`, or the named ones of them.
    """
    plan = []
    for stack, layers in _stacks(model):
        for index, layer in enumerate(layers):
            name = f"{stack}.{index}"
            possible = (kind for kind in kinds if index or kind != "shortcut2")
            given = tuple(kind for kind in possible if names is None or f"{name}.{kind}" in names)
            plan.append((name, layer, _parts(name, layer, "shortcut2" in kinds), given))
    if not any(given for *_, given in plan):
        raise ValueError(
            f"{type(model).__name__} has no place for shortcuts of the kinds {list(kinds)}: it has "
            f"{len(plan)} numbered layers with attention, and the first has no layer before it."
        )
    if unknown := sorted(set(names or ()) - {f"{name}.{kind}" for name, *_, given in plan for kind in given}):
        raise ValueError(
            f"{type(model).__name__} has no place for {len(unknown)} of the shortcuts that are named, such as "
            f"{sanitize(repr(unknown[0]))}. Please use the model that they were chosen in."
        )
    return plan


def _stacks(model: nn.Module) -> Iterator[tuple[str, nn.ModuleList]]:
    """The outermost lists of layers that all hold attention."""
    done: list[str] = []
    for name, module in model.named_modules():
        if not isinstance(module, nn.ModuleList) or any(name.startswith(f"{outer}.") for outer in done):
            continue
        if len(module) and all(any(_is(m, "Attention") for m in layer.modules()) for layer in module):
            done.append(name)
            yield name.removeprefix("base_model.model."), module


def _is(module: nn.Module, *words: str) -> bool:
    return any(word in type(module).__name__ for word in words)


def _parts(name: str, layer: nn.Module, crosses: bool) -> Parts:
    children = {key: child for key, child in layer.named_children() if key != ATTRIBUTE}
    attentions = [child for child in children.values() if _is(child, "Attention")]
    norms = tuple(child for child in children.values() if _is(child, "Norm"))
    ffns = [c for k, c in children.items() if k == "mlp" or _is(c, "MLP", "FeedForward", "FFN", "SparseMoe")]
    parts = None
    if len(attentions) == 1:
        if len(norms) == 2 and len(ffns) == 1:
            parts = Parts(attentions[0], ffns[0], ffns[0], norms, (), _width(norms[0]))
        elif len(norms) == 2 and not ffns and {"fc1", "fc2"} <= set(children):
            parts = Parts(attentions[0], children["fc1"], children["fc2"], norms, (), _width(norms[0]))
        elif len(norms) == 2 and not ffns and {"intermediate", "output"} <= set(children):
            # A ViT whose `output` makes the addition: what is added to the sum is added to what it sums.
            parts = Parts(attentions[0], children["intermediate"], children["output"], norms, (), _width(norms[0]))
        elif not norms and not ffns and {"intermediate", "output"} <= set(children):
            outputs = [dict(attentions[0].named_children()).get("output"), children["output"]]
            inner = [[] if o is None else [m for m in o.children() if _is(m, "Norm")] for o in outputs]
            if all(len(found) == 1 for found in inner):
                sums = (inner[0][0], inner[1][0])
                parts = Parts(attentions[0], children["intermediate"], children["output"], (), sums, _width(sums[0]))
    if parts is None or not parts.width:
        found = ", ".join(f"{key} ({type(child).__name__})" for key, child in children.items())
        raise ValueError(
            f"The structure of the layer {name!r} ({type(layer).__name__}) is not understood. Its children are "
            f"{found}. Shortcuts need one attention, one feed-forward (`mlp`, `fc1` and `fc2`, or `intermediate` and "
            "`output`) and one norm for each of the two; cross-attention and more norms are not supported."
        )
    if crosses and getattr(layer, "chunk_size_feed_forward", None):
        raise ValueError(
            f"The layer {name!r} computes its feed-forward in chunks (`chunk_size_feed_forward`), so `shortcut2` "
            "would read the last one only. Please set it to 0, or leave `shortcut2` out of `kinds`."
        )
    return parts


def _width(norm: nn.Module) -> int:
    shape: Any = getattr(norm, "normalized_shape", None) or getattr(getattr(norm, "weight", None), "shape", ())
    return int(shape[-1]) if len(shape) == 1 else 0
