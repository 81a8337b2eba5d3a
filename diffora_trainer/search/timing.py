"""What a training step costs, measured, by what is kept. No model in here, only a function that makes a step."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from ..core.costs import StepCost


MEASURED_ROWS = 3
MEASURED_OTHERS = 6
REPEATS = 2


def measure_step_cost(
    cost_of: Callable[[Sequence[int]], float],
    row_of: Sequence[int],
    stack_of: Sequence[str | None],
    repeats: int = REPEATS,
    used: Sequence[bool] = (),
) -> StepCost:
    """
    Measure how the time or memory of a step depends on what is kept.

    Of a stack of numbered layers up to three are measured, or the first and the last of each of several (an encoder
    and a decoder), and those between them interpolated, since layers follow each other. Modules outside the layers are
    measured one by one, up to [`MEASURED_OTHERS`] of them, and their row costs what the deepest does. Times are
    measured twice in turn, and the smaller one taken: a disturbance can only make a step slower. That is about ten
    passes in all. Rows and modules that take no part in the loss are passed over where others do: with one of them
    alone a step is a forward pass, and says nothing of the depth.

    Args:
        cost_of (`Callable[[Sequence[int]], float]`): makes a step with these modules kept and gives its seconds or
            bytes.
        row_of (`Sequence[int]`): row of each module.
        stack_of (`Sequence[str]`): for each row the stack of layers that it belongs to; `None` for one of modules
            outside the numbered layers.
        repeats (`int`, *optional*, defaults to `2`): how often each is measured.
        used (`Sequence[bool]`, *optional*): which modules take part in the loss; all of them by default.
    """
    modules_of: dict[int, list[int]] = {}
    for module, row in enumerate(row_of):
        modules_of.setdefault(row, []).append(module)
    live = {row: [m for m in own if not used or used[m]] or own for row, own in modules_of.items()}
    stacks: dict[str, list[int]] = {}
    for row in sorted(modules_of):
        if (stack := stack_of[row]) is not None:
            stacks.setdefault(stack, []).append(row)
    if used:
        stacks = {stack: [row for row in rows if used[live[row][0]]] or rows for stack, rows in stacks.items()}
    known = {stack: _spread(rows, MEASURED_ROWS if len(stacks) == 1 else 2) for stack, rows in stacks.items()}
    alone = {row: [live[row][0]] for rows in known.values() for row in rows}
    alone |= {row: _spread(own, MEASURED_OTHERS) for row, own in live.items() if stack_of[row] is None}
    everything = list(range(len(row_of)))
    kept_sets = [*([module] for row in sorted(alone) for module in alone[row]), everything]
    found: list[list[float]] = [[] for _ in kept_sets]
    for _ in range(repeats):
        for costs, kept in zip(found, kept_sets, strict=True):
            costs.append(cost_of(kept))
    *single, whole = map(min, found)
    costs_of = dict(zip((kept[0] for kept in kept_sets[:-1]), single, strict=True))
    least = {row: max(costs_of[module] for module in own) for row, own in alone.items()}
    for rows in known.values():
        # More layers below cannot make a step cheaper: what looks like it is noise.
        for deeper, row in zip(rows[-2::-1], rows[:0:-1], strict=True):
            least[deeper] = max(least[deeper], least[row])
    depth = []
    for row, stack in enumerate(stack_of):
        if row in least:
            depth.append(least[row])
        else:
            depth.append(whole if stack is None or stack not in known else _between(row, known[stack], least))
    deepest = max(depth[row] for row in modules_of)
    per_module = max(0.0, (whole - deepest) / max(1, len(row_of) - 1))
    return StepCost(max(whole, deepest), tuple(depth), per_module)


def _spread(values: Sequence[int], count: int) -> list[int]:
    """The first and the last of some values, and of those between them as many as `count` has room for."""
    count = min(count, len(values))
    return [values[round(i * (len(values) - 1) / max(1, count - 1))] for i in range(count)]


def _between(row: int, known: Sequence[int], least: dict[int, float]) -> float:
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
