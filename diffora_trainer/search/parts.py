"""The parts of a selection run, and its queue of due events."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from ..adapters.optimizer import check_holds, check_optimizer
from ..config import DiffoRAConfig
from ..core.schedule import Event, Schedule
from ..core.selection import Selection
from ..core.state import FADE_OUT, SEARCH, SELECTED, WARMUP
from .batches import Batches
from .reallocation import Reallocation
from .runtime import check_reduces
from .search import ArchitectureSearch


@dataclass(eq=False)
class RunParts:
    """
    The parts of a selection run, and the step that it is at.

    Args:
        model (`PeftModel`): the model.
        optimizer (`torch.optim.Optimizer`): the optimizer of its weights.
        scheduler (*optional*): the learning rate scheduler.
        search ([`ArchitectureSearch`]): computes and applies the selection.
        schedule ([`~diffora_trainer.core.schedule.Schedule`]): the steps of its phases and updates.
        held_out ([`~diffora_trainer.search.batches.Batches`]): batches that are not trained on.
        reallocation ([`Reallocation`], *optional*): switches modules off and on during the search.
        step (`int`, *optional*, defaults to `0`): optimizer steps that were made.
        selection ([`Selection`], *optional*): what was chosen, once the others are pruned.
    """

    model: nn.Module
    optimizer: Any
    scheduler: Any
    search: ArchitectureSearch
    schedule: Schedule
    held_out: Batches
    reallocation: Reallocation | None
    step: int = 0
    selection: Selection | None = None

    def __post_init__(self) -> None:
        check_reduces(self.search.runtime)
        check_optimizer(self.optimizer)
        check_holds(self.optimizer, self.model, self.search.adapters.sites)

    @property
    def config(self) -> DiffoRAConfig:
        """The options of the run."""
        return self.search.config

    @property
    def phase(self) -> str:
        """`"warm-up"`, `"search"`, `"fade-out"` or `"selected"`."""
        if self.selection is not None:
            return SELECTED
        if self.step < self.schedule.warmup or self.step == self.schedule.warmup == self.schedule.prune:
            return WARMUP
        return SEARCH if self.search.kept is None else FADE_OUT

    @property
    def gates_active(self) -> bool:
        """Whether the gates act on the model: until the others are pruned."""
        return self.search.gates.attached

    @property
    def should_stop(self) -> bool:
        """Whether the loop should end: the modules are chosen, and nothing else was asked for (`search_only`)."""
        return self.config.search_only and self.selection is not None


@dataclass(eq=False)
class DueEvents:
    """
    The queue of events to handle after a step. If handling one raises, as when memory runs out on a held-out batch,
    and the training loop catches that, the events that were not completed stay in the queue for the next call.

    Args:
        events (`list[Event]`, *optional*): events that are due and not completed.
        stepping (`bool`, *optional*, defaults to `False`): whether a training step has begun since the last call.
    """

    events: list[Event] = field(default_factory=list)
    stepping: bool = False

    def take_repeat(self) -> bool:
        """Whether a call after a step is another try of the one that failed, and not one after another step; once."""
        repeated = bool(self.events) and not self.stepping
        self.stepping = False
        return repeated

    def each(self, events: list[Event]) -> Iterator[Event]:
        """Pending events, then these. An event counts as completed when the next one is requested."""
        self.events += events
        while self.events:
            yield self.events[0]
            del self.events[0]

    def check_done(self, step: int) -> None:
        """Raise a `ValueError` if events are pending: a saved state does not include them."""
        if self.events:
            raise ValueError(
                f"An error interrupted what is due after step {step} ({self.events[0].value}), so the state of the "
                "run cannot be saved. Please call `after_step` again first."
            )
