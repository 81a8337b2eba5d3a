"""Training steps in micro-batches while all modules are there."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..compat.transformers import prepare_inputs
from ..compat.trl import loss_is_of_rows, makes_completions, own_training_step
from ..core.isolation import replaced
from ..search.search import ArchitectureSearch
from .loss import preserved_bookkeeping


if TYPE_CHECKING:
    from .types import SearchingTrainer


Step = Callable[..., Tensor]


def can_split(trainer: SearchingTrainer) -> bool:
    """Whether a trainer takes the loss of a batch by its `compute_loss`, row by row as far as is known of it."""
    return own_training_step(trainer) is None and not makes_completions(trainer) and loss_is_of_rows(trainer)


def step_in_micro_batches(
    trainer: SearchingTrainer,
    search: ArchitectureSearch,
    step: Step,
    model: nn.Module,
    inputs: Any,
    *args: Any,
    **kwargs: Any,
) -> Tensor:
    """
    A training step of a trainer, one micro-batch after the other. The gradients add up to those of the whole batch;
    several processes exchange them once, after the last one.

    Args:
        trainer (`Trainer`): the trainer.
        search ([`ArchitectureSearch`]): its search, which knows into how many parts a batch is split.
        step (`Callable`): the parent's `training_step`.
        model (`nn.Module`): the model as it is wrapped for training.
        inputs (`dict`): the training batch.
        *args, **kwargs: what else the step is given: the number of items of the whole batch.

    Returns:
        `Tensor`: the loss of the whole batch, detached.

    Raises:
        ValueError: if micro-batches were asked for, and the loss of this trainer does not come apart into theirs.
    """
    items = args[0] if args else kwargs.get("num_items_in_batch")

    def loss_of(part: Any) -> float:
        # On the model that is not wrapped, so that processes need not wait for each other.
        with search.side_effect_free(training=False), torch.no_grad(), preserved_bookkeeping(trainer):
            with trainer.compute_loss_context_manager():
                prepared = dict(prepare_inputs(trainer, part))
                loss: Any = trainer.compute_loss(trainer.model, prepared, num_items_in_batch=items)
                return float(loss)  # a tuple only where outputs are asked for

    parts = search.training_micro_batches.split(inputs, loss_of)
    if len(parts) == 1:
        return step(model, inputs, *args, **kwargs)
    losses = []
    whole_loss = trainer.compute_loss
    for number, (part, factor) in enumerate(parts, start=1):
        scaled = lambda *a, factor=factor, **k: _scale(whole_loss(*a, **k), factor)  # noqa: E731
        last = number == len(parts)
        with replaced(trainer, "compute_loss", scaled), nullcontext() if last else trainer.accelerator.no_sync(model):
            losses.append(step(model, part, *args, **kwargs))
    return torch.stack(losses).sum()


def _scale(loss: Any, factor: float) -> Any:
    if factor == 1.0:
        return loss
    return (loss[0] * factor, *loss[1:]) if isinstance(loss, tuple) else loss * factor
