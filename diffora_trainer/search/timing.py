"""What a training step costs, measured, by what is kept. No model in here, only a function that makes a step."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from ..core.costs import StepCost


MEASURED_ROWS = 3
REPEATS = 2


def measure_step_cost(
    cost_of: Callable[[Sequence[int]], float],
    row_of: Sequence[int],
    numbered: Sequence[bool],
    repeats: int = REPEATS,
) -> StepCost:
    """
    Measure how the time or memory of a step depends on what is kept.

    Up to three of the numbered rows are measured and the others interpolated, since layers follow each other; a row of
    modules outside the numbered layers is always measured. Times are measured twice in turn, and the smaller one
    taken: a disturbance can only make a step slower. That is about ten passes in all.

    Args:
        cost_of (`Callable[[Sequence[int]], float]`): makes a step with these modules kept and gives its seconds or
            bytes.
        row_of (`Sequence[int]`): row of each module.
        numbered (`Sequence[bool]`): for each row, whether it is a numbered layer.
        repeats (`int`, *optional*, defaults to `2`): how often each is measured. If more than once, one pass is made
            before all: the first of a shape is slower.
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
    if repeats > 1:
        cost_of(everything)
    found: dict[int | None, list[float]] = {key: [] for key in kept_sets}
    for _ in range(repeats):
        for key, kept in kept_sets.items():
            found[key].append(cost_of(kept))
    least = {key: min(values) for key, values in found.items()}
    known = [row for row in layers if row in chosen]
    # More layers below cannot make a step cheaper: what looks like it is noise.
    for deeper, row in zip(known[-2::-1], known[:0:-1], strict=True):
        least[deeper] = max(least[deeper], least[row])
    depth = []
    for row in range(len(numbered)):
        if row in chosen:
            depth.append(least[row])
        elif numbered[row] and known:
            depth.append(_between(row, known, least))
        else:
            depth.append(least[None])
    deepest = max(depth[row] for row in first_of)
    per_module = max(0.0, (least[None] - deepest) / max(1, len(row_of) - 1))
    return StepCost(max(least[None], deepest), tuple(depth), per_module)


def _between(row: int, known: Sequence[int], least: dict[int | None, float]) -> float:
    above = [other for other in known if other > row]
    below = [other for other in known if other < row]
    if not above or not below:
        return least[(above or below)[0]]
    low, high = below[-1], above[0]
    part = (row - low) / (high - low)
    return least[low] * (1 - part) + least[high] * part


def timed(step: Callable[[], Any], device: torch.device) -> float:
    """Seconds of a call, the work that it leaves to the device included."""
    module = getattr(torch, device.type, None)
    synchronize = getattr(module, "synchronize", lambda *args: None) if device.type != "cpu" else lambda *args: None
    synchronize(device)
    started = time.perf_counter()
    step()
    synchronize(device)
    return time.perf_counter() - started
