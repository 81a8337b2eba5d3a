"""Optimizers that hold weights twice."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


COPIES = ("z", "slow_buffer", "lookahead_slow_buff")
"""
States that are weights themselves, to which the optimizer draws those that are trained: the iterate of schedule-free
optimizers (https://huggingface.co/papers/2405.15682), and the slow weights of Ranger and of timm's Lookahead.
"""


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
