"""What is done at an update of a run: an architecture step, a scoring of all modules, or a new choice of those on."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from . import messages
from .batches import without_labels
from .held_out import GAP_BATCHES
from .reallocation import Reallocation
from .trained_gates import rate_of_weights


if TYPE_CHECKING:
    from .run import SelectionRun


def architecture_step(run: SelectionRun, train_batch: Any) -> None:
    """
    Move the matrix on the next held-out batch. After a third of the search the held-out loss is measured too, where
    the budget is spent in ranks.

    Args:
        run ([`SelectionRun`]): a run whose method searches.
        train_batch: the last training batch, for `arch_order=2`.
    """
    search, learning_rate = run.search, None
    if search.method.options.arch_order == 2:
        learning_rate = rate_of_weights(search, run.optimizer)
    batch = next(run.held_out)
    if search.step(batch, train_batch, learning_rate) is None:
        messages.warn(messages.skipped(run.step, without_labels(batch), search.skipped_steps))
    updates = run.schedule.updates
    compares = run.held_out.comparable and search.rank_plan is not None and not search.early_losses
    if run.step == updates[len(updates) // 3] and compares:
        search.measure_early(run.held_out.sample(GAP_BATCHES))


def score_modules(run: SelectionRun) -> None:
    """Score all modules of a run on a part of the held-out batches."""
    batches = list(run.held_out.sample(run.search.method.options.score_batches))
    scores = run.search.score(batches)
    messages.say(f"Step {run.step}: {messages.scores(run.search.method, scores, len(batches))}")


def reallocate(run: SelectionRun, reallocation: Reallocation) -> dict[str, float]:
    """Choose anew which modules of a run are on, by the next held-out batches; gives the numbers to log."""
    batches = list(run.held_out.take(run.search.method.options.score_batches))
    changed = reallocation.reallocate(batches, run.step)
    if changed:
        run.search.runtime.after_switch()
    messages.say(messages.reallocated(run.step, len(run.schedule.updates), reallocation, changed))
    return {"diffora/modules_on": float(reallocation.on.sum()), "diffora/switched_modules": float(changed)}
