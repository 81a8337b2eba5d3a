"""The queue of what is due after a step of a run."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from ..core.schedule import Event


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
