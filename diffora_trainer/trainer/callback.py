"""When a Trainer has reached a moment of a run. What happens then is in `session`, and how in `search.run`."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from .session import TrainerSession


class SessionCallback(TrainerCallback):
    """
    Forwards the moments of a Trainer's loop to its session.

    Args:
        session ([`~diffora_trainer.trainer.session.TrainerSession`]): the session.
    """

    def __init__(self, session: TrainerSession) -> None:
        self.session = session

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        loader = kwargs["train_dataloader"]
        if state.global_step and hasattr(loader, "set_epoch"):
            # On several processes accelerate does not reach the sampler through the batches that a resumed run skips.
            loader.set_epoch(int(state.epoch or 0))
        if self.session.begin(kwargs["model"], kwargs.get("optimizer"), kwargs.get("lr_scheduler"), state):
            _after_pruning(state, control)
        if self.session.should_stop:  # the loop looks at this once it has asked for batches, and is given none
            control.should_training_stop = True

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.session.begin_epoch(state.global_step, skips_rows=not args.ignore_data_skip)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.session.after_step(state.global_step):
            _after_pruning(state, control)
        if self.session.should_stop:
            control.should_training_stop = True

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.session.end(state):
            _after_pruning(state, control)


def _after_pruning(state: TrainerState, control: TrainerControl) -> None:
    # A checkpoint from before the pruning holds other modules, so the best one is looked for from here on.
    state.best_metric = state.best_global_step = state.best_model_checkpoint = None
    control.should_log = True
