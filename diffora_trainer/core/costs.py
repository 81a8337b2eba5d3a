"""What a training step costs, in time or in memory, as a function of what is kept; and what limits leave room for."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from .formats import as_number, as_object, maybe, tuple_of


STEP_LIMITS = {"time": "max_step_time", "memory": "max_step_memory"}
"""What is measured of a step, as [`StepCosts`] has it, and the option that limits it."""


@dataclass(frozen=True)
class StepCost:
    """
    The time (seconds) or memory (bytes) of a training step as a function of what is kept: the backward pass goes down
    to the lowest layer with a LoRA, and each LoRA adds its own matrices.

    Args:
        all_modules (`float`): of a step with every module: what limits are parts of.
        depth (`tuple[float, ...]`): for each row, of a step with one module there and nothing below it.
        per_module (`float`): what each further module adds.
    """

    all_modules: float
    depth: tuple[float, ...]
    per_module: float

    def predict(self, rows: Sequence[int]) -> float:
        """The cost of a step with modules in these rows, one entry a module."""
        return max(self.depth[row] for row in rows) + self.per_module * (len(rows) - 1)

    def room(self, limit: float) -> tuple[int, ...]:
        """
        For each row, how many modules may be kept if it is the lowest one with any; 0 if not even one.

        Args:
            limit (`float`): what a step may cost, as a part of that of all modules.
        """
        # What was measured is exact to float32, in which processes average it: all modules must fit if they may cost
        # all.
        left = [limit * self.all_modules * (1 + 1e-6) - depth for depth in self.depth]
        if not self.per_module:
            return tuple(_MANY if rest >= 0 else 0 for rest in left)
        return tuple(0 if rest < 0 else 1 + min(_MANY, math.floor(rest / self.per_module)) for rest in left)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> StepCost:
        """The inverse of `dataclasses.asdict`, also after a way through JSON."""
        data = as_object(data)
        depth = tuple_of(as_number)(data["depth"])
        if not depth:
            raise ValueError("its `depth` has no entry")
        return cls(as_number(data["all_modules"]), depth, as_number(data["per_module"]))


_MANY = 10**9


@dataclass(frozen=True)
class StepCosts:
    """
    What a step costs by what is kept, as far as that is limited.

    Args:
        time ([`StepCost`], *optional*): in seconds.
        memory ([`StepCost`], *optional*): in bytes, on top of the model.
    """

    time: StepCost | None = None
    memory: StepCost | None = None

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> StepCosts:
        """The inverse of `dataclasses.asdict`, also after a way through JSON."""
        if set(as_object(data)) != {"time", "memory"}:
            raise ValueError("it should have the entries `time` and `memory`, and no other")
        return cls(**{name: maybe(StepCost.from_dict)(cost) for name, cost in data.items()})


@dataclass(frozen=True)
class Ceiling:
    """
    One way to stay under all limits: few modules in many layers, or many in few.

    Args:
        rows (`frozenset[int]`): rows in which modules may be kept.
        count (`int`): how many may be.
    """

    rows: frozenset[int]
    count: int


def ceilings(limits: Sequence[tuple[StepCost, float]], row_of: Sequence[int]) -> tuple[Ceiling, ...]:
    """
    All ways to stay under limits that do not lie within another one, from the deepest to the shallowest.

    Args:
        limits (`Sequence[tuple[StepCost, float]]`): costs, and the parts of those of all modules that they may be.
        row_of (`Sequence[int]`): row of each module.

    Returns:
        `tuple[Ceiling, ...]`: nothing, if not even one module is within the limits.
    """
    used = sorted(set(row_of))

    def above(lowest: int) -> frozenset[int]:
        return frozenset(row for row in used if all(cost.depth[row] <= cost.depth[lowest] for cost, _ in limits))

    rooms = [cost.room(limit) for cost, limit in limits]
    ways: list[Ceiling] = []
    for lowest in used:
        rows = above(lowest)
        count = min(min(room[lowest] for room in rooms), sum(row in rows for row in row_of))
        if count and not any(rows <= other.rows and count <= other.count for other in ways):
            ways = [other for other in ways if not (other.rows <= rows and other.count <= count)]
            ways.append(Ceiling(rows, count))
    return tuple(sorted(ways, key=lambda ceiling: (-len(ceiling.rows), ceiling.count)))
