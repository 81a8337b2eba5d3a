"""What the schedules of the factors share: a callback that makes itself known before each step."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

from peft import PeftModel
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..adapters.lora import peft_model


class FactorSchedule(TrainerCallback):
    """
    Decides before each step what of a LoRA is trained in it. Pass it in `callbacks` to any trainer of transformers or
    TRL, or call [`before_step`] in a loop of your own before the first forward pass of each optimizer step.

    What happens at a step follows from its number and from the adapter, so a run that is resumed from a checkpoint
    goes on as if it had not been interrupted. As long as a search of this package decides which modules are kept,
    both factors of all of them are trained, and the schedule waits.
    """

    @abstractmethod
    def before_step(self, model: Any, optimizer: Any, step: int) -> None:
        """
        Call this before the first forward pass of an optimizer step.

        Args:
            model (`PeftModel`): the model.
            optimizer (`torch.optim.Optimizer`): the live optimizer of its weights.
            step (`int`): optimizer steps that were made before.
        """

    def check(self, args: TrainingArguments) -> None:
        """Raise a `ValueError` if training arguments do not go with the schedule."""

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        lora_of(kwargs["model"])
        self.check(args)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.before_step(kwargs["model"], kwargs["optimizer"], state.global_step)


def lora_of(model: Any) -> PeftModel:
    """The part of a model that has the LoRA. Raises a `TypeError` if there is none."""
    found = peft_model(model)
    if not isinstance(found, PeftModel):
        raise TypeError(
            f"A schedule of the factors of a LoRA needs a `PeftModel`, got {type(found).__name__}. Please wrap the "
            "model with `peft.get_peft_model`, or pass `peft_config` to the trainer."
        )
    return found


def check_every(every: Any) -> int:
    """Raise a `ValueError` if this is not a number of steps."""
    if type(every) is not int or every < 1:
        raise ValueError(f"You passed `every={every!r}`; it is a number of optimizer steps, so an integer above 0.")
    return every
