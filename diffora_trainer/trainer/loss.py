"""The loss of an architecture step, as a trainer computes it, without a trace in its metrics."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from accelerate import Accelerator
from torch import Tensor, nn

from ..adapters.lora import peft_model
from ..compat.transformers import items_in_batch, prepare_inputs
from ..compat.trl import calls_backward_itself, loss_of_training_step, makes_completions, own_training_step, uses_vllm
from ..core.isolation import replaced
from .bookkeeping import Snapshot, holds_plain_values
from .checks import check_generation


if TYPE_CHECKING:
    from .types import SearchingTrainer


def architecture_loss(trainer: SearchingTrainer, model: nn.Module, batch: Any) -> Tensor:
    """The architecture loss of a batch of the search; leaves metrics, counters and the batch as they were."""
    with preserved_bookkeeping(trainer):
        inputs = prepare_batch(trainer, batch)
        with trainer.compute_loss_context_manager():
            # The search knows the part that has the LoRA, and the loss is one of the whole model.
            whole = trainer.model if model is peft_model(trainer.model) else model
            return trainer.compute_architecture_loss(whole, inputs)


def prepare_batch(trainer: SearchingTrainer, batch: Any) -> Any:
    """A batch of the search as the loss takes it. One of a training step has been prepared, at some cost."""
    return dict(batch if makes_completions(trainer) else prepare_inputs(trainer, batch))


def loss_of_batch(trainer: SearchingTrainer, model: nn.Module, inputs: Any) -> Any:
    """What `compute_loss` gives for a batch alone. A `compute_loss_func` is told how many labels that has."""
    if getattr(trainer, "compute_loss_func", None) is None:
        return trainer.compute_loss(model, inputs)
    with replaced(trainer.args, "average_tokens_across_devices", False):  # the others may have another batch, or none
        return trainer.compute_loss(model, inputs, num_items_in_batch=items_in_batch(trainer, inputs))


def loss_of_trainer(trainer: SearchingTrainer, model: nn.Module, inputs: Any) -> Tensor:
    """
    The loss that a trainer trains on: `compute_loss`, or what its `training_step` would take the gradient of.

    Args:
        trainer (`Trainer`): the trainer.
        model (`nn.Module`): the model as it is trained.
        inputs (`dict`): a prepared batch.

    Raises:
        ValueError: if the `training_step` takes no gradient.
    """
    if own_training_step(trainer) is None:
        return loss_of_batch(trainer, model, inputs)
    with replaced(trainer, "_in_architecture_step", True):
        found = loss_of_training_step(trainer, model, inputs)
    if found is None:
        raise ValueError(
            f"The `training_step` of {type(trainer).__name__} handed no loss to `accelerator.backward`, so there is "
            "none to take the gradient of the gates of. Please override `compute_architecture_loss`."
        )
    return found


def check_own_loss(trainer: SearchingTrainer) -> None:
    """Raise a `ValueError` if the loss of a trainer has to be taken from its `training_step`, and cannot be."""
    step, name = own_training_step(trainer), type(trainer).__name__
    if step is None or not trainer._generates_for_loss:
        return
    out = "Please override `compute_architecture_loss`, so that it gives the loss of a batch"
    if makes_completions(trainer) or calls_backward_itself(step):
        how = "prepares its batches" if makes_completions(trainer) else "calls `backward`"
        raise ValueError(
            f"The loss of {name} is neither in `compute_loss` nor can it be taken from its `training_step`, which "
            f"{how} itself. {out}."
        )
    check_generation(trainer, "takes its loss in `training_step`")
    if uses_vllm(trainer):
        raise ValueError(
            f"You passed `use_vllm=True` to {name}, whose `training_step` would generate for architecture steps too: "
            f"vLLM does it without the gates that the gradient is taken of, and merges the LoRA into the weights for "
            f"it. {out}, or set `use_vllm=False`."
        )


# A loss reads these and notes nothing in them, and a list of rows may be long.
_DATA = ("train_dataset", "eval_dataset", "arch_dataset")
_PLAIN = (int, float, bool, str, type(None), Tensor)


@contextmanager
def preserved_bookkeeping(trainer: SearchingTrainer) -> Iterator[None]:
    """
    Put a trainer's counters and metrics back as they were, and let it log nothing. TRL's `compute_loss` appends to
    `_metrics`, counts tokens in `_total_train_tokens`, and keeps texts to log, its OnlineDPO appends to `stats`, and
    in 0.28 its BCO, and DPO with `loss_type="bco_pair"`, have a mean of all rewards in `running`; what users write
    does the like under other names. An architecture step must not show in any of them.

    What is put back of the trainer's attributes are numbers, texts, objects that hold nothing but numbers, and what a
    [`Snapshot`] takes in, of which dictionaries by their names without a limit. New numbers and containers go again.
    """
    before = dict(vars(trainer))
    kept = {name: value for name, value in before.items() if _is_kept(value)}
    snapshot = Snapshot()
    for name, value in kept.items():
        if isinstance(value, dict) and any(part in name for part in ("metrics", "logs", "stats", "counters")):
            snapshot.add(value, limited=False)
    for name, value in kept.items():
        if name not in _DATA:
            snapshot.add(value)
    for owner in filter(_is_statistic, before.values()):
        snapshot.add(vars(owner))
    try:
        vars(trainer).update({name: snapshot.copy_of(value) for name, value in kept.items()})
        snapshot.put_copies()
        with replaced(trainer, "log", lambda *args, **kwargs: None):
            yield
    finally:
        snapshot.restore()
        for name in [name for name, value in vars(trainer).items() if name not in before and _is_kept(value)]:
            del vars(trainer)[name]
        vars(trainer).update(kept)


def _is_kept(value: Any) -> bool:
    return isinstance(value, _PLAIN) or holds_plain_values(value)


def _is_statistic(value: Any) -> bool:
    """Whether an object holds numbers and nothing else, but for what adds them up over the processes."""
    own = [] if isinstance(value, (type, nn.Module)) else list(getattr(value, "__dict__", {}).values())
    return any(isinstance(part, _PLAIN) for part in own) and all(isinstance(p, (*_PLAIN, Accelerator)) for p in own)
