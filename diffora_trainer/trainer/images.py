"""The matrix as an image in TensorBoard, Trackio and W&B, a few times in a run."""

from __future__ import annotations

import math
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import CallbackHandler

from ..compat.trackers import image_writers
from ..core.selection import Selection
from ..hub.plots import GATES, NO_MATPLOTLIB, Picture, score_scale
from ..logging import get_logger
from ..search.run import SelectionRun
from .session import TrainerSession


logger = get_logger(__name__)

IMAGE_TAG = "train/diffora/matrix"
_OF_SEARCH = 4
"""Images of a search, beside that of the choice."""


class MatrixImageCallback(TrainerCallback):
    """
    Gives the trackers of a Trainer an image of the matrix: four over the search (or over the reallocations), and one
    of what was chosen. Nothing is drawn if nobody would show it.

    Args:
        source ([`TrainerSession`]): what to draw.
        handler (`CallbackHandler`): the Trainer's, with the callbacks of its trackers.
    """

    def __init__(self, source: TrainerSession, handler: CallbackHandler) -> None:
        self._source = source
        self._handler = handler
        self._known: Selection | None = None
        self._failed = False

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        before, self._failed = self._known, False
        self._known = self._source.selection
        # Chosen before the first step: there is no end of a step to draw it at.
        if self._known is not None and self._known is not before and self._known.step == state.global_step == 0:
            self._write(Picture.of(self._known), state)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        run, selection = self._source.run, self._source.selection
        if selection is not None and selection is not self._known:
            self._known = selection
            self._write(Picture.of(selection), state)
        elif run is not None and state.global_step in _moments(run) and (picture := _of_run(run)) is not None:
            self._write(picture, state)

    def _write(self, picture: Picture, state: TrainerState) -> None:
        writers = image_writers(self._handler.callbacks) if state.is_world_process_zero and not self._failed else []
        if not writers:
            return
        try:
            pixels = picture.pixels()
            for write in writers:
                write(IMAGE_TAG, pixels, ", ".join(picture.title), state.global_step)
        except ImportError:
            self._failed = True
            logger.warning(f"No image of the matrix {NO_MATPLOTLIB}")
        except Exception as error:  # of a tracker: the run is worth more than its picture
            self._failed = True
            logger.warning(
                f"The tracker did not take the image of the matrix, and is given no more of them: {error!r}."
            )


def _moments(run: SelectionRun) -> range:
    """The steps after which a run is drawn: those of every so many looks at the model, up to the last one."""
    updates = run.schedule.updates
    every = max(1, math.ceil(len(updates) / _OF_SEARCH))
    return updates[len(updates) - 1 :: -every]


def _of_run(run: SelectionRun) -> Picture | None:
    """A run as it stands: its gates, or what the latest of its reallocations has scored and switched on."""
    method, grid, step = run.search.method, run.search.grid, run.step
    if method.searches:
        title = ("Differential Adaptation Matrix", f"step {step}, {run.phase}")
        return Picture(grid, tuple(method.values().tolist()), "gate (0: closed, 1: open)", title, GATES)
    if run.reallocation is None or not run.reallocation.history:
        return None
    latest = run.reallocation.history[-1]
    title = (f"Modules by {method.name}", f"step {step}: {sum(latest.on)} of {len(grid)} modules on (framed)")
    ranks = tuple(site.rank if on else 0 for site, on in zip(grid.sites, latest.on, strict=True))
    return Picture(grid, latest.scores, f"score ({method.name})", title, score_scale(latest.scores), ranks)
