"""The time of a training step as a function of what is kept."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class StepTimes:
    """
    The time of a training step (forward and backward pass) as a function of what is kept: the backward pass goes down
    to the lowest layer with a LoRA, and each LoRA adds its own matrices to both passes.

    Args:
        all_modules (`float`): seconds of a step with every module.
        depth (`tuple[float, ...]`): for each row, seconds of a step with one module there and nothing below it.
        per_module (`float`): seconds that each further module adds.
    """

    all_modules: float
    depth: tuple[float, ...]
    per_module: float

    def predict(self, rows: Sequence[int]) -> float:
        """Seconds of a step with modules in these rows, one entry a module."""
        return max(self.depth[row] for row in rows) + self.per_module * (len(rows) - 1)

    def spread(self, count: float) -> float:
        """Seconds of a step with so many modules, spread over all layers."""
        return max(self.depth) + self.per_module * (count - 1)

    def to_dict(self) -> dict[str, Any]:
        """As JSON values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> StepTimes:
        """The inverse of [`to_dict`]."""
        return cls(float(data["all_modules"]), tuple(map(float, data["depth"])), float(data["per_module"]))
