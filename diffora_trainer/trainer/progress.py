"""What the Trainer's progress bar shows of a run: its phase, and the time that is left."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import CallbackHandler

from ..compat.trackers import training_bar
from ..core.schedule import Event, Schedule
from .session import TrainerSession


_WINDOW = 50
"""Steps of a kind by whose mean the next of that kind are predicted: slow moments weigh little, changes are seen."""
_FORMAT = "{{l_bar}}{{bar}}| {{n_fmt}}/{{total_fmt}} [{{elapsed}}<{remaining}, {{rate_fmt}}{{postfix}}]"
"""tqdm's own, with a time that is not made from the rate of the latest steps."""


class TimeLeft:
    """
    How long a run still takes, by the steps that it has made: a step of the search with a look at the held-out data is
    dearer than one without, and one after the pruning cheaper. tqdm's estimate takes the latest rate for that of all
    steps, which in the search is too slow by much.
    """

    def __init__(self) -> None:
        self._seconds: dict[str, deque[float]] = {}

    def add(self, kind: str, seconds: float) -> None:
        """A step of a kind has taken so long: `"plain"`, `"look"` or `"selected"`."""
        self._seconds.setdefault(kind, deque(maxlen=_WINDOW)).append(seconds)

    def predict(self, looks: int, plain: int, selected: int) -> float | None:
        """
        Seconds of so many steps; `None` while none was measured. Of those never seen, a step with a look is taken to
        cost two (it is a forward and a backward pass more), and one with the selected modules what one with all of
        them does.

        Args:
            looks (`int`): steps that look at the held-out data.
            plain (`int`): other steps with all modules.
            selected (`int`): steps after the pruning.
        """
        means = {kind: sum(seconds) / len(seconds) for kind, seconds in self._seconds.items()}
        if not means:
            return None
        usual = means.get("plain", means.get("selected"))
        if usual is None:
            usual = means["look"] / 2
        return looks * means.get("look", 2 * usual) + plain * usual + selected * means.get("selected", usual)


class SearchProgressCallback(TrainerCallback):
    """
    Shows on the Trainer's progress bar the phase, of a search the DAM's entropy and gates and the architecture loss,
    and how long the run still takes by what steps of each kind have taken (see [`TimeLeft`]).

    Args:
        source ([`TrainerSession`]): what to show.
        handler (`CallbackHandler`): the Trainer's, with its own progress callback.
        clock (`Callable`, *optional*): gives the time in seconds.
    """

    def __init__(
        self, source: TrainerSession, handler: CallbackHandler, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        self._source = source
        self._handler = handler
        self._clock = clock
        self._schedule: Schedule | None = None
        self._times = TimeLeft()
        self._since: float | None = None
        self._format: str | None = None
        self._phase = ""

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        run = self._source.run
        self._schedule = None if run is None else run.schedule
        self._times = TimeLeft()
        self._since = None  # the first step of a process is slower than all others
        self._format, self._phase = None, self._source.phase
        if (bar := training_bar(self._handler.callbacks)) is not None:
            bar.set_description_str(self._phase, refresh=False)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        bar = training_bar(self._handler.callbacks)
        if bar is None:
            return
        phase, run = self._source.phase, self._source.run
        self._measure(state.global_step)
        note = ""
        if run is not None and run.gates_active and run.search.method.searches:
            gates = run.search.method.values()
            note = f"entropy {run.search.method.entropy():.2f}"
            note += f", gates {float(gates.min()):.2f}-{float(gates.max()):.2f}"
            if run.search.last_loss is not None:
                note += f", arch loss {run.search.last_loss:.3g}"
        bar.set_postfix_str(note, refresh=False)
        # The bar was drawn before this callback was called, and is drawn again after the next step: the time is that
        # which is left then.
        left = self._left(state.global_step + 1, state.max_steps)
        if left is not None and bar.bar_format in (None, self._format):  # not somebody else's
            self._format = bar.bar_format = _FORMAT.format(remaining=bar.format_interval(left))
        if phase != self._phase:
            self._phase = phase
            bar.set_description_str(phase)

    def _measure(self, step: int) -> None:
        now, run, schedule = self._clock(), self._source.run, self._schedule
        since, self._since = self._since, now
        # It may be decided early; and once modules are pruned there is no run any more.
        self._schedule = None if run is None else run.schedule
        if since is None:
            return
        if schedule is None:
            self._times.add("selected", now - since)
            return
        events = schedule.events(step)
        measures = run is None or Event.DISCRETIZE in events or run.config.limits_step and Event.END_WARMUP in events
        if not measures:  # what is measured then is measured once
            self._times.add("look" if Event.UPDATE in events else "plain", now - since)

    def _left(self, step: int, total: int) -> float | None:
        """Seconds from the end of a step to that of the run."""
        schedule = self._schedule
        if schedule is None:
            return self._times.predict(0, 0, max(0, total - step))
        prune = min(schedule.prune, total)
        looks = sum(step < update for update in schedule.updates)
        selected = max(0, total - max(step, prune))
        return self._times.predict(looks, max(0, prune - step - looks), selected)
