"""Whether the state of a token has seen the tokens after it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .context import ScoreContext, same_adapters_check
from .masks import TokenMasks


# How much the state of the first token has to change, as a part of its size, to have seen the others change. In half
# precision other experts beside it may move it by a few roundings.
_CHANGE, _CHANGE_IN_HALF = 1e-4, 0.03


def layers_that_look_ahead(context: ScoreContext, masks: TokenMasks, names: Sequence[str]) -> set[str]:
    """
    The layers in which a token sees those after it, as in encoders, found by trying it: all tokens but the first one
    go into the first layer of each stack with the other sign, and the states of the first token are compared with
    those of a usual pass. No attribute says it of all models.

    Args:
        context ([`~diffora_trainer.methods.context.ScoreContext`]): the model and the batches, of which the first one
            is tried.
        masks ([`TokenMasks`]): which tokens are not padding.
        names (`Sequence[str]`): names of the layers in the base model.
    """
    stacks = stacks_of(names)
    usual = _first_states(context, masks, names, ())
    found: set[str] = set()
    for own in stacks.values():
        other = _first_states(context, masks, own, own)
        if any(_changed(a, b) for name in own for a, b in zip(usual[name], other[name], strict=False)):
            found |= set(own)
    return found


def stacks_of(names: Sequence[str]) -> dict[str, list[str]]:
    """Names of layers, by the stack that they are in. To look ahead takes a usual pass and one for each of these."""
    stacks: dict[str, list[str]] = {}
    for name in names:
        stacks.setdefault(name.rpartition(".")[0], []).append(name)
    return stacks


def _first_states(
    context: ScoreContext, masks: TokenMasks, names: Sequence[str], changed: Sequence[str]
) -> dict[str, list[Tensor]]:
    """
    What layers give for the first token of each row that is not padding, when what goes into the first one called of
    some of them is changed for the others; not in passes without the active adapter, as of a reference.
    """
    same_adapters = same_adapters_check(context.model)
    found: dict[str, list[Tensor]] = {name: [] for name in names}
    left = bool(changed)

    def before(module: nn.Module, args: Any, kwargs: Any) -> Any:
        nonlocal left
        states = args[0] if args else kwargs.get("hidden_states")
        if not left or not isinstance(states, Tensor) or states.ndim != 3 or not same_adapters():
            return None
        left = False
        states = states.clone()
        kept = states[_first(masks, module, states)]
        states.neg_()
        states[_first(masks, module, states)] = kept
        return ((states, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": states})

    handles: list[Any] = []
    for name in names:
        layer = context.base_model.get_submodule(name)

        def after(module: nn.Module, args: Any, output: Any, own: list[Tensor] = found[name]) -> None:
            states = output[0] if isinstance(output, tuple) else output
            if isinstance(states, Tensor) and states.ndim == 3 and same_adapters():
                kind = states.device.type
                states = states[_first(masks, module, states)]
                own.append(states.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else states)

        if name in changed:
            handles.append(layer.register_forward_pre_hook(before, with_kwargs=True))
        handles.append(layer.register_forward_hook(after))
    try:
        with torch.no_grad():
            masks.batch = context.batches[0]
            context.loss(masks.batch)
    finally:
        for handle in handles:
            handle.remove()
    return found


def _first(masks: TokenMasks, module: nn.Module, states: Tensor) -> tuple[Tensor, Tensor]:
    """Row and place of the first token of each row that is not padding."""
    mask = masks.of(module, states)
    rows = torch.arange(len(states), device=states.device)
    return rows, torch.zeros_like(rows) if mask is None else mask.int().argmax(dim=1)


def _changed(usual: Tensor, other: Tensor) -> bool:
    """Whether states, one for each row, differ by more than roundings in most rows."""
    half = usual.dtype.itemsize < 4
    sizes = (usual.float() - other.float()).norm(dim=1) / usual.float().norm(dim=1).clamp(min=1e-30)
    return float(sizes.median()) > (_CHANGE_IN_HALF if half else _CHANGE)
