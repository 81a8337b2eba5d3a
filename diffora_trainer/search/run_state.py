"""The state of a run taken and restored."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..adapters.base import kinds_of
from ..adapters.grid import describe_base
from ..adapters.pruning import apply_selection
from ..config import DiffoRAConfig
from ..core.agreement import world_size
from ..core.files import reraise_with_path
from ..core.state import RunState, check_same, check_same_options
from ..methods.build import method_of
from .confidence import Comparison, SplitHalf
from .held_out import HeldOutBatches


if TYPE_CHECKING:
    from .run import SelectionRun


_NOT_OF_THE_SEARCH = ("base_model_id", "log_gates_by_kind", "prefix_cache", "prefix_cache_gib", "search_only")
"""Options that change nothing of a search: what is published and logged, and what comes after the choice."""

_OF_FRACTIONS = " (moments that are fractions depend on `max_steps` and `num_train_epochs`, and on the batch size)"


def state_of(run: SelectionRun, began_pruned: bool) -> RunState:
    """See [`SelectionRun.state`]."""
    search, schedule = run.search, run.schedule
    common: dict[str, Any] = {
        "step": run.step,
        "config": _options(run),
        "base_model": describe_base(run.model),
        "extra_kinds": tuple(kind.name for kind in kinds_of(run.model)),
        "began_pruned": began_pruned,
    }
    if run.selection is not None:
        return RunState(**common, selection=run.selection)
    return RunState(
        **common,
        modules=search.grid.names,
        warmup=schedule.warmup,
        discretize=schedule.discretize,
        prune=schedule.prune,
        held_out_position=run.held_out.position,
        held_out_rows=len(run.held_out.dataset),
        skipped_steps=search.skipped_steps,
        kept=None if search.kept is None else tuple(search.kept.tolist()),
        losses=tuple(search.pending_losses),
        reached=tuple(search.reached.tolist()),
        effect=None if search.effect is None else tuple(search.effect),  # not a class, which `torch.load` refuses
        ranks=() if search.rank_plan is None else search.ranks,
        components=() if search.components is None else search.components.counts,
        halves=tuple(map(tuple, search.halves.sums.tolist())),
        half_steps=search.halves.steps,
        early_losses=tuple(loss if math.isfinite(loss) else None for loss in search.early_losses),
        processes=world_size(),
        batch_rows=_batch_rows(run),
        reallocate_every=None if run.reallocation is None else schedule.updates.step,
        progress=None if search.progress is None else tuple(search.progress),
        costs=search.costs,
        history=() if run.reallocation is None else tuple(run.reallocation.history),
    )


def check_same_run(run: SelectionRun) -> None:
    """Raise an error on every process if they would not all make the same run."""
    record: list[Any] = [
        run.config.to_dict(),
        run.search.grid.names,
        run.search.grid.parameters,
        run.search.ranks,
        asdict(run.schedule),
        len(run.held_out.dataset),
        getattr(run.held_out, "most_sampled", None),  # of batches that a loop has dealt to its processes
    ]
    run.search.check_agreement(json.dumps(record, default=repr))


def restore_run(run: SelectionRun, state: RunState, tensors: dict[str, Tensor], sources: tuple[str, str]) -> bool:
    """See [`SelectionRun.restore`]. Tells whether the modules were pruned, so that there is nothing more to do."""
    search, (source, of_tensors) = run.search, sources
    check_same(source, {"the base model": (state.base_model, describe_base(run.model))})
    if state.selection is not None:
        apply_selection(run.model, state.selection, run.optimizer, run.scheduler, adapter_name=search.adapter_name)
        run.selection, run.step = state.selection, state.step
        search.gates.detach()  # there will be none
        return True
    if run.config.decide_early and state.kept is not None and state.discretize < run.schedule.discretize:
        run.schedule = run.schedule.decided(state.discretize)
    if not state.ranks:  # of an adapter that was trained before, or from before ranks could be given
        search.fall_back_to_modules(trained_before="selection_granularity" in state.config)
    reallocates = run.reallocation is not None and state.step >= state.warmup
    timed = run.config.limits_step and state.step >= state.warmup
    costs = () if state.costs is None else (state.costs.time, state.costs.memory)
    depths = {len(search.grid.rows), *(len(cost.depth) for cost in costs if cost is not None)}
    check_same_options(source, comparable_options(state.config), comparable_options(run.config.to_dict()))
    check_same(source, state.check_schedule(run.schedule), _OF_FRACTIONS)
    check_same(
        source,
        {
            "the number of held-out rows": (state.held_out_rows, len(run.held_out.dataset)),
            "the order of the modules": (state.modules, search.grid.names),
            "whether the budget is spent in ranks": (bool(state.ranks), search.rank_plan is not None),
            "the components that are chosen among": (
                state.components,
                () if search.components is None else search.components.counts,
            ),
            "the number of layers": (max(depths), min(depths)),
            "whether modules were chosen anew": (bool(state.history), reallocates),
            "whether steps were measured": (state.costs is not None, timed),
        },
    )
    if state.costs is not None:
        search.limit(state.costs)
    with reraise_with_path(Path(of_tensors)):
        search.method.load_state_dict(tensors)
    if run.reallocation is not None:
        run.reallocation.restore(state.history)
        search.check_choice(run.reallocation.on)
        if not run.reallocation.on.all():
            search.runtime.after_switch()
    if state.ranks:
        search.set_ranks(state.ranks)
    if state.kept is not None:
        search.discretize(torch.tensor(state.kept))
    search.skipped_steps, search.pending_losses = state.skipped_steps, list(state.losses)
    search.effect, search.progress = Comparison.restore(state.effect), Comparison.restore(state.progress)
    if state.processes in (None, world_size()) and state.batch_rows in (None, _batch_rows(run)):
        # Batches of another size, or on fewer or more processes, hold other rows: their losses are not comparable.
        search.early_losses = tuple(math.nan if loss is None else loss for loss in state.early_losses)
    if state.halves:
        search.halves = SplitHalf(torch.tensor(state.halves, dtype=torch.float64), state.half_steps)
    if state.reached is not None:
        search.reached = torch.tensor(state.reached)
    else:  # not known of a checkpoint from before it was kept
        search.reached |= search.method.steps > 0
    run.held_out.position, run.step = state.held_out_position, state.step
    return False


def _batch_rows(run: SelectionRun) -> int | None:
    return run.held_out.batch_size if isinstance(run.held_out, HeldOutBatches) else None


def _options(run: SelectionRun) -> dict[str, Any]:
    return {**run.config.to_dict(), "method_options": asdict(run.search.method.options)}


def comparable_options(options: dict[str, Any]) -> dict[str, Any]:
    """
    The options that a search depends on, in a form in which those of two runs can be compared: by today's names, with
    the defaults of the method, and as JSON has them, which knows no tuples.
    """
    config = DiffoRAConfig.from_dict(
        {name: value for name, value in options.items() if name not in _NOT_OF_THE_SEARCH}
    )
    _, of_method = method_of(config)
    compared = {**config.to_dict(), "method_options": asdict(of_method)}
    for name in _NOT_OF_THE_SEARCH:
        compared.pop(name)
    return dict(json.loads(json.dumps(compared, default=repr)))
