"""
Every private or version-dependent name of transformers, TRL, PEFT, accelerate and torch that this package touches.

Each entry is one small function or constant. Its docstring says which name it reads, in which versions that name is
there or differs, and what would let the entry go. Nothing else of this package may name a version or read a private
name of these libraries.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import nn


# torch


def forward_hooks(module: nn.Module) -> dict[int, Callable[..., Any]]:
    """
    The forward hooks of a module by the number in their handles, to be exchanged in place: `Module._forward_hooks`.

    In all versions up to torch 2.13. What would let this go: a way for a `RemovableHandle` to be switched off for a
    while, or one for transformers to tell and forget its hook (see [`is_input_gradient_hook`]).
    """
    return module._forward_hooks


# transformers, PEFT, TRL: activation checkpointing


def is_input_gradient_hook(hook: Callable[..., Any]) -> bool:
    """
    Whether a forward hook is the one that makes the output of the embeddings require a gradient.

    It is a local function in each library, known by its name alone: `make_inputs_require_grads` in
    `PreTrainedModel.enable_input_require_grads` (transformers 5.2 to 5.23), `make_inputs_require_grad` in PEFT (0.18
    to 0.21) and TRL (0.28 to 1.16). `disable_input_require_grads` is not enough: it knows only the last hook of
    transformers, which adds one at each call. What would let this go: reentrant checkpointing leaving transformers, or
    the libraries not asking for the hook where checkpointing is not reentrant.
    """
    return getattr(hook, "__name__", None) in ("make_inputs_require_grads", "make_inputs_require_grad")


def checkpoints_without_reentry(block: nn.Module) -> bool:
    """
    Whether a module with `gradient_checkpointing=True` is known to checkpoint in the non-reentrant way: transformers
    keeps `partial(torch.utils.checkpoint.checkpoint, use_reentrant=False)` in its `_gradient_checkpointing_func`
    (transformers 5.2 to 5.23, where `offload` puts another function into the partial). A module of someone else's may
    have none, or one of its own. What would let this go: a public record of the arguments on the model.
    """
    function = getattr(block, "_gradient_checkpointing_func", None)
    return isinstance(function, partial) and function.keywords.get("use_reentrant") is False
