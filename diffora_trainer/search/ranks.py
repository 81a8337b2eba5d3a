"""Which ranks a run begins with, and which it ends with, where the budget is spent in ranks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor

from ..adapters.grid import AdapterGrid
from ..config import DiffoRAConfig
from ..core.budget import Budget
from ..core.ranks import RankBudget
from ..methods.registry import get_method


def find_rank_budget(config: DiffoRAConfig, adapters: AdapterGrid) -> RankBudget | None:
    """
    The budget in ranks, or `None` where whole modules are kept or pruned.

    Args:
        config ([`DiffoRAConfig`]): the options.
        adapters ([`~diffora_trainer.adapters.grid.AdapterGrid`]): the sites.

    Raises:
        ValueError: if `selection_granularity="rank"` is asked for where it cannot be had.
    """
    if config.selection_granularity == "module":
        return None
    asked = config.selection_granularity == "rank"
    if not asked and config.max_trainable_parameters is None:
        return None  # a share of the modules was asked for
    reason = _obstacle(config, adapters)
    if reason is not None and asked:
        refuse(reason)
    return _make(config, adapters) if reason is None else None


def refuse(reason: str) -> NoReturn:
    """Raise a `ValueError` for `selection_granularity="rank"` where ranks cannot be given."""
    raise ValueError(
        f"You passed `selection_granularity='rank'`, but {reason}. Please leave it out, or set it to 'module', to "
        "keep and prune whole modules."
    )


def _make(config: DiffoRAConfig, adapters: AdapterGrid) -> RankBudget | None:
    grid = adapters.grid
    by_layer = config.scope == "layer"
    rows = sorted(set(grid.row_of)) if by_layer else [0]
    groups = tuple(rows.index(row) if by_layer else 0 for row in grid.row_of)
    totals = [sum(p for p, own in zip(grid.parameters, groups, strict=True) if own == g) for g in range(len(rows))]
    cap = config.max_trainable_parameters
    limits = [math.floor(config.ratio * total) for total in totals]
    if cap is not None:
        limits = [min(cap, limits[0])]
    budget = RankBudget(groups, tuple(site.cost for site in grid.sites), grid.ranks, tuple(limits))
    if all(limit >= total for limit, total in zip(limits, totals, strict=True)):
        return None  # there is nothing to choose
    if budget.fits(budget.start()):
        return budget
    if config.selection_granularity == "rank":
        refuse("the budget has no room for rank 1 in every module")
    return None


def _obstacle(config: DiffoRAConfig, adapters: AdapterGrid) -> str | None:
    """Why a budget cannot be spent in ranks; `None` if it can."""
    if not get_method(config.method).spends_ranks:
        return f"`method={config.method!r}` keeps or prunes whole modules"
    plain: tuple[tuple[str, Any], ...] = (
        ("weight_sharing", "none"),
        ("selection_unit", "module"),
        ("extra_sites", {}),
    )
    for name, without in (*plain, ("max_step_time", None), ("max_step_memory", None)):
        value = getattr(config, name)
        if value and value != without:
            return f"that does not combine with `{name}={value!r}`"
    fixed = [site.name for site in adapters.sites if not site.resizable]
    if fixed:
        return (
            f"the adapter of {fixed[0]!r} is not one of two linear layers, or it is sharded, so it cannot be given "
            "another rank"
        )
    return None


def halved(config: DiffoRAConfig, ranks: RankBudget, rows: Sequence[int]) -> Budget:
    """
    The budget under which the matrix is learned: half of what all modules have at the ranks that a run begins with. A
    module belongs to it that earns its place when half of the others are missing.
    """
    start = [rank * cost for rank, cost in zip(ranks.start(), ranks.costs, strict=True)]
    if len(ranks.limits) > 1:
        return Budget(rows, start, ratio=0.5, scope="layer")
    return Budget(rows, start, cap=max(sum(start) // 2, min(start)))


def final_ranks(budget: RankBudget, matrix: tuple[Tensor, Tensor, Tensor | None], evident: bool) -> tuple[int, ...]:
    """
    The ranks that a run ends with.

    Args:
        budget ([`~diffora_trainer.core.ranks.RankBudget`]): the budget.
        matrix (`tuple`): the modules that it favours, `(n,)` bools, its entries, `(n,)`, and what decides between
            equal ones, `(n,)` or `None`.
        evident (`bool`): whether the choice is to be told from chance. If not, the spread stays even.
    """
    favoured, scores, gains = matrix
    if not evident:
        return budget.start()
    keys = list(zip(favoured.tolist(), scores.tolist(), (scores if gains is None else gains).tolist(), strict=True))
    order = sorted(range(len(keys)), key=lambda index: (*(-float(part) for part in keys[index]), index))
    count = int(favoured.sum())
    return budget.shift(order[:count], order[count:])


def masks(before: Sequence[int], after: Sequence[int], largest: Sequence[int], faded: float) -> list[Tensor | None]:
    """
    What each component of an adapter is multiplied with; `None` where all take part.

    Args:
        before (`Sequence[int]` of length `n`): how many components took part before the choice.
        after (`Sequence[int]` of length `n`): how many do from now on.
        largest (`Sequence[int]` of length `n`): how many there are.
        faded (`float`): how far those that go have faded out, in [0, 1].
    """
    found: list[Tensor | None] = []
    for old, new, size in zip(before, after, largest, strict=True):
        mask = torch.zeros(size)
        mask[:old] = 1.0 - faded
        mask[:new] = 1.0
        found.append(None if bool((mask == 1).all()) else mask)
    return found
