"""Agreement of several processes on what is decided."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def check_agreement(bits: Tensor, mean: Callable[[Tensor], Tensor], what: str, remedy: str) -> None:
    """
    Make sure that all processes hold the same bits. If they do not, all of them raise, so that none waits for another.

    Args:
        bits (`Tensor` of dtype `torch.bool`): what should be equal.
        mean (`Callable[[Tensor], Tensor]`): averages a float32 CPU tensor over all processes.
        what (`str`): what the bits stand for, for the message.
        remedy (`str`): what to do about it.

    Raises:
        ValueError: on every process, if the bits of any two differ.
    """
    # The mean is the same everywhere, and only where all agree it is 0 or 1.
    average = mean(bits.float())
    differing = int(((average != 0) & (average != 1)).sum())
    if differing:
        raise ValueError(f"The processes of this run disagree on {what}. {remedy}")


def shares(found: Sequence[bool], mean: Callable[[Tensor], Tensor]) -> list[float]:
    """
    On how large a part of the processes each of these holds: the same on all, so that they go on alike.

    Args:
        found (`Sequence[bool]`): what this process has found.
        mean (`Callable[[Tensor], Tensor]`): averages a float32 CPU tensor over all processes.
    """
    return mean(torch.tensor(found, dtype=torch.float32)).tolist()


def is_main_process() -> bool:
    """Whether this is the process that speaks for all of a run."""
    return not (torch.distributed.is_available() and torch.distributed.is_initialized()) or (
        torch.distributed.get_rank() == 0
    )


def world_size() -> int:
    """How many processes a run has."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return 1
    return torch.distributed.get_world_size()


def fingerprint(text: str) -> Tensor:
    """The 256 bits of a text's SHA-256, as a bool tensor."""
    digest = torch.tensor(list(hashlib.sha256(text.encode()).digest()), dtype=torch.uint8)
    return (digest.unsqueeze(1) >> torch.arange(8, dtype=torch.uint8) & 1).flatten().bool()
