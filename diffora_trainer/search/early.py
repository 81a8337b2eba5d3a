"""Whether a search has found out enough to end ahead of its schedule."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..core.schedule import Schedule


if TYPE_CHECKING:
    from .run import SelectionRun


RELIABILITY, EFFECT = 0.8, 0.01
"""How well the halves of the search have to agree (see [`Confidence.value`]), and by which part of it the LoRA has to
lower the held-out loss."""


def is_due(updates: int) -> bool:
    """
    Whether to look after so many architecture steps: 8, 12, 16, 24, 32, 48 and so on, since a look may cost as much as
    a few training steps.
    """
    while updates > 16 and updates % 2 == 0:
        updates //= 2
    return updates in (8, 12, 16)


def decide_early(run: SelectionRun, batches: int) -> tuple[Schedule, str] | None:
    """
    Decide whether to choose now, ahead of the schedule. That takes evidence: the halves of the search agree, and the
    LoRA has lowered the held-out loss, beyond its noise and visibly. Where the budget is spent in ranks, this loss has
    also fallen since the first look, or no rank would be moved. What it measures leaves no trace.

    Args:
        run ([`SelectionRun`]): a run whose method searches.
        batches (`int`): how many held-out batches losses are compared on.

    Returns:
        `tuple[Schedule, str]` or `None`: the schedule from now on and a line for the log, if so.
    """
    search, latest = run.search, run.schedule.discretize
    if run.step >= latest or not run.held_out.comparable or not is_due(search.halves.steps):
        return None
    agreement = search.confidence.agreement
    if agreement is None or 2 * agreement.correlation < RELIABILITY * (1 + agreement.correlation):
        return None
    search.measure_effect(run.held_out.sample(batches))
    confidence, effect = search.confidence, search.effect
    if search.rank_plan is not None and search.progress is None:
        search.measure_early(run.held_out.sample(batches))  # to compare the next look with
        return None
    if confidence.value is None or confidence.value < RELIABILITY or not confidence.beyond_chance:
        return None
    if effect is None or effect.before - effect.after < EFFECT * abs(effect.before):
        return None
    line = (
        f"Step {run.step}: the search ranks the modules reliably ({confidence.value:.2f}) and the LoRA has lowered "
        f"the held-out loss from {effect.before:.4g} to {effect.after:.4g}, so the choice is made now and not at step "
        f"{latest}."
    )
    return run.schedule.decided(run.step), line
