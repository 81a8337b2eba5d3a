"""When things happen in a run: from fractions of its length to events after single steps."""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass, replace
from enum import Enum

from .values import check_integer


class Event(Enum):
    """What happens after a step, in this order."""

    END_WARMUP = "the end of the warm-up"
    UPDATE = "a look of the method at the model"
    DISCRETIZE = "the choice of what is pruned later"
    PRUNE = "the pruning"


@dataclass(frozen=True)
class Schedule:
    """
    The events of a run, by the optimizer step after which they happen; 0 is before the first one.

    Example: in a run of 300 steps with the defaults, steps 1 to 15 are the warm-up and steps 16 to 60 the search,
    which decides; from step 61 on the gates of the pruned modules fade out, they are removed at the end of step 75,
    and steps 76 to 300 train the selected modules alone.

    Args:
        total_steps (`int`): optimizer steps of the whole run.
        warmup (`int`): the last step of the warm-up.
        updates (`range`): the steps after which the method looks at the model: architecture steps, or scorings.
        discretize (`int`): the step after which it is decided what goes; from then on its gates fade out.
        prune (`int`): the step after which it goes: from then on the selected modules train alone.

    Raises:
        ValueError: if the events are not in an order in which they could happen.
    """

    total_steps: int
    warmup: int
    updates: range
    discretize: int
    prune: int

    def __post_init__(self) -> None:
        moments = [0, self.warmup, self.discretize, self.prune, self.total_steps]
        if moments != sorted(moments):
            raise ValueError(
                f"A run of {self.total_steps} steps cannot warm up until step {self.warmup}, choose after "
                f"step {self.discretize} and prune it after step {self.prune}. Please give the steps in this order."
            )

    @property
    def fades(self) -> bool:
        """Whether gates fade out before the pruning."""
        return self.discretize < self.prune

    def events(self, step: int) -> list[Event]:
        """What happens after a step, in order."""
        happens = {
            Event.END_WARMUP: step == self.warmup,
            Event.UPDATE: step in self.updates,
            Event.DISCRETIZE: step == self.discretize and self.fades,
            Event.PRUNE: step == self.prune,
        }
        return [event for event in Event if happens[event]]

    def decided(self, step: int) -> Schedule:
        """The schedule of a run in which it is decided earlier what goes: after this step."""
        updates = range(self.updates.start, step + 1, self.updates.step)
        return replace(self, updates=updates, discretize=step, prune=step + self.prune - self.discretize)

    def fade_progress(self, step: int) -> float | None:
        """
        How far the gates of what is pruned have faded in the step after this one, in (0, 1]; `None` if none fade then.
        """
        if not self.discretize <= step < self.prune:
            return None
        return (step + 1 - self.discretize) / (self.prune - self.discretize)


@dataclass(frozen=True)
class Moments:
    """
    When things should happen, before the length of the run is known. A whole number of 1 or more is an optimizer step,
    a number in (0, 1) a fraction of all steps.

    Args:
        discretize_at (`float`): when the others are pruned.
        warmup (`float`): for how long only the weights learn at the start.
        fade_out (`float`): for how long gates fade out before the pruning; 0 if they do not.
        every (`float`, *optional*): after how many steps the method looks at the model again. Without it it does so
            once, right before the pruning, and the warm-up lasts until then.
        decides (`bool`, *optional*, defaults to `True`): whether the looks go on until the decision and begin one step
            after the warm-up, as architecture steps do. Reallocations begin at its end, and the last one is before
            the pruning.
        most_updates (`int`, *optional*): how often the method looks at most, if it `decides`: where `every` would make
            it more often, the looks are further apart.

    Raises:
        ValueError: if a value is neither a step nor a fraction, or two of them leave nothing to choose by.
    """

    discretize_at: float
    warmup: float
    fade_out: float = 0.0
    every: float | None = None
    decides: bool = True
    most_updates: int | None = None

    def __post_init__(self) -> None:
        check_moment("discretize_at", self.discretize_at, minimum_open=self.every is not None)
        if self.every is None:
            return
        if (self.warmup < 1) == (self.discretize_at < 1) and self.discretize_at <= self.warmup:
            raise ValueError(
                f"You passed `discretize_at={self.discretize_at}` and `arch_warmup={self.warmup}`, so the modules "
                "would be pruned before the search starts. Please make `discretize_at` larger than `arch_warmup`."
            )
        units = {value < 1 for value in (self.every, self.discretize_at, self.warmup or self.every)}
        warmup = max(self.warmup, 1.0) if self.every >= 1 else self.warmup
        if not self.decides and len(units) == 1 and warmup + self.every >= self.discretize_at:
            raise ValueError(
                f"You passed `reallocate_every={self.every}` with `arch_warmup={self.warmup}` and "
                f"`discretize_at={self.discretize_at}`, so the modules would be chosen once and never anew. Please "
                "make `discretize_at` larger (0.999 is the end of the run) or `reallocate_every` smaller."
            )

    def resolve(self, total_steps: int) -> Schedule:
        """
        The schedule of a run of some length. Fractions bend to a short run, since people try their script with three
        steps first; steps that were named do not.

        Args:
            total_steps (`int`): optimizer steps of the whole run.

        Raises:
            ValueError: if the run is too short, the pruning comes after its last step or not after the warm-up, or a
                `fade_out` in steps leaves none for the search.
        """
        total_steps = check_integer("total_steps", total_steps)
        if total_steps > sys.maxsize:
            raise ValueError(f"You passed `total_steps={total_steps}`; no run is that long. Please set `max_steps`.")
        if total_steps < 2:
            raise ValueError(
                f"The run has {total_steps} optimizer step(s), but a search needs at least 2: one of warm-up and one "
                "of search. Please raise `max_steps` or `num_train_epochs`."
            )
        prune = self._prune(total_steps)
        if prune > total_steps:
            raise ValueError(
                f"You passed `discretize_at={prune}`, but the run has only {total_steps} optimizer steps, so no "
                "module would ever be chosen. Use a smaller step, or a fraction such as 0.25."
            )
        if self.every is None:
            return Schedule(total_steps, prune, range(prune, prune + 1), prune, prune)
        warmup = self._warmup(total_steps, prune)
        if prune <= warmup:
            raise ValueError(
                f"The modules would be pruned at step {prune} (`discretize_at={self.discretize_at}`), but the warm-up "
                f"lasts until step {warmup} (`arch_warmup={self.warmup}`), so there is nothing to choose by. Please "
                "make `discretize_at` larger or `arch_warmup` smaller."
            )
        every = max(1, _round_half_up(self.every * total_steps)) if self.every < 1 else int(self.every)
        if not self.decides:
            return Schedule(total_steps, warmup, range(warmup, prune, every), prune, prune)
        fade_out = _round_half_up(self.fade_out * total_steps) if self.fade_out < 1 else int(self.fade_out)
        discretize = prune - fade_out
        if discretize <= warmup:
            if self.fade_out >= 1:
                raise ValueError(
                    f"You passed `fade_out={fade_out}`, but the warm-up lasts until step {warmup} and the modules are "
                    f"pruned at step {prune}, so no step is left for the search. Please make `fade_out` or "
                    "`arch_warmup` smaller or `discretize_at` larger, or give `fade_out` as a fraction, which adapts."
                )
            discretize = warmup + 1
        if self.most_updates is not None:
            every = max(every, -(-(discretize - warmup) // self.most_updates))  # rounded up
        updates = range(warmup + 1, discretize + 1, every)
        return Schedule(total_steps, warmup, updates, discretize, prune)

    def _prune(self, total_steps: int) -> int:
        if self.discretize_at == 0:
            return 0
        if self.discretize_at >= 1:
            return int(self.discretize_at)
        earliest = 1 if self.every is None else 2
        return min(max(earliest, _round_half_up(self.discretize_at * total_steps)), total_steps)

    def _warmup(self, total_steps: int, prune: int) -> int:
        if self.warmup >= 1:
            return int(self.warmup)
        warmup = max(1, _round_half_up(self.warmup * total_steps))
        return min(warmup, prune - 1) if self.discretize_at < 1 else warmup


def check_moment(name: str, value: float, *, minimum_open: bool) -> None:
    """Raise a `ValueError` if a number is neither a step nor a fraction of all steps."""
    valid = value > 0 if minimum_open else value >= 0
    if not valid or (value >= 1 and not float(value).is_integer()):
        raise ValueError(
            f"You passed `{name}={value}`. A whole number of 1 or more is an optimizer step and a number in "
            f"{'(0, 1)' if minimum_open else '[0, 1)'} a fraction of all steps; this is neither."
        )


def _round_half_up(value: float) -> int:
    # Python rounds halves to even, so that 2.5 and 3.5 would behave differently.
    return math.floor(value + 0.5)
