"""
Every private or version-dependent name of transformers, TRL, PEFT, accelerate and torch that this package touches.

Each entry is one small function or constant. Its docstring says which name it reads, in which versions that name is
there or differs, and what would let the entry go. Nothing else of this package may name a version or read a private
name of these libraries.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from types import CodeType
from typing import Any

from torch import Tensor, nn

from .isolation import replaced


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


# TRL: trainers whose training step is not "prepare the batch, take `compute_loss` of it"


def makes_completions(trainer: Any) -> bool:
    """
    Whether a trainer makes the completions that it trains on while it prepares a batch, so that a row of its training
    set is only a prompt.

    Told by its structure, since TRL has no mark for it: a class before [`~transformers.Trainer`] overrides
    `_prepare_inputs`, in which TRL 0.28 to 1.16 generate, and the trainer has `_buffered_inputs`, `num_generations` or
    `reward_funcs`. That holds for GRPO, RLOO and distillation, and in TRL's `experimental` for what is derived from
    them, SDPO, SDFT, A2PO and GOLD. A public hook of TRL that is given each training batch would let it go.
    """
    from transformers import Trainer  # not above: a search without a Trainer need not wait for it

    classes = type(trainer).__mro__
    overridden = any("_prepare_inputs" in vars(cls) for cls in classes[: classes.index(Trainer)] if not _is_ours(cls))
    return overridden and any(
        hasattr(trainer, name) for name in ("_buffered_inputs", "num_generations", "reward_funcs")
    )


def noted_preparation(trainer: Any, note: Callable[[Any], None]) -> AbstractContextManager[None]:
    """
    For a while, hand what a trainer's `_prepare_inputs` returns to a function as well, with all that subclasses do to
    it. `Trainer.training_step` calls it in transformers 5.2 to 5.23. See [`makes_completions`] for what would let it
    go.
    """
    prepare = trainer._prepare_inputs

    def prepare_and_note(inputs: Any) -> Any:
        prepared = prepare(inputs)
        note(prepared)
        return prepared

    return replaced(trainer, "_prepare_inputs", prepare_and_note)


def uses_vllm(trainer: Any) -> bool:
    """Whether a trainer generates with vLLM (`use_vllm`, in TRL 0.28 to 1.16)."""
    return bool(getattr(trainer.args, "use_vllm", False))


def own_training_step(trainer: Any) -> Callable[..., Any] | None:
    """
    The `training_step` of a trainer that takes its loss there and not in `compute_loss`, or `None`.

    Read from the names that the function uses, since nothing else tells: neither `compute_loss` nor the parent's
    `training_step`. In TRL 0.28 to 1.16 that is OnlineDPO, in 0.28 also XPO and NashMD. A method for the loss in these
    trainers would let it go.
    """
    from transformers import Trainer

    for cls in type(trainer).__mro__:
        step = vars(cls).get("training_step")
        if cls is Trainer:
            return None
        if step is None or _is_ours(cls):
            continue
        names = _names(inspect.unwrap(step))
        if "compute_loss" in names:
            return None
        if "training_step" not in names:
            return step
    return None


def calls_backward_itself(step: Callable[..., Any]) -> bool:
    """Whether a `training_step` takes its gradient without [`~accelerate.Accelerator`]'s `backward`."""
    names = _names(inspect.unwrap(step))
    return "backward" in names and "accelerator" not in names


def loss_of_training_step(trainer: Any, model: nn.Module, inputs: Any) -> Tensor | None:
    """
    The loss that a trainer's `training_step` hands to `accelerator.backward`, whose place this takes for the call; of
    several the sum, of none `None`. The model stays in the mode that it is in, whatever the step sets.

    All Trainers of transformers 5.2 to 5.23 and TRL 0.28 to 1.16 take their gradient so. See [`own_training_step`] for
    what would let it go.
    """
    losses: list[Tensor] = []
    with (
        replaced(trainer.accelerator, "backward", lambda loss, **kwargs: losses.append(loss)),
        replaced(model, "train", lambda mode=True: model),
    ):
        trainer.training_step(model, inputs, None)
    return None if not losses else sum(losses[1:], losses[0])


def _is_ours(cls: type) -> bool:
    return cls.__module__.partition(".")[0] == __name__.partition(".")[0]


def _names(function: Any) -> set[str]:
    """Names of attributes and globals that a function uses, with the functions defined in it."""
    codes: list[Any] = [getattr(function, "__code__", None)]
    names: set[str] = set()
    while codes:
        code = codes.pop()
        if isinstance(code, CodeType):
            names.update(code.co_names)
            codes.extend(code.co_consts)
    return names
