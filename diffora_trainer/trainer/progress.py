"""What the Trainer's progress bar shows of a search."""

from __future__ import annotations

from typing import Any

from transformers import ProgressCallback, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import CallbackHandler

from ..methods.base import GradientMethod
from .session import TrainerSession


class SearchProgressCallback(TrainerCallback):
    """
    Shows the phase, and of a search the DAM's entropy and gates and the architecture loss, on the Trainer's progress
    bar.

    Args:
        source ([`TrainerSession`]): what to show.
        handler (`CallbackHandler`): the Trainer's, with its own progress callback.
    """

    def __init__(self, source: TrainerSession, handler: CallbackHandler) -> None:
        self._source = source
        self._handler = handler

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        progress = next((c for c in self._handler.callbacks if isinstance(c, ProgressCallback)), None)
        bar = getattr(progress, "training_bar", None)
        if bar is None:
            return
        note = self._source.phase
        run = self._source.run
        if run is not None and run.gates_active and isinstance(run.search.method, GradientMethod):
            gates = run.search.method.values()
            note += f", entropy {run.search.method.entropy():.2f}"
            note += f", gates {float(gates.min()):.2f}-{float(gates.max()):.2f}"
            if run.search.last_loss is not None:
                note += f", arch loss {run.search.last_loss:.3g}"
        bar.set_postfix_str(note, refresh=False)
