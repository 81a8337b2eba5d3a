"""The pruning of a run: decided, carried out on model and optimizer, and measured."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from ..adapters.moments import start_moments
from ..adapters.pruning import apply_selection
from ..core.costs import StepCosts
from ..core.selection import Selection
from . import messages
from .base import choice_of
from .held_out import batch_to_measure
from .losses import paired_means


if TYPE_CHECKING:
    from .run import SelectionRun


@dataclass(frozen=True)
class Pruning:
    """
    What a pruning has done.

    Args:
        selection ([`~diffora_trainer.core.selection.Selection`]): what was kept.
        metrics (`dict[str, float]`): numbers for the training log.
        lines (`list[str]`): lines for the log.
    """

    selection: Selection
    metrics: dict[str, float]
    lines: list[str]


def prune_run(run: SelectionRun, gap_batches: int) -> Pruning:
    """
    Prune the modules of a run. Whatever is not decided yet is decided now.

    Args:
        run ([`SelectionRun`]): the run.
        gap_batches (`int`): how many held-out batches the losses before and after are compared on.

    Raises:
        ValueError: if the gates are gone: it was interrupted when modules had begun to leave the model.
    """
    if not run.gates_active:
        raise ValueError(
            "An error interrupted the pruning after modules had begun to leave the model and the optimizer, so it "
            "cannot be repeated. Please fix the cause of the first error, and resume from a checkpoint."
        )
    search, held_out = run.search, run.held_out
    decided = search.kept is not None
    before = None
    # Where gates have faded out, all modules were measured right before that.
    before_fading = search.effect.after if decided and search.effect is not None else None
    if held_out.comparable and not decided and search.method.searches:  # a score need not rest on it
        search.measure_effect(held_out.sample(gap_batches))  # first: the choice rests on it
    if held_out.comparable and not search.keeps_function:
        before = search.held_out_losses(held_out.sample(gap_batches), relaxed=True)
    if run.reallocation is not None:  # what follows compares with all modules
        run.reallocation.release()
    metrics = search.metrics()
    selection = search.finish(run.step) if run.reallocation is None else run.reallocation.finish(run.step)
    _carry_out(run, selection, decided)
    after = None if before is None else search.held_out_losses(held_out.sample(gap_batches))
    selection = _with_step_measured(run, selection)
    losses = None if before is None or after is None else paired_means(before, after)
    metrics.update(messages.prune_metrics(selection, losses))
    lines = messages.pruned(selection, losses, before_fading)
    return Pruning(selection, metrics, [*lines, messages.SEARCH_ENDS] if run.config.search_only else lines)


def _carry_out(run: SelectionRun, selection: Selection, decided: bool) -> None:
    """Prune model and optimizer; `decided` is whether the choice was made, and components were opened, before."""
    for site in run.search.adapters.sites:  # a method may have put gates into their weights
        site.rescale_moments(run.optimizer)
    if not decided:
        open_components(run)
    apply_selection(run.model, selection, run.optimizer, run.scheduler, adapter_name=run.search.adapter_name)
    run.search.runtime.after_prune()


def _with_step_measured(run: SelectionRun, selection: Selection) -> Selection:
    """A selection with the time and memory of a step after the pruning, as far as these are limited."""
    costs, meter = run.search.costs or StepCosts(), run.search.meter
    times, memory = selection.times, selection.memory
    if costs.time is not None:
        # What a step took before is known from the end of the warm-up; nothing else would be learned from it.
        seconds = meter.seconds_now(batch_to_measure(run.held_out))
        times = {**times, "before_pruning": costs.time.all_modules, "after_pruning": seconds}
    if costs.memory is not None:
        kept = [index for index, keep in enumerate(selection.kept) if keep]
        memory = {**memory, "after_pruning": meter.bytes_now(batch_to_measure(run.held_out), kept)}
    return replace(selection, times=times, memory=memory)


def discretize_run(run: SelectionRun) -> None:
    """Decide what a run keeps, ahead of its pruning: from now on the others fade out."""
    search = run.search
    search.discretize()
    ranks, in_ranks = choice_of(search)[1], search.rank_plan is not None
    messages.say(messages.discretized(run.step, ranks, run.schedule, in_ranks))
    open_components(run)


def open_components(run: SelectionRun) -> None:
    """
    Where ranks are chosen, let the optimizer begin with the components that take part from now on as with those that
    did before (see [`start_moments`]). If no rank moves, nothing is touched. What this changes is in the state of the
    optimizer, so a run that is resumed after the choice has it, and does not do it again.

    Args:
        run ([`SelectionRun`]): the run, right after its choice.
    """
    search = run.search
    if search.rank_plan is None:
        return
    opened = search.rank_plan.opened(*choice_of(search))
    for site, new, start in zip(search.adapters.sites, opened, search.rank_plan.start, strict=True):
        if new:
            for dim, weight in enumerate(site.parameters):  # rows of `lora_A` and columns of `lora_B`
                start_moments(weight, dim, new, range(start), run.optimizer)
