"""What a run says of itself in the log, as text and as numbers. When it says so is in `run`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from ..core.agreement import is_main_process
from ..core.costs import STEP_LIMITS, Ceiling, StepCosts
from ..core.grid import LORA, Grid
from ..core.schedule import Event, Schedule
from ..core.selection import Selection
from ..core.text import CONFIDENCE
from ..logging import get_logger
from ..methods.base import SelectionMethod
from ..methods.build import scope_of


if TYPE_CHECKING:
    from ..config import DiffoRAConfig
    from .base import SearchBase
    from .reallocation import Reallocation
    from .run import SelectionRun
    from .search import ArchitectureSearch


logger = get_logger(__name__)

_OVER = {"time": 1.1, "memory": 1.02}
"""How far above a limit the measured time and memory of a step may be before there is a warning: times are noisy."""

IN_EVALUATION_MODE = (
    "The first training step was made in evaluation mode: without dropout, and under the gates of an evaluation where "
    "a method draws gates. `from_pretrained` returns models in this mode; please call `model.train()` before the loop."
)

SEARCH_ENDS = (
    "Stopping after the search, as requested by `search_only=True`. `selected_lora_config` gives the LoRA of a second "
    "run: pass it the saved folder, or the trainer."
)


def say(line: str) -> None:
    """Log a line, once for all processes."""
    if is_main_process():
        logger.info(line)


def warn(line: str) -> None:
    """Log a warning, once for all processes."""
    if is_main_process():
        logger.warning(line)


def announce(run: SelectionRun) -> None:
    """Say what a run will do, and what keeps it from doing what was asked for."""
    search = run.search
    say(f"Grid: {search.grid.describe()}.")
    say(plan(run.schedule, search, run.held_out.describe(), run.reallocation is not None))
    for line in start_warnings(run.schedule, search):
        warn(line)
    if (parts := search.micro_batches.parts) > 1:
        say(f"Batches are split into {parts} micro-batches until the pruning.")


def plan(schedule: Schedule, search: SearchBase, data: str, anew: bool) -> str:
    """
    What will happen when, and in what a budget is spent where that may not be what is expected.

    Args:
        schedule ([`~diffora_trainer.core.schedule.Schedule`]): the schedule of the run.
        search ([`~diffora_trainer.search.base.SearchBase`]): its method, and in what the budget is spent.
        data (`str`): what the gradient of the gates is taken on.
        anew (`bool`): whether modules are chosen anew and again.
    """
    reason = search.why_whole_modules
    limit = "budget" if search.config.max_trainable_parameters is None else "cap"
    spent = "" if reason is None else f" The {limit} keeps or prunes whole modules, not ranks: {reason}."
    return _events(schedule, search, data, anew) + spent


def _events(schedule: Schedule, search: SearchBase, data: str, anew: bool) -> str:
    method, ranks = search.method, search.rank_plan
    stay = " train on, and the others stay as they are" if search.freezes else None
    total, prune = schedule.total_steps, schedule.prune
    if anew:
        return (
            f"All modules train until step {schedule.warmup} of {total}. Then they are scored ({method.name}) every "
            f"{schedule.updates.step} steps, {len(schedule.updates)} times, the best ones are on in between, and "
            f"those that are on at step {prune} are kept."
        )
    if method.trains_gates:
        return (
            f"All modules train until step {prune} of {total}, with a gate for each component ({method.name}); then "
            f"{_after_gates(search)}."
        )
    if not method.searches:
        begin = f"All modules train until step {prune} of {total}, are then scored"
        return (
            f"{begin if prune else 'All modules are scored now'} ({method.name}), and "
            f"the selected ones{stay or ' go on alone'}."
        )
    looks = len(schedule.updates)
    search_of = f"{method.name}, {looks} architecture step{'s' * (looks > 1)} {data}"
    if ranks is not None:
        begin = " to ".join(map(str, dict.fromkeys((min(ranks.start), max(ranks.start)))))
        return (
            f"All modules begin with rank {begin}. Warm-up until step {schedule.warmup}, search ({search_of}) until "
            f"step {schedule.discretize} of {total}, {ranks.aim}."
        )
    return (
        f"Warm-up until step {schedule.warmup}, search ({search_of}) until step {schedule.discretize}"
        + (f", the gates of the unselected modules fade out until step {prune}" if schedule.fades else "")
        + f" of {total}, then the selected modules{stay or ' alone'}."
    )


def _after_gates(search: SearchBase) -> str:
    method, all_stay = search.method, search.nothing_to_choose is not None and not search.config.limits_step
    if all_stay or method.start_ranks() is not None:
        return "all modules go on without gates"
    return f"the {'selected modules' if search.component_budget is None else 'best components'} go on alone"


def start_warnings(schedule: Schedule, search: ArchitectureSearch) -> list[str]:
    """What keeps a run from doing what was asked for, before it is paid: in its choice, or by an idle option."""
    found = []
    if (line := _doubt(schedule, search)) is not None:
        found.append(line)
    kind = search.config.prefix_cache
    if kind != "none" and not search.runtime.caches_prefix:
        found.append(
            f"You passed `prefix_cache={kind!r}` to a loop of your own, in which nothing is kept: only the trainers "
            "have this cache. Please leave it out, or use a trainer."
        )
    return found


def _doubt(schedule: Schedule, search: ArchitectureSearch) -> str | None:
    """
    What keeps a run from choosing well, before it is paid: a budget that keeps all modules, or components, though only
    a part of them was asked for, or a search that is too short. `None` if nothing does.
    """
    if search.has_no_choice:
        scope = "`selection_scope='model'`, or " if scope_of(search.config) == "layer" else ""
        advice = "" if search.method.budget.is_one_unit else f" Please set {scope}a smaller budget."
        return f"There is nothing to choose: {search.nothing_to_choose}.{advice}"
    if search.method.searches and len(schedule.updates) < 2:
        fading = f" and gates fade out until step {schedule.prune}" if schedule.fades else ""
        return (
            f"The search makes one architecture step, too few to choose by: the warm-up lasts until step "
            f"{schedule.warmup}, the search until step {schedule.discretize}{fading}. Please train for longer, or "
            "leave the search more of the run (a larger `discretize_at`, a smaller `fade_out`, `arch_warmup` or "
            "`arch_every`)."
        )
    return None


def costs(measured: StepCosts, ceilings: Sequence[Ceiling], grid: Grid) -> str:
    """What the measured time and memory of a step leave to choose from."""
    parts = []
    if measured.time is not None:
        times = measured.time
        parts.append(
            f"takes {times.all_modules:.3g} s with all modules and {min(times.depth):.3g} s with one near the end"
        )
    if measured.memory is not None:
        memory = measured.memory
        parts.append(
            f"needs {mebibytes(memory.all_modules)} MiB and {mebibytes(min(memory.depth))} MiB beside the model"
        )
    shown = [ceilings[round(i * (len(ceilings) - 1) / 3)] for i in range(4)] if len(ceilings) > 4 else ceilings
    room = [f"{ceiling.count} module(s) from {grid.rows[min(ceiling.rows)]} on" for ceiling in dict.fromkeys(shown)]
    return f"A step {' and '.join(parts)}. The limits leave room for {', or '.join(room)}."


def mebibytes(count: float) -> str:
    """A number of bytes in MiB."""
    return f"{count / 2**20:,.3g}" if count < 1000 * 2**20 else f"{count / 2**20:,.0f}"


def scores(method: SelectionMethod, found: Tensor, batches: int) -> str:
    """What the modules were scored by, and the range of the scores."""
    reads = f" on {batches} batches" if method.reads_data else ""
    return (
        f"{len(found)} modules are scored by {method.name}{reads}, from {float(found.min()):.3g} to "
        f"{float(found.max()):.3g}."
    )


def reallocated(step: int, total: int, reallocation: Reallocation, changed: int) -> str:
    """Modules were chosen anew, and `changed` of them switched."""
    on = reallocation.on
    return (
        f"Step {step}: reallocation {len(reallocation.history)} of {total}: {int(on.sum())} of {len(on)} modules are "
        f"on, {changed} were switched."
    )


def discretized(step: int, ranks: Sequence[int], schedule: Schedule, in_ranks: bool) -> str:
    """What was chosen, and what becomes of the others."""
    kept = [rank for rank in ranks if rank]
    if in_ranks:
        return f"Step {step}: the ranks are chosen: {min(kept)} to {max(kept)}, {sum(kept)} in all."
    return f"Step {step}: selected {len(kept)} modules; the gates of the others fade out until step {schedule.prune}."


def skipped(step: int, unlabelled: bool, count: int) -> str:
    """An architecture step whose loss or gradient was not finite, the `count`-th of the run."""
    why = "no token of the held-out batch has a label" if unlabelled else "the loss was not finite"
    return f"Step {step}: {why}; this architecture step is skipped ({count} so far)."


def after_an_error(step: int, events: Sequence[Event]) -> str:
    """What an error that was caught has kept from happening, and happens now."""
    what = "; ".join(dict.fromkeys(event.value for event in events))
    return f"Step {step}: completing what an earlier error interrupted ({what})."


def ended_early(step: int, schedule: Schedule, anew: bool) -> str:
    """A run that ends ahead of its schedule and chooses now."""
    kept = (
        "The modules that are on now are kept."
        if anew
        else "The modules are chosen now, from what the search has found so far, and were not trained alone."
    )
    return f"Training ended at step {step}, before the pruning at step {schedule.prune}. {kept}"


def ended_before_anything(step: int, method: SelectionMethod) -> str:
    """A run that ends before anything was learned of the modules."""
    before = "the first architecture step" if method.searches else "the modules were scored"
    before = "the gates had learned" if method.trains_gates else before
    return f"Training ended at step {step}, before {before}. No module was chosen; all of them stay."


def pruned(selection: Selection, losses: tuple[float, float] | None, before_fading: float | None) -> list[str]:
    """
    What was kept, and what that did to the held-out loss and the time of a step. Where gates have faded out, the loss
    just before the pruning is that of the chosen modules already, so what it is compared with is the loss from before.
    Without `losses`, just before the pruning and after it, they are left out.
    """
    lines = [f"Step {selection.step}: {selection.summary()}.\n{selection.table()}"]
    if selection.confidence is not None:
        lines.append(f"Confidence of the choice: {selection.confidence:.2f} ({CONFIDENCE}).")
    if losses is not None:
        before, after = losses
        start, when = (
            (before, "just before pruning") if before_fading is None else (before_fading, "before the fade-out")
        )
        lines.append(f"Held-out loss {start:.4f} {when}, {after:.4f} after pruning.")
    if seconds := selection.times:
        lines.append(
            f"Lowest layer with a LoRA that is trained: {selection.lowest_row}. A training step is "
            f"{seconds['all_modules'] / seconds['predicted']:.2f} times as fast as with all modules by prediction, "
            f"{seconds['before_pruning'] / seconds['after_pruning']:.2f} times measured."
        )
    if memory := selection.memory:
        lines.append(
            f"A training step needs {mebibytes(memory['after_pruning'])} MiB beside the model, "
            f"{memory['after_pruning'] / memory['all_modules']:.2f} of what it does with all modules (by prediction "
            f"{memory['predicted'] / memory['all_modules']:.2f})."
        )
    return lines


def prune_metrics(selection: Selection, losses: tuple[float, float] | None) -> dict[str, float]:
    """The numbers of a pruning for the training log."""
    report = {
        "diffora/selected_modules": float(len(selection.selected)),
        "diffora/lora_parameters": float(selection.trainable_parameters),
    }
    if selection.confidence is not None:
        report["diffora/confidence"] = selection.confidence
    if losses is not None:
        before, after = losses
        report["diffora/held_out_loss_before_pruning"] = before
        report["diffora/held_out_loss_after_pruning"] = after
        report["diffora/gap"] = after - before
    for kind in dict.fromkeys(selection.grid.kinds):
        if kind != LORA:
            report[f"diffora/selected_{kind}"] = float(len(selection.of_kind(kind)))
    return report


def prune_warnings(selection: Selection, config: DiffoRAConfig) -> list[str]:
    """Warnings of a step that was measured above its limit, and of layers and of kinds in which nothing was kept."""
    rows, columns = selection.unadapted()
    lines, measured = [], {"time": selection.times, "memory": selection.memory}
    for what, limit in config.step_limits.items():
        found = measured[what]
        part = found["after_pruning"] / found["all_modules"] if found else 0.0
        if part > limit * _OVER[what]:
            lines.append(
                f"A step needs {part:.2f} of the {what} of one with all modules, above `{STEP_LIMITS[what]}="
                f"{limit:g}`: the limit holds for the prediction, to which every module adds the same. If that is too "
                "much, please start the run anew with a lower limit."
            )
    if rows:
        lines.append(f"No module was kept in {len(rows)} layer(s): {', '.join(rows)}.")
    if columns:
        lines.append(f"No module was kept of {len(columns)} kind(s): {', '.join(columns)}.")
    return lines
