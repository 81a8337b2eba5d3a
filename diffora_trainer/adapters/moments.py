"""What an optimizer holds of a weight: it follows gates that are multiplied in, and entries that begin."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .optimizer import has_each_entry, innermost, is_entry_by_entry


_FIRST_MOMENTS, _SECOND_MOMENTS = ("exp_avg", "state1"), ("exp_avg_sq", "max_exp_avg_sq", "state2")
"""What Adam and its relatives call their moments; `state1` and `state2` are those of bitsandbytes."""
_CLOSED = 1e-6
"""A gate below this counts as 0: divided by its square, moments would be infinite or rounding."""
COPIES = ("z", "slow_buffer", "lookahead_slow_buff")
"""
States that are weights themselves, to which the optimizer draws those that are trained: the iterate of schedule-free
optimizers (https://huggingface.co/papers/2405.15682), and the slow weights of Ranger and of timm's Lookahead.
"""


def start_moments(weight: nn.Parameter, dim: int, new: Sequence[int], trained: Sequence[int], optimizer: Any) -> None:
    """
    Let entries of a weight that were behind a mask begin with steps of the usual size: in the state of Adam and its
    relatives they get the mean second moment of those that were trained. A second copy of the weight (`COPIES`)
    begins with its values.

    Behind a mask the second moment stays 0 while the steps of the weight are counted, and it is by this count alone
    that Adam makes up for a start at 0. So the first steps would be several learning rates long: up to 6 of them where
    ranks are chosen at step 2,000.

    Entries whose second moment is not 0 stay as they are, and so does a state of another form (see
    [`~diffora_trainer.adapters.optimizer.narrow_weight`]). One of bitsandbytes that is quantized or
    paged is forgotten: it begins anew, since it counts its own steps.

    Args:
        weight (`nn.Parameter`): the weight.
        dim (`int`): the dimension.
        new (`Sequence[int]`): the indices of what begins.
        trained (`Sequence[int]`): the indices of what was trained before.
        optimizer (`torch.optim.Optimizer`): the optimizer, or one that wraps it.
    """
    state = _readable_state(weight, optimizer)
    begun: set[int] = set()
    for name in _SECOND_MOMENTS:
        value = state.get(name)
        if not isinstance(value, Tensor) or not is_entry_by_entry(value, weight) or not value.is_floating_point():
            continue
        entries = value.movedim(dim, 0)  # of the same memory
        mean = entries[list(trained)].float().mean(dim=0).to(value.dtype)
        for index in new:
            if not entries[index].any():
                entries[index] = mean
                begun.add(index)
    for copy in (state[name] for name in COPIES if is_entry_by_entry(state.get(name), weight)):
        for index in begun:
            copy.movedim(dim, 0)[index] = weight.detach().movedim(dim, 0)[index]


def rescale_moments(weight: nn.Parameter, factors: Tensor, optimizer: Any) -> None:
    """
    Let the moments that Adam and its relatives hold of a weight fit its gradients once gates are multiplied into it,
    and a second copy of the weight (`COPIES`) its values.

    A gradient of `g B` is `1 / g` times that of `B` under the gate `g`. With the old second moment the first steps
    would be `1 / g` times as long as they should be, and where the gate was negative they would lead back.

    Where a gate is 0 nothing was learned of the gradient behind it. Entries there begin without a first moment, and
    with the mean second moment of the others (see [`start_moments`]); if there are no others, the whole state is
    forgotten. A state of another form (see [`~diffora_trainer.adapters.optimizer.narrow_weight`]) stays as it is, and
    so does that of an optimizer that has not both moments, or a copy in place of the first, as the step of such a one
    may grow with what it holds. Where a copy is of another form, the whole state is forgotten: the old values would
    come back from it. So is a quantized or paged one of bitsandbytes.

    Args:
        weight (`nn.Parameter`): the weight, which was trained under the gates.
        factors (`Tensor`): the gates, of a shape that broadcasts with it, along one dimension; or one for all, without
            a dimension.
        optimizer (`torch.optim.Optimizer`): the optimizer, or one that wraps it.
    """
    states = innermost(optimizer).state
    state = _readable_state(weight, optimizer)
    moments = {name: state[name] for name in (*_FIRST_MOMENTS, *_SECOND_MOMENTS) if name in state}
    copies = [state[name] for name in COPIES if name in state]
    # One gate for all entries is multiplied into a part of a sharded weight as into the whole.
    kinds = (Tensor, type(weight)) if factors.ndim == 0 else (Tensor,)

    def whole(values: Iterable[Any]) -> bool:
        return all(has_each_entry(value, weight, kinds) and value.is_floating_point() for value in values)

    factors = factors.detach().to(weight.device, torch.float32)
    if not whole(copies):
        states.pop(weight)
        return
    for copy in copies:
        copy.mul_(factors)
    first, second = (not moments.keys().isdisjoint(names) for names in (_FIRST_MOMENTS, _SECOND_MOMENTS))
    if not whole(moments.values()) or not second or not (first or copies):
        return
    closed = factors.abs() < _CLOSED
    if closed.all():
        states.pop(weight)
        return
    inverse = (1.0 / factors).masked_fill(closed, 0.0)
    for name, value in moments.items():
        value.mul_(inverse if name in _FIRST_MOMENTS else inverse.square())
    if closed.any():
        dim = max(range(factors.ndim), key=lambda dim: factors.shape[dim])
        new, trained = (found.flatten().nonzero().flatten().tolist() for found in (closed, ~closed))
        start_moments(weight, dim, new, trained, optimizer)


def _readable_state(weight: nn.Parameter, optimizer: Any) -> dict[str, Any]:
    """What an optimizer holds of a weight; what bitsandbytes has quantized or paged of it is forgotten first."""
    states = innermost(optimizer).state
    second = (states.get(weight) or {}).get("state2")
    if second is not None and not (is_entry_by_entry(second, weight) and second.is_floating_point()):
        states.pop(weight)
    return states.get(weight) or {}


@contextmanager
def copies_follow(weights: Iterable[nn.Parameter], optimizer: Any) -> Iterator[None]:
    """
    Write what is written into some weights inside of this into an optimizer's copies of them too.

    Args:
        weights (`Iterable[nn.Parameter]`): the weights.
        optimizer (`torch.optim.Optimizer`): the optimizer, without a wrapper.
    """
    states = [(weight, optimizer.state.get(weight) or {}) for weight in weights]
    found = [(weight, state[name]) for weight, state in states for name in COPIES if name in state]
    held = [(weight, copy, weight.detach().clone()) for weight, copy in found if copy.shape == weight.shape]
    yield
    for weight, copy, before in held:
        copy.copy_(torch.where(weight.detach() == before, copy, weight.detach()))
