"""What the Trainer's progress bar shows of a search."""

from __future__ import annotations

from typing import Any

from transformers import ProgressCallback, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import CallbackHandler

from .callback import DiffoRACallback


class SearchProgressCallback(TrainerCallback):
    """
    Shows the phase, and of a search the DAM's entropy and gates and the architecture loss, on the Trainer's progress
    bar.

    Args:
        source ([`DiffoRACallback`]): what to show.
        handler (`CallbackHandler`): the Trainer's, with its own progress callback.
    """

    def __init__(self, source: DiffoRACallback, handler: CallbackHandler) -> None:
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
        search = self._source.search
        if self._source.gates_active and search is not None and self._source.config.method == "diffora":
            gates = search.matrix.values()
            note += f", entropy {search.matrix.entropy():.2f}, gates {float(gates.min()):.2f}-{float(gates.max()):.2f}"
            if search.last_loss is not None:
                note += f", arch loss {search.last_loss:.3g}"
        bar.set_postfix_str(note, refresh=False)
