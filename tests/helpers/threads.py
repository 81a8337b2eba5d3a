"""Two processes that average tensors, as two threads."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier
from typing import Any, TypeVar

import torch
from torch import Tensor


Found = TypeVar("Found")


def in_two_processes(process: Callable[[int, Callable[[Tensor], Tensor]], Found]) -> list[Found]:
    """What `process(rank, reduce)` gives for both ranks. Where one fails or makes fewer means, so does the other."""
    barrier = Barrier(2, timeout=20)
    sent: list[Any] = [None, None]

    def run(rank: int) -> Found:
        def reduce(values: Tensor) -> Tensor:
            sent[rank] = values
            barrier.wait()
            mean = torch.stack(sent).mean(0)
            barrier.wait()
            return mean

        try:
            return process(rank, reduce)
        except BaseException:
            barrier.abort()
            raise

    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(run, range(2)))
