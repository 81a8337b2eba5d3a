"""
How deep a backward pass goes: down to the lowest module that is trained, and no further.

With activation checkpointing transformers, TRL and PEFT put a forward hook on the input embeddings that makes their
output require a gradient. Reentrant checkpointing would not train without it, but it carries every backward pass
through all layers, also where nothing is trained. Non-reentrant checkpointing, the only kind that a search
runs with, gives the parameters inside of a checkpointed layer their gradient either way, and so do embeddings that
are trained themselves (`modules_to_save`, `trainable_token_indices`) or prompts put before them: they are parameters.

The feature extractors of speech models do the same with their input, in training mode.

So these hooks are suspended where nothing needs them, and so is what an extractor does that is not trained. A
suspended hook keeps its place and its handle, and does nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from ..compat.torch import forward_hooks
from ..compat.transformers import (
    ask_for_input_gradients,
    asks_for_input_gradients,
    checkpoints,
    checkpoints_without_reentry,
    is_input_gradient_hook,
    own_input_embeddings,
)


_SUSPENDED = "diffora_suspended"
"""An attribute of an extractor that was suspended."""


class _Suspended:
    """Stands in the place of a hook, which it keeps."""

    def __init__(self, hook: Callable[..., Any]) -> None:
        self.hook = hook

    def __call__(self, *args: Any) -> None:
        """Nothing."""


def suspend_input_gradients(model: nn.Module) -> list[nn.Module]:
    """
    Suspend what makes the output of a model's embeddings, or the input of its feature extractor, require a gradient.
    If something needs that it is left as it is, and what was suspended before acts again.

    Returns:
        `list[nn.Module]`: the modules on which something was suspended by this call.
    """
    if _needs_input_gradients(model):
        restore_input_gradients(model)
        return []
    found = [module for module in model.modules() if _active(module) or _extracts_untrained(module)]
    for module in found:
        _suspend(module)
    return found


def restore_input_gradients(model: nn.Module) -> None:
    """Let all suspended hooks of a model act again."""
    for module in model.modules():
        _restore(module)


@contextmanager
def without_input_gradients(model: nn.Module) -> Iterator[None]:
    """Suspend the hooks of a model for a while. Those that were suspended before stay so."""
    suspended = suspend_input_gradients(model)
    try:
        yield
    finally:
        for module in suspended:
            _restore(module)


def keep_suspended(model: nn.Module) -> list[RemovableHandle]:
    """
    Suspend the hooks of a model, and any that comes while it is trained: TRL switches checkpointing off for the
    reference's forward pass of DPO and for generation, and with each switching on again transformers adds a hook.

    Returns:
        `list[RemovableHandle]`: what ends this when it is removed; nothing for a model without checkpointing.
    """
    suspend_input_gradients(model)
    if not any(checkpoints(module) for module in model.modules()):
        return []

    def look(embeddings: nn.Module, args: Any) -> None:
        # The way of checkpointing may have changed too, so what needs the hooks is asked again, where there is one.
        if _active(embeddings) and not _needs_input_gradients(model):
            _suspend(embeddings)

    return [embeddings.register_forward_pre_hook(look) for embeddings in input_embeddings(model)]


def input_embeddings(model: nn.Module) -> list[nn.Module]:
    """The input embeddings of a model and of all models inside it, such as a vision tower."""
    found = map(own_input_embeddings, model.modules())
    return list(dict.fromkeys(embeddings for embeddings in found if embeddings is not None))


def check_backward_ends_early(model: nn.Module, searched: Collection[nn.Parameter]) -> None:
    """
    Raise a `ValueError` if the backward pass of a model goes through all layers, whatever is kept.

    Args:
        model (`nn.Module`): the model.
        searched (`Collection[nn.Parameter]`): the parameters that may be pruned.
    """
    embeddings = {p for module in input_embeddings(model) for p in module.parameters() if p.requires_grad}
    embeddings -= set(searched)
    if trained := [name for name, parameter in model.named_parameters() if parameter in embeddings]:
        raise ValueError(
            f"You limit a step (`max_step_time`, `max_step_memory`) of a model whose input embeddings are trained "
            f"({trained[0]!r}), so each backward pass goes through all layers down to them, and no choice of modules "
            "makes it shorter. Please leave the limit out, or the embeddings out of `modules_to_save` and "
            "`trainable_token_indices`."
        )


def _needs_input_gradients(model: nn.Module) -> bool:
    """Whether some part of a model may be checkpointed in the reentrant way."""
    blocks = [module for module in model.modules() if checkpoints(module)]
    if blocks:
        return not all(map(checkpoints_without_reentry, blocks))
    # transformers marks what it checkpoints. How another's model does it, if it does, cannot be known.
    return not any(isinstance(module, PreTrainedModel) for module in model.modules())


def _extracts_untrained(module: nn.Module) -> bool:
    return asks_for_input_gradients(module) and not any(weight.requires_grad for weight in module.parameters())


def _active(module: nn.Module) -> list[int]:
    return [key for key, hook in forward_hooks(module).items() if is_input_gradient_hook(hook)]


def _suspend(module: nn.Module) -> None:
    hooks = forward_hooks(module)
    active = _active(module)
    # transformers keeps the handle of the last one alone. The older ones would only pile up, one a training step.
    for key in [key for key, hook in hooks.items() if isinstance(hook, _Suspended)]:
        del hooks[key]
    for key in active:
        hooks[key] = _Suspended(hooks[key])
    if _extracts_untrained(module):
        ask_for_input_gradients(module, False)
        setattr(module, _SUSPENDED, True)


def _restore(module: nn.Module) -> None:
    hooks = forward_hooks(module)
    for key, hook in hooks.items():
        if isinstance(hook, _Suspended):
            hooks[key] = hook.hook
    if vars(module).pop(_SUSPENDED, False):
        ask_for_input_gradients(module, True)
