"""Whether the budget of a run is spent in ranks, and where that cannot be done and why."""

from __future__ import annotations

import math
from typing import Any, NoReturn

from ..adapters.grid import AdapterGrid
from ..config import DiffoRAConfig
from ..core.costs import STEP_LIMITS
from ..core.ranks import RankBudget
from ..methods.build import method_of, scope_of
from ..methods.registry import get_method
from .rank_plan import ComponentPlan, ModulePlan, RankPlan


def find_rank_plan(config: DiffoRAConfig, adapters: AdapterGrid) -> tuple[RankPlan | None, str | None]:
    """
    How the budget is spent in ranks, or `None` where whole modules are kept or pruned; and why a cap on the parameters
    is spent in those, though they were not asked for.

    Args:
        config ([`DiffoRAConfig`]): the options.
        adapters ([`~diffora_trainer.adapters.grid.AdapterGrid`]): the sites.

    Raises:
        ValueError: if `selection_granularity="rank"` or `"component"` is asked for where it cannot be had.
    """
    granularity = config.selection_granularity
    if granularity == "module":
        return None, None
    if granularity == "auto" and config.max_trainable_parameters is None:
        return None, None  # a share of the modules was asked for
    reason, budget = _obstacle(config, adapters), None
    if reason is None:
        budget = make_rank_budget(config, adapters)
        if granularity != "component" and budget is not None and not budget.fits(budget.start()):
            reason = "the budget has no room for rank 1 in every module"
    if reason is not None:
        if granularity != "auto":
            refuse(granularity, reason)
        return None, reason
    if budget is None:
        return None, None
    if granularity == "component":
        _, options = method_of(config)
        return ComponentPlan(budget, options.rank_margin, options.rank_growth), None
    return ModulePlan(budget), None


def refuse(granularity: str, reason: str) -> NoReturn:
    """Raise a `ValueError` for a `selection_granularity` in ranks where these cannot be given."""
    raise ValueError(
        f"You passed `selection_granularity={granularity!r}`, but {reason}. Please leave it out, or set it to "
        "'module', to keep and prune whole modules."
    )


def make_rank_budget(config: DiffoRAConfig, adapters: AdapterGrid, always: bool = False) -> RankBudget | None:
    """
    The limits of a configuration in ranks, or `None` if they have room for all modules.

    Args:
        config ([`DiffoRAConfig`]): the options.
        adapters ([`~diffora_trainer.adapters.grid.AdapterGrid`]): the sites.
        always (`bool`, *optional*, defaults to `False`): give them also if they have.
    """
    grid, by_layer = adapters.grid, scope_of(config) == "layer"
    rows = sorted(set(grid.row_of)) if by_layer else [0]
    groups = tuple(rows.index(row) if by_layer else 0 for row in grid.row_of)
    totals = [sum(p for p, own in zip(grid.parameters, groups, strict=True) if own == g) for g in range(len(rows))]
    cap = config.max_trainable_parameters
    limits = [math.floor(config.ratio * total) for total in totals]
    if cap is not None:
        limits = [min(cap, limits[0])]
    if not always and all(limit >= total for limit, total in zip(limits, totals, strict=True)):
        return None  # there is nothing to choose
    return RankBudget(groups, tuple(site.cost for site in grid.sites), grid.ranks, tuple(limits))


def uncombinable(config: DiffoRAConfig, adapters: AdapterGrid, **others: Any) -> str | None:
    """
    Which option, or adapter, ranks do not combine with, whatever the method; `None` if they do with all.

    Args:
        config ([`DiffoRAConfig`]): the options.
        adapters ([`~diffora_trainer.adapters.grid.AdapterGrid`]): the sites.
        **others: options of the method that do not combine with ranks either, `None` where they are not set.
    """
    plain = {"unselected": "prune", "weight_sharing": "none", "selection_unit": "module"}
    names = ("unselected", "weight_sharing", "selection_unit", "extra_sites", *STEP_LIMITS.values())
    for name, value in {**{name: getattr(config, name) for name in names}, **others}.items():
        if value and value != plain.get(name):
            return f"spending it in ranks does not combine with `{name}={value!r}`"
    fixed = [site.name for site in adapters.sites if not site.resizable]
    if fixed:
        return (
            f"the adapter of {fixed[0]!r} is not one of two linear layers, or it is sharded, so it cannot be given "
            "another rank"
        )
    return None


def _obstacle(config: DiffoRAConfig, adapters: AdapterGrid) -> str | None:
    """Which option, method or adapter does not go with ranks; `None` if all do."""
    method = get_method(config.method)
    if config.selection_granularity == "component":
        if not method.searches:
            return f"`method={config.method!r}` scores whole modules"
        if not method.trains_open:
            return f"`method={config.method!r}` trains the weights under its gates, which are those of whole modules"
    elif not method.spends_ranks:
        return f"`method={config.method!r}` keeps or prunes whole modules"
    return uncombinable(config, adapters)
