"""The losses of a run as a drawing: where each line goes, and where its phases begin. The template makes SVG of it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeGuard

from ..config import DiffoRAConfig
from ..core.schedule import Schedule
from ..core.selection import Selection
from ..core.state import FADE_OUT, SEARCH, SELECTED, WARMUP
from ..methods.build import make_schedule


WIDTH, HEIGHT = 880, 320
LEFT, RIGHT, TOP, BOTTOM = 56, 16, 40, 44
_MAX_POINTS = 400
_MAX_EVALUATIONS = 5
_LARGEST = 1e30
_AROUND_PRUNING = (
    "diffora/held_out_loss_before_fade_out",
    "diffora/held_out_loss_before_pruning",
    "diffora/held_out_loss_after_pruning",
)
_OLD_METRICS = {
    "diffora/held_out_loss_before_closing": "diffora/held_out_loss_before_fade_out",
    "diffora/held_out_loss_before_cut": "diffora/held_out_loss_before_pruning",
    "diffora/held_out_loss_after_cut": "diffora/held_out_loss_after_pruning",
}
"""The names of metrics in the logs of version 0.1, and today's."""

Points = list[tuple[float, float]]


@dataclass(frozen=True)
class Phase:
    """
    A phase of a run: the steps after `begin`, up to and with `end`.

    Args:
        name (`str`): its name.
        begin (`int`): the last step before it.
        end (`int`): its last step.
    """

    name: str
    begin: int
    end: int


@dataclass(frozen=True)
class Line:
    """
    A loss over the steps of a run.

    Args:
        name (`str`): what it is.
        style (`str`): how it is drawn.
        points (`list[tuple[float, float]]`): step and loss.
    """

    name: str
    style: str
    points: Points


def with_new_names(log_history: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A log, which may be of an earlier version, with the metrics by their names of today."""
    return [{_OLD_METRICS.get(name, name): value for name, value in entry.items()} for entry in log_history]


def last_step(log_history: Sequence[Mapping[str, Any]]) -> int | None:
    """The last step that a log speaks of."""
    return max((int(step) for entry in log_history if _is_number(step := entry.get("step"))), default=None)


def phases(
    selection: Selection, log_history: Sequence[Mapping[str, Any]] = (), max_steps: int | None = None
) -> list[Phase]:
    """
    The phases of a run, as far as it is in its log.

    Args:
        selection ([`~diffora_trainer.core.selection.Selection`]): what was chosen, when, and by which options.
        log_history (`Sequence[Mapping]`, *optional*): the Trainer's log.
        max_steps (`int`, *optional*): optimizer steps that the run was to have; by default the last in the log.
            Without both only the pruning is known.
    """
    prune, made = selection.step, last_step(log_history)
    planned = max_steps or made
    if prune is None:
        return []
    schedule = None if planned is None else _schedule(selection, planned)
    if schedule is None:
        found = [Phase("all modules", 0, prune)]
    elif schedule.updates.start >= schedule.prune:  # of a method that scores once
        found = [Phase(WARMUP, 0, prune)]
    else:
        discretize = min(schedule.discretize, prune)
        # Pruned ahead of its schedule, a run was decided early and faded out, or it ended then.
        went_on = made is not None and made > prune or last(log_history, _AROUND_PRUNING[0]) is not None
        if prune < schedule.prune and selection.config.get("decide_early") and went_on:
            discretize = max(schedule.warmup, prune - (schedule.prune - schedule.discretize))
        warmup = min(schedule.warmup, prune)
        found = [Phase(WARMUP, 0, warmup), Phase(SEARCH, warmup, discretize), Phase(FADE_OUT, discretize, prune)]
    if made is not None or planned is not None:
        found.append(Phase(SELECTED, prune, made or planned or prune))
    return [phase for phase in found if phase.begin < phase.end]


def _schedule(selection: Selection, steps: int) -> Schedule | None:
    try:
        return make_schedule(DiffoRAConfig.from_dict({"method": "diffora", **selection.config}), steps)
    except (TypeError, ValueError):  # of another version, or of a method that is not installed
        return None


def losses(log_history: Sequence[Mapping[str, Any]], pruned: int | None) -> tuple[list[Line], int, int]:
    """
    The losses in a log.

    Args:
        log_history (`Sequence[Mapping]`): the Trainer's log.
        pruned (`int`, *optional*): the step of the pruning.

    Returns:
        `tuple[list[Line], int, int]`: the lines, how many values were left out because they are not finite, and how
            many evaluation losses because there are too many.
    """
    evaluations = [
        name
        for name in dict.fromkeys(name for entry in log_history for name in entry)
        if name.startswith("eval_") and name.endswith("_loss")
    ]
    wanted: dict[tuple[str, ...], tuple[str, str]] = {
        ("loss",): ("training loss", "train"),
        ("diffora/arch_loss",): ("loss of architecture steps", "arch"),
        _AROUND_PRUNING: ("held-out loss around the pruning", "held"),
    }
    wanted |= {(name,): (name.replace("_", " "), "eval") for name in evaluations[:_MAX_EVALUATIONS]}
    lines, skipped = [], 0
    for keys, (name, style) in wanted.items():
        points: Points = []
        for step, value in ((entry.get("step"), entry.get(key)) for entry in log_history for key in keys):
            if value is None or not _is_number(step):
                continue
            if _is_number(value):
                points.append((float(step), float(value)))
            else:
                skipped += 1
        if points:
            lines.append(Line(name, style, _thinned(sorted(points), pruned)))
    return lines, skipped, max(0, len(evaluations) - _MAX_EVALUATIONS)


def last(log_history: Sequence[Mapping[str, Any]], name: str) -> float | None:
    """The latest finite value of a name in a log."""
    found = [entry[name] for entry in log_history if _is_number(entry.get(name))]
    return float(found[-1]) if found else None


def chart(lines: Sequence[Line], run: Sequence[Phase]) -> dict[str, Any]:
    """
    Where everything stands in the drawing, in its units.

    Args:
        lines (`Sequence[Line]`): the losses.
        run (`Sequence[Phase]`): the phases.
    """
    values = [value for line in lines for _, value in line.points]
    furthest = max([step for line in lines for step, _ in line.points] + [phase.end for phase in run] + [1])
    low, high, ticks = _axis(min(values), max(values))

    def x(step: float) -> float:
        return round(LEFT + (WIDTH - LEFT - RIGHT) * step / furthest, 1)

    def y(value: float) -> float:
        return round(TOP + (HEIGHT - TOP - BOTTOM) * (high - value) / (high - low), 1)

    _, _, marks = _axis(0, furthest, count=6)
    return {
        "width": WIDTH,
        "height": HEIGHT,
        "left": LEFT,
        "right": WIDTH - RIGHT,
        "top": TOP,
        "bottom": HEIGHT - BOTTOM,
        "bands": [(phase.name, x(phase.begin), round(x(phase.end) - x(phase.begin), 1)) for phase in run],
        "y_ticks": [(y(tick), f"{tick:.6g}") for tick in ticks],
        "x_ticks": [(x(tick), f"{tick:,.6g}") for tick in marks if tick <= furthest],
        "lines": [
            {
                "name": line.name,
                "style": line.style,
                "path": "M" + "L".join(f"{x(step)} {y(value)}" for step, value in line.points),
                "dots": [(x(step), y(value)) for step, value in line.points] if len(line.points) <= 40 else [],
            }
            for line in lines
        ],
    }


def _axis(low: float, high: float, count: int = 5) -> tuple[float, float, list[float]]:
    """A range with round ends that holds another one, and round numbers in it."""
    size = max(abs(low), abs(high))
    span = high - low if high - low > 1e-9 * size else size
    rough = (span if span > 1 / _LARGEST else 1.0) / count
    unit = 10.0 ** math.floor(math.log10(rough))
    step = next(unit * factor for factor in (1, 2, 5, 10) if unit * factor >= rough * 0.999)
    first, after = math.floor(low / step), math.ceil(high / step)
    if first == after:
        after += 1
    return first * step, after * step, [round(n * step, 12) for n in range(first, after + 1)]


def _thinned(points: Points, pruned: int | None) -> Points:
    """Means of neighbours where there are more points than can be drawn, none of them over the step of the pruning."""
    if len(points) <= _MAX_POINTS:
        return points
    before = [point for point in points if pruned is not None and point[0] <= pruned]
    size = math.ceil(len(points) / _MAX_POINTS)
    return [*_means(before, size), *_means(points[len(before) :], size)]


def _means(points: Points, size: int) -> Iterable[tuple[float, float]]:
    for start in range(0, len(points), size):
        part = points[start : start + size]
        yield sum(step for step, _ in part) / len(part), sum(value for _, value in part) / len(part)


def _is_number(value: Any) -> TypeGuard[float]:
    """Whether a value is one that can be drawn; a log may be anybody's."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < _LARGEST
