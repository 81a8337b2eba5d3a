"""What was on from one reallocation to the next."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from .formats import as_flag, as_object, as_whole, tuple_of


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
        record = as_object(record)
        scores, on = tuple_of(float)(record["scores"]), tuple_of(as_flag)(record["on"])
        if not all(map(math.isfinite, scores)) or not any(on):
            raise ValueError("an allocation needs finite scores, and at least one module that is on")
        return cls(as_whole(record["step"]), scores, on)
