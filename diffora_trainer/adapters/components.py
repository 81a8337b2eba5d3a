"""The components of live adapters put into another order: what a model computes stays as it is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .base import AdapterSite
from .optimizer import innermost


def sort_components(sites: Sequence[AdapterSite], orders: Sequence[Tensor], optimizer: Any = None) -> None:
    """
    Put the components of adapters into another order, together with their moments in an optimizer. A state that is not
    held entry by entry (factored, quantized) cannot be sorted; it is forgotten, and begins anew for this weight.

    Args:
        sites (`Sequence[AdapterSite]`): the sites; each has two matrices, whose rows and columns are components.
        orders (`Sequence[Tensor]`): for each site the indices of its components, `(r,)`.
        optimizer (`torch.optim.Optimizer`, *optional*): the live optimizer, or one that wraps it.
    """
    for site, order in zip(sites, orders, strict=True):
        if order.equal(torch.arange(len(order))):
            continue
        for dim, weight in enumerate(site.parameters):
            _sort(weight, dim, order, optimizer)


def _sort(weight: nn.Parameter, dim: int, order: Tensor, optimizer: Any) -> None:
    with torch.no_grad():
        weight.copy_(weight.index_select(dim, order.to(weight.device)))
    state = {} if optimizer is None else innermost(optimizer).state.get(weight, {})
    values = [value for value in state.values() if isinstance(value, Tensor) and value.numel() > 1]
    if any(value.shape != weight.shape for value in values):
        innermost(optimizer).state.pop(weight)
        return
    for value in values:
        value.copy_(value.index_select(dim, order.to(value.device)))
