"""Sites that stay in a model without being trained any further."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from peft import PeftType
from torch import Tensor, nn

from ..compat.peft import kept_frozen
from .backward import without_input_gradients
from .base import AdapterSite


def check_freezable(sites: Sequence[AdapterSite]) -> None:
    """
    Raise a `ValueError` if some sites cannot be frozen one by one.

    Args:
        sites (`Sequence[AdapterSite]`): all sites of a model.
    """
    remedy = "Please leave `unselected` out: the others are pruned then."
    for site in sites:
        reason = _obstacle(site)
        if reason is not None:
            raise ValueError(f"You passed `unselected='freeze'`, but {reason}. {remedy}")


def _obstacle(site: Any) -> str | None:
    if site.peft_type is not PeftType.LORA:
        return f"the adapter of {site.name!r} is of the kind {type(site).__name__}, and only LoRA is frozen here"
    if site.other_adapters:
        return (
            f"{site.name!r} has other adapters as well ({', '.join(sorted(site.other_adapters))}), and whoever "
            "switches between them unfreezes this one"
        )
    # A shard of a parameter, as FSDP2 holds it, is a tensor of a class of its own.
    if any(type(parameter.data) is not Tensor for parameter in site.parameters):
        return f"the adapter of {site.name!r} is sharded"
    return None


@contextmanager
def frozen_view(model: nn.Module, sites: Sequence[Any], trained: Sequence[int]) -> Iterator[None]:
    """
    For a while, let a model train some of its sites alone, while the others take part as they are, also where a step
    takes a reference from the model without its adapter.

    Args:
        model (`PeftModel`): the model.
        sites (`Sequence[LoraSite]`): its sites, which can be frozen one by one (see [`check_freezable`]).
        trained (`Sequence[int]`): indices of those that are trained.
    """
    wanted = set(trained)
    others = [site for index, site in enumerate(sites) if index not in wanted]
    parameters = [parameter for site in others for parameter in site.parameters if parameter.requires_grad]
    with without_input_gradients(model), ExitStack() as stack:
        for site in others:
            stack.enter_context(kept_frozen(site.layer, site.adapter_name))
        try:
            for parameter in parameters:
                parameter.requires_grad_(False)
            yield
        finally:
            for parameter in parameters:
                parameter.requires_grad_(True)
