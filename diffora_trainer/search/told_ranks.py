"""The budget of a method that says itself which components of each adapter are kept."""

from __future__ import annotations

import math
from typing import Any

from ..adapters.grid import AdapterGrid
from ..config import DiffoRAConfig
from ..core.ranks import RankBudget
from ..methods.build import scope_of
from ..methods.registry import get_method, parse_options


def told_rank_budget(config: DiffoRAConfig, adapters: AdapterGrid) -> RankBudget | None:
    """
    The budget that the method of a run spends in ranks, or `None` where it keeps and prunes whole modules.

    Args:
        config ([`DiffoRAConfig`]): the options.
        adapters ([`~diffora_trainer.adapters.grid.AdapterGrid`]): the sites.

    Raises:
        ValueError: if `selection_granularity="rank"` is asked for where it cannot be had.
    """
    method = get_method(config.method)
    if not method.tells_ranks or config.selection_granularity == "module":
        return None
    reason = _obstacle(config, adapters)
    if reason is not None and config.selection_granularity == "rank":
        raise ValueError(
            f"You passed `selection_granularity='rank'`, but {reason}. Please leave it out, or set it to 'module', to "
            "keep and prune whole modules."
        )
    return _make(config, adapters) if reason is None else None


def _make(config: DiffoRAConfig, adapters: AdapterGrid) -> RankBudget | None:
    grid, by_layer = adapters.grid, scope_of(config) == "layer"
    rows = sorted(set(grid.row_of)) if by_layer else [0]
    groups = tuple(rows.index(row) if by_layer else 0 for row in grid.row_of)
    costs = tuple(site.cost for site in grid.sites)
    totals = [sum(p for p, own in zip(grid.parameters, groups, strict=True) if own == g) for g in range(len(rows))]
    cap = config.max_trainable_parameters
    limits = [math.floor(config.ratio * total) for total in totals]
    if cap is not None:
        limits = [min(cap, limits[0])]
    if all(limit >= total for limit, total in zip(limits, totals, strict=True)):
        return None  # there is nothing to choose
    if all(cost > limits[group] for cost, group in zip(costs, groups, strict=True)):
        raise ValueError(
            f"The budget has room for {max(limits):,} parameters, but rank 1 of the smallest LoRA module has "
            f"{min(costs):,}. Please raise `max_trainable_parameters` or `selection_ratio`."
        )
    return RankBudget(groups, costs, grid.ranks, tuple(limits))


def _obstacle(config: DiffoRAConfig, adapters: AdapterGrid) -> str | None:
    """Why the budget cannot be spent in ranks; `None` if it can."""
    assert not isinstance(config.method_options, str)
    options = parse_options(get_method(config.method), config.method_options)
    values: dict[str, tuple[Any, Any]] = {
        "weight_sharing": (config.weight_sharing, "none"),
        "selection_unit": (config.selection_unit, "module"),
        "extra_sites": (config.extra_sites or None, None),
        "max_step_time": (config.max_step_time, None),
        "max_step_memory": (config.max_step_memory, None),
        "reallocate_every": (getattr(options, "reallocate_every", None), None),
    }
    for name, (value, without) in values.items():
        if value != without:
            return f"that does not combine with `{name}={value!r}`"
    fixed = [site.name for site in adapters.sites if not site.resizable]
    if fixed:
        return (
            f"the adapter of {fixed[0]!r} is not one of two linear layers, or it is sharded, so it cannot be given "
            "another rank"
        )
    return None
