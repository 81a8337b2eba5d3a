"""Where the states of rows are kept: in memory, or in a file."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor


class Store(Protocol):
    """States of rows by their keys, up to a limit."""

    used: int
    """Bytes."""

    def __contains__(self, key: object) -> bool: ...

    def __len__(self) -> int: ...

    def put(self, key: bytes, states: Tensor) -> bool:
        """Keep the states of a row, `(length, width)`, on the CPU; tells whether there was room."""

    def get(self, key: bytes) -> Tensor:
        """The states of a row."""

    def close(self) -> None:
        """Give everything back."""


class MemoryStore:
    """
    Keeps states in memory.

    Args:
        limit (`int`): bytes that may be used.
    """

    def __init__(self, limit: int) -> None:
        self.limit, self.used = limit, 0
        self._kept: dict[bytes, Tensor] = {}

    def __contains__(self, key: object) -> bool:
        return key in self._kept

    def __len__(self) -> int:
        return len(self._kept)

    def put(self, key: bytes, states: Tensor) -> bool:
        """Keep the states of a row, `(length, width)`, on the CPU; tells whether there was room."""
        size = states.numel() * states.element_size()
        if self.used + size > self.limit:
            return False
        self._kept[key] = states.clone()  # not a view, which would keep its whole batch
        self.used += size
        return True

    def get(self, key: bytes) -> Tensor:
        """The states of a row."""
        return self._kept[key]

    def close(self) -> None:
        """Give the memory back."""
        self._kept.clear()
        self.used = 0


class DiskStore:
    """
    Keeps states in a file that has no name, so that it is gone with the process.

    Args:
        limit (`int`): bytes that may be used.
        folder (`Path`): on whose disk.
    """

    def __init__(self, limit: int, folder: Path) -> None:
        self.limit, self.used = limit, 0
        folder.mkdir(parents=True, exist_ok=True)
        self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 - closed by `close`
        self._kept: dict[bytes, tuple[int, tuple[int, ...], torch.dtype]] = {}

    def __contains__(self, key: object) -> bool:
        return key in self._kept

    def __len__(self) -> int:
        return len(self._kept)

    def put(self, key: bytes, states: Tensor) -> bool:
        """Keep the states of a row, `(length, width)`, on the CPU; tells whether there was room on the disk too."""
        content = states.contiguous().flatten().view(torch.uint8).numpy()
        if self.used + content.nbytes > self.limit:
            return False
        try:
            written = os.pwrite(self._file.fileno(), content.data, self.used)
        except OSError:
            written = 0
        if written < content.nbytes:
            self.limit = self.used  # the disk is full: what is there stays good
            return False
        self._kept[key] = (self.used, tuple(states.shape), states.dtype)
        self.used += content.nbytes
        return True

    def get(self, key: bytes) -> Tensor:
        """The states of a row."""
        start, shape, dtype = self._kept[key]
        size = torch.Size(shape).numel() * dtype.itemsize
        content = bytearray(os.pread(self._file.fileno(), size, start))
        return torch.frombuffer(content, dtype=dtype).view(shape)

    def close(self) -> None:
        """Give the disk back."""
        self._kept.clear()
        self._file.close()
        self.used = 0
