"""What a training step costs, measured, by what is kept. No model in here, only a function that makes a step."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from ..core.times import StepTimes


MEASURED_ROWS = 4
REPEATS = 2


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
