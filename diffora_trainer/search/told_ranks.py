"""The budget of a method that says itself which components of each adapter are kept."""

from __future__ import annotations

from ..adapters.grid import AdapterGrid
from ..config import DiffoRAConfig
from ..core.ranks import RankBudget
from ..methods.build import scope_of
from ..methods.registry import get_method, parse_options
from .rank_rules import make_rank_budget, refuse, uncombinable


def told_rank_budget(config: DiffoRAConfig, adapters: AdapterGrid) -> tuple[RankBudget | None, str | None]:
    """
    The budget that the method of a run spends in ranks, or `None` where it keeps and prunes whole modules; and why it
    does so with a cap on the parameters, though they were not asked for.

    Args:
        config ([`DiffoRAConfig`]): the options.
        adapters ([`~diffora_trainer.adapters.grid.AdapterGrid`]): the sites.

    Raises:
        ValueError: if `selection_granularity="rank"` or `"component"` is asked for where it cannot be had,
            or not one module fits.
    """
    method = get_method(config.method)
    if config.selection_granularity == "module":
        return None, None
    assert not isinstance(config.method_options, str)
    options = parse_options(method, config.method_options)
    reason = uncombinable(config, adapters, reallocate_every=getattr(options, "reallocate_every", None))
    if reason is not None:
        if config.selection_granularity != "auto":
            refuse(config.selection_granularity, reason)
        return None, reason if config.max_trainable_parameters is not None else None
    budget = make_rank_budget(config, adapters, scope_of(config))
    if budget is None:
        return None, None
    if all(cost > budget.limits[group] for cost, group in zip(budget.costs, budget.groups, strict=True)):
        raise ValueError(
            f"The budget has room for {max(budget.limits):,} parameters, but rank 1 of the smallest LoRA module has "
            f"{min(budget.costs):,}. Please raise `max_trainable_parameters` or `selection_ratio`."
        )
    return budget, None
