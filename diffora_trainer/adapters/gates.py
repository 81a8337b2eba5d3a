"""Gates on the sites of a live model: attach and detach, and see the model as if it were pruned."""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from ..compat.transformers import checkpoint_function, checkpoints
from ..core.components import Components
from .backward import without_input_gradients
from .base import AdapterSite, Handle
from .compiled import drop_graphs


_ACTIVE: weakref.WeakSet[Gates] = weakref.WeakSet()
"""Gates that are attached, or will be from the next step on."""


def gates_active(model: nn.Module) -> bool:
    """Whether gates act on a model, or will from the next step on: until its modules are pruned."""
    found = [gates._modules[0] for gates in _ACTIVE]
    return bool(found) and any(module is other for module in model.modules() for other in found)


class Gates:
    """
    Multiplies the output of a module of each site by a gate. That is exact, since nothing but the up-projection, which
    has no bias, follows; a site for which that does not hold says where a gate acts (see [`AdapterSite.attach`]).

    The gates are plain tensors held here, not on the tuner layer, because PEFT saves whatever is registered there.
    Which of two vectors applies is read from the module's own mode, training or evaluation. A gate is a number for all
    outputs of a module, or, where single components are chosen, a vector with a number for each.

    Of a compiled model they are inputs of its graphs, which PyTorch does not trace anew when an open gate gets a
    value: it guards nothing that it finds through a hook. So there an open gate is one of value 1, which changes no
    bit, and the graphs are dropped when gates come, go, or multiply the components of other adapters than before.

    Args:
        sites (`Sequence[AdapterSite]`): the sites, in the order of the grid.
        compiled (`bool`, *optional*, defaults to `False`): whether training steps run a compiled model.
    """

    def __init__(self, sites: Sequence[AdapterSite], compiled: bool = False) -> None:
        other = [site for site in sites if not site.scales_gated]
        if compiled and other:
            raise ValueError(
                f"You asked for `torch_compile`, but the adapter of {other[0].name!r} ({type(other[0]).__name__}) is "
                "gated in a way that was not tested with compiled models. Please train without compilation, or use "
                "plain LoRA or DoRA."
            )
        self._sites = sites
        self._modules = [site.gated for site in sites]
        self._compiled = compiled
        self._handles: list[Handle] = []
        self._training: Sequence[Tensor] | None = None
        self._evaluation: Sequence[Tensor] | None = None
        self._masks: list[Tensor | None] = [None] * len(self._modules)
        self._components: Components | None = None

    def __len__(self) -> int:
        return len(self._modules if self._components is None else self._components)

    def give_each_component_one(self, components: Components) -> None:
        """Have a gate for each of some components, `(m,)`, instead of one for each site, `(n,)`."""
        self._components = components

    @property
    def device(self) -> torch.device:
        """Where the gates are applied; the first module's device in a model spread over several."""
        first = self._modules[0]  # also when it was pruned
        return next(chain(first.parameters(), first.buffers())).device

    @property
    def attached(self) -> bool:
        """Whether the gates act on the model."""
        return bool(self._handles)

    def announce(self) -> None:
        """Tell [`gates_active`] of them ahead of [`attach`]: a training schedule may be asked before a run begins."""
        _ACTIVE.add(self)

    def attach(self) -> None:
        """Let the gates act. Until values are set they change nothing."""
        if not self._handles:
            self._handles = [site.attach(partial(self._scale, index)) for index, site in enumerate(self._sites)]
            _ACTIVE.add(self)
            if self._training is None:
                self.set_training(None)
            if self._evaluation is None:
                self.set_evaluation(None)
            self.set_masks(self._masks)  # where the model is by now
            self._changed()

    def detach(self) -> None:
        """Remove every trace of the gates from the model."""
        if self._handles:
            self._changed()
        for handle in self._handles:
            handle.remove()
        self._handles = []
        _ACTIVE.discard(self)

    def set_training(self, values: Tensor | None) -> None:
        """Set the gates of training, `(n,)`, or leave them open."""
        self._training = self._split(self._ones() if values is None and self._compiled else values)

    def set_evaluation(self, values: Tensor | None) -> None:
        """Set the gates of evaluation, `(n,)`, or leave them open."""
        self._evaluation = self._split(self._ones() if values is None and self._compiled else values)

    def set_masks(self, masks: Sequence[Tensor | None]) -> None:
        """
        Multiply the components of each adapter. One behind a 0 has no effect and no gradient, so that a run is that of
        an adapter of a smaller rank.

        Args:
            masks (`Sequence[Tensor or None]` of length `n`): a number for each output of what is gated, `(r,)`, or
                nothing.
        """
        before = [mask is None for mask in self._masks]
        self._masks = [None if mask is None else mask.to(self.device) for mask in masks]
        if before != [mask is None for mask in masks]:
            self._changed()

    @contextmanager
    def override(self, values: Tensor | None) -> Iterator[None]:
        """
        Use these gates, `(n,)`, in either mode, or open ones; gradients flow into them.

        Raises:
            ValueError: if there are values and the gates are not on the model, where these would change nothing.
        """
        if values is not None:
            self.check_attached()
        before = self._training, self._evaluation
        self._training = self._evaluation = self._split(values)
        try:
            yield
        finally:
            self._training, self._evaluation = before

    @contextmanager
    def masked(self, masks: Sequence[Tensor | None]) -> Iterator[None]:
        """
        Multiply the components of each adapter for a while, as [`set_masks`] does.

        Raises:
            ValueError: if the gates are not on the model, where this would change nothing.
        """
        self.check_attached()
        before = self._masks
        self.set_masks(masks)
        try:
            yield
        finally:
            self.set_masks(before)

    def check_attached(self) -> None:
        """Raise a `ValueError` if the gates are not on the model, where no value of theirs has an effect."""
        if not self.attached:
            raise ValueError(
                "The gates of this search are not on the model, so nothing can be measured under them, and setting "
                "them changes nothing. Please call its `begin()` first (a run does so in its first `before_step()`); "
                "after `finish()` and after the pruning they are gone."
            )

    def _changed(self) -> None:
        if self._compiled:
            drop_graphs()

    def _ones(self) -> Tensor:
        return torch.ones(len(self), dtype=torch.float32)

    def _split(self, values: Tensor | None) -> Sequence[Tensor] | None:
        if values is None:
            return None
        values = values.to(self.device, torch.float32)
        if self._components is not None:
            return self._components.expand(values)
        # One `unbind`, not n indexings: the backward of each indexing would fill a vector of n zeros.
        return values.unbind()

    def _scale(self, index: int, module: nn.Module, args: Any, output: Tensor) -> Tensor | None:
        values, mask = self._training if module.training else self._evaluation, self._masks[index]
        if mask is not None:
            if mask.device != output.device:
                mask = self._masks[index] = mask.to(output.device)
            if mask.requires_grad:  # its gradient is a sum over all tokens
                wide = torch.promote_types(output.dtype, torch.float32)
                output = (output.to(wide) * mask).to(output.dtype)
            else:
                output = output * mask.to(output.dtype)
        if values is None:
            return None if mask is None else output
        gate = values[index]
        if gate.device != output.device:  # a model spread over several devices
            gate = gate.to(output.device)
        # In float32 at least: neither the gate nor its gradient, a sum over all tokens, is rounded to half precision.
        wide = torch.promote_types(output.dtype, torch.float32)
        return (output.to(wide) * gate).to(output.dtype)


@contextmanager
def disabled(sites: Iterable[AdapterSite]) -> Any:
    """For a while, some sites take no part in their model. Those that took none before go on to take none."""
    switched = [site for site in sites if site.enabled]
    try:
        for site in switched:
            site.enabled = False
        yield
    finally:
        for site in switched:
            site.enabled = True


@contextmanager
def pruned_view(model: nn.Module, sites: Sequence[AdapterSite], kept: Sequence[int]) -> Iterator[None]:
    """
    For a while, let a model compute what it would after all sites but some were pruned.

    Args:
        model (`PeftModel`): the model.
        sites (`Sequence[AdapterSite]`): its sites.
        kept (`Sequence[int]`): indices of those that are kept.
    """
    wanted = set(kept)
    with disabled(site for index, site in enumerate(sites) if index not in wanted), without_input_gradients(model):
        yield


def checkpoints_activations(model: nn.Module) -> bool:
    """
    Whether a model checkpoints activations. The reentrant way is refused: its backward pass gives no gradient of the
    gates, and none is not told from zero as long as a module outside the checkpointed blocks has one.
    """
    blocks = [module for module in model.modules() if checkpoints(module)]
    # A tool may have put a function of its own around what transformers checkpoints with, as LLaMA-Factory does.
    for function in {id(found): found for found in map(inspect.unwrap, map(checkpoint_function, blocks))}.values():
        if not isinstance(function, partial):
            continue
        # Reentrant is also what PyTorch takes when nothing is said, as in `prepare_model_for_kbit_training(model)`.
        if function.keywords.get("use_reentrant") is not False or _is_reentrant(function):
            raise ValueError(
                f"The model checkpoints activations with {function.keywords or 'no arguments'}, which here is the "
                "reentrant way: its backward pass cannot give the gradient of the gates alone. Please pass "
                "`gradient_checkpointing_kwargs={'use_reentrant': False}` to `gradient_checkpointing_enable`, to "
                "`prepare_model_for_kbit_training` or in the training arguments, wherever it was switched on; in "
                "LLaMA-Factory `use_reentrant_gc: false`."
            )
    return bool(blocks)


def _is_reentrant(function: Callable[..., Any]) -> bool:
    """
    Whether a checkpointing function takes the reentrant way, found by trying it: ms-swift puts a function in the place
    of `torch.utils.checkpoint.checkpoint` that does so whatever it is told.
    """

    # PyTorch hands arguments that it does not know to the function, such as TRL's `selective`.
    def tanh(states: Tensor, **kwargs: Any) -> Tensor:
        return torch.tanh(states)

    with torch.enable_grad():
        tried = function(tanh, torch.zeros(1, requires_grad=True))
    return "Tanh" not in type(tried.grad_fn).__name__  # but the name of a function around it
