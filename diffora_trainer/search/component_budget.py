"""The parameter budget of methods that select LoRA components themselves (`tells_ranks`)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

from torch import Tensor

from ..adapters.base import AdapterSite
from ..adapters.grid import AdapterGrid
from ..config import DiffoRAConfig
from ..core.components import fading_masks
from ..core.ranks import RankBudget
from ..methods.base import SelectionMethod
from ..methods.build import method_of
from ..methods.context import wide
from ..methods.ranks import rows_and_columns
from ..methods.trained_gates import GateMethod
from .rank_rules import make_rank_budget, refuse, uncombinable


def find_component_budget(config: DiffoRAConfig, adapters: AdapterGrid) -> tuple[RankBudget | None, str | None]:
    """
    The budget that the method spends on components, or `None` where it keeps or prunes whole modules, or has nothing
    to choose; and why it keeps whole modules, though they were not asked for.

    Args:
        config ([`DiffoRAConfig`]): the options.
        adapters ([`~diffora_trainer.adapters.grid.AdapterGrid`]): the sites.

    Raises:
        ValueError: if `selection_granularity="rank"` or `"component"` is asked for where it cannot be had,
            or not one module fits.
    """
    if config.selection_granularity == "module":
        return None, None
    method, options = method_of(config)
    reason = uncombinable(config, adapters, reallocate_every=options.reallocate_every)
    if reason is not None:
        if config.selection_granularity != "auto":
            refuse(config.selection_granularity, reason)
        return None, reason
    # Where the budget has room for all components, those that are worth nothing may go all the same.
    budget = make_rank_budget(config, adapters, always=not method.keeps_worthless)
    if budget is None:
        return None, None
    if all(cost > budget.limits[group] for cost, group in zip(budget.costs, budget.groups, strict=True)):
        raise ValueError(
            f"The budget has room for {max(budget.limits):,} parameters, but rank 1 of the smallest LoRA module has "
            f"{min(budget.costs):,}. Please raise `max_trainable_parameters` or `selection_ratio`."
        )
    return budget, None


_CANCELLED = 0.02
"""Norm of `B A` relative to those of its factors up to which it counts as zero: bfloat16 rounding stays below this."""


def check_not_cancelling(sites: Sequence[AdapterSite], method: str) -> None:
    """
    Raise a `ValueError` if the components of an adapter cancel each other out, as in a new LoRA with
    `init_lora_weights="orthogonal"`: `B A` is zero, but a subset of the components is not, so pruning before the first
    step would change the model.

    Args:
        sites (`Sequence[AdapterSite]`): the sites of the run.
        method (`str`): the name of the method, which keeps single components.
    """
    for site in sites:
        if site.matrices is None:
            continue
        a, b = map(wide, rows_and_columns(site.matrices))
        # The norms of the product and of its factors, from matrices as small as the rank.
        product = float(((b @ b.T) * (a @ a.T)).sum().clamp(min=0.0).sqrt())
        sizes = float(b.norm() * a.norm())
        if sizes > 0 and product <= _CANCELLED * sizes:
            raise ValueError(
                f"You passed `method={method!r}` with `discretize_at=0`, which keeps single components of a new LoRA, "
                f"but those of {site.name!r} cancel each other out (`init_lora_weights='orthogonal'`), so that a part "
                "of them would change what the model computes. Please leave `init_lora_weights` out, or pass "
                "`selection_granularity='module'`."
            )


def faded_masks(
    method: SelectionMethod, ranks: Sequence[int], kept: Sequence[Sequence[int]], faded: float
) -> list[Tensor | None]:
    """
    What each component of an adapter is multiplied with while those that the method does not keep fade out: `(r,)` for
    each module, or `None` where all take part.

    Args:
        method ([`~diffora_trainer.methods.base.SelectionMethod`]): the method, whose own gates go on to act.
        ranks (`Sequence[int]`): the ranks of the adapters.
        kept (`Sequence[Sequence[int]]`): the components of each that stay.
        faded (`float`): how far the others have faded out, in [0, 1].
    """
    masks = fading_masks(ranks, ranks, kept, faded)
    if not method.trains_gates:
        return masks
    gates = cast(GateMethod, method).component_gates()
    return [own if mask is None else own * mask for own, mask in zip(gates, masks, strict=True)]
