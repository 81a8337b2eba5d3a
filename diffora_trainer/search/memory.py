"""How much memory a step needs, counted tensor by tensor: the same number on every device and in every run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..compat.torch import LiveBytes


def peak_bytes(step: Callable[[], Any]) -> int:
    """
    The largest number of bytes that the results of the operations of a step take up at the same time. What was there
    before it, such as the weights of a model, and what a kernel needs inside of one operation, are not in it.

    Args:
        step (`Callable`): a forward and backward pass, say.
    """
    mode = LiveBytes()
    with mode:
        result = step()
    del result
    return mode.peak
