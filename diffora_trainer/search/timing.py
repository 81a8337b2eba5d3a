"""What a training step costs, measured, by what is kept. No model in here, only a function that makes a step."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch


MEASURED_ROWS = 4
REPEATS = 2


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


def measure_step_times(
    seconds_of: Callable[[Sequence[int]], float], row_of: Sequence[int], numbered: Sequence[bool]
) -> StepTimes:
    """
    Measure how the time of a step depends on what is kept.

    Up to four of the numbered rows are measured and the others interpolated, since layers follow each other; a row of
    modules outside the numbered layers is always measured. All measurements are made twice in turn, and the smaller
    one taken: a disturbance can only make a step slower. That is about a dozen passes in all.

    Args:
        seconds_of (`Callable[[Sequence[int]], float]`): makes a step with these modules kept and gives its seconds.
        row_of (`Sequence[int]`): row of each module.
        numbered (`Sequence[bool]`): for each row, whether it is a numbered layer.
    """
    first_of: dict[int, int] = {}
    for module, row in enumerate(row_of):
        first_of.setdefault(row, module)
    layers = [row for row in sorted(first_of) if numbered[row]]
    count = min(MEASURED_ROWS, len(layers))
    chosen = {layers[round(i * (len(layers) - 1) / max(1, count - 1))] for i in range(count)}
    chosen |= {row for row in first_of if not numbered[row]}
    kept_sets: dict[int | None, list[int]] = {row: [first_of[row]] for row in sorted(chosen)}
    everything = list(range(len(row_of)))
    kept_sets[None] = everything
    seconds_of(everything)  # the first pass of a shape is slower
    found: dict[int | None, list[float]] = {key: [] for key in kept_sets}
    for _ in range(REPEATS):
        for key, kept in kept_sets.items():
            found[key].append(seconds_of(kept))
    fastest = {key: min(values) for key, values in found.items()}
    known = [row for row in layers if row in chosen]
    # More layers below cannot make a step cheaper: what looks like it is noise.
    for deeper, row in zip(known[-2::-1], known[:0:-1], strict=True):
        fastest[deeper] = max(fastest[deeper], fastest[row])
    depth = []
    for row in range(len(numbered)):
        if row in chosen:
            depth.append(fastest[row])
        elif numbered[row] and known:
            depth.append(_between(row, known, fastest))
        else:
            depth.append(fastest[None])
    deepest = max(depth[row] for row in first_of)
    per_module = max(0.0, (fastest[None] - deepest) / max(1, len(row_of) - 1))
    return StepTimes(max(fastest[None], deepest), tuple(depth), per_module)


def _between(row: int, known: Sequence[int], fastest: dict[int | None, float]) -> float:
    above = [other for other in known if other > row]
    below = [other for other in known if other < row]
    if not above or not below:
        return fastest[(above or below)[0]]
    low, high = below[-1], above[0]
    part = (row - low) / (high - low)
    return fastest[low] * (1 - part) + fastest[high] * part


def timed(step: Callable[[], Any], device: torch.device) -> float:
    """Seconds of a call, the work that it leaves to the device included."""
    module = getattr(torch, device.type, None)
    synchronize = getattr(module, "synchronize", lambda *args: None) if device.type != "cpu" else lambda *args: None
    synchronize(device)
    started = time.perf_counter()
    step()
    synchronize(device)
    return time.perf_counter() - started
