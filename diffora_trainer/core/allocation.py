"""What was on from one reallocation to the next."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from .formats import as_list, as_whole


@dataclass(frozen=True)
class Allocation:
    """
    Which modules were on from some step until the next reallocation, and by which scores (see `reallocate_every`).

    Args:
        step (`int`): the optimizer step after which they were chosen.
        scores (`tuple[float, ...]`): the score of each module, in the order of the grid.
        on (`tuple[bool, ...]`): whether it was on.
    """

    step: int
    scores: tuple[float, ...]
    on: tuple[bool, ...]

    @classmethod
    def from_dict(cls, record: dict[str, Any]) -> Allocation:
        """The inverse of `dataclasses.asdict`, also after a way through JSON."""
        scores, on = tuple(map(float, as_list(record["scores"]))), tuple(as_list(record["on"]))
        if not all(map(math.isfinite, scores)) or not all(isinstance(bit, bool) for bit in on) or not any(on):
            raise ValueError("an allocation needs finite scores, and at least one module that is on")
        return cls(as_whole(record["step"]), scores, on)
