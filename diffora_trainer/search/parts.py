"""What a run consists of."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from ..adapters.optimizer import check_optimizer
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
    The parts of a run and where it stands.

    Args:
        model (`PeftModel`): the model.
        optimizer (`torch.optim.Optimizer`): the optimizer of its weights.
        scheduler (*optional*): the learning rate scheduler.
        search ([`ArchitectureSearch`]): how things happen.
        schedule ([`~diffora_trainer.core.schedule.Schedule`]): when they do.
        held_out ([`~diffora_trainer.search.batches.Batches`]): batches that are not trained on.
        reallocation ([`Reallocation`], *optional*): what switches modules off and on.
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
    def finished(self) -> bool:
        """Whether the loop should end: the modules are chosen, and nothing else was asked for (`search_only`)."""
        return self.config.search_only and self.selection is not None


@dataclass(eq=False)
class DueEvents:
    """
    What is to happen after a step. A loop may catch an error, such as one of memory in a held-out batch: what it has
    kept from happening is still due then, and must not be silently left out.

    Args:
        events (`list[Event]`, *optional*): what is due and not done.
        stepping (`bool`, *optional*, defaults to `False`): whether a step of the training has begun.
    """

    events: list[Event] = field(default_factory=list)
    stepping: bool = False

    def take_repeat(self) -> bool:
        """Whether a call after a step is another try of the one that failed, and not one after another step; once."""
        repeated = bool(self.events) and not self.stepping
        self.stepping = False
        return repeated

    def each(self, events: list[Event]) -> Iterator[Event]:
        """What is due, and these; each is done when the next one is asked for."""
        self.events += events
        while self.events:
            yield self.events[0]
            del self.events[0]

    def check_done(self, step: int) -> None:
        """Raise a `ValueError` if something is due: no state says what."""
        if self.events:
            raise ValueError(
                f"An error interrupted what is due after step {step} ({self.events[0].value}), so the state of the "
                "run cannot be saved. Please call `after_step` again first."
            )
