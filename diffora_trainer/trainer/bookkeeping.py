"""What a trainer counts and notes in, as it was before a loss that should not show there."""

from __future__ import annotations

from collections import Counter, OrderedDict, defaultdict, deque
from typing import Any

import numpy as np
import torch
from torch import Tensor


_DICTS = (dict, Counter, defaultdict, OrderedDict)
_COLLECTIONS = (*_DICTS, list, deque, set)
# Copied in each architecture step: what is larger is data, or a cache.
_MOST_ENTRIES = 100_000
_MOST_BYTES = 2**24


def holds_plain_values(value: Any) -> bool:
    """Whether a value may be changed in place and a [`Snapshot`] can see to it that it stays as it is."""
    if type(value) is Tensor:
        return not (value.requires_grad or value.is_inference()) and value.layout is torch.strided
    return type(value) in (*_COLLECTIONS, np.ndarray)


class Snapshot:
    """
    The contents of values that may be changed in place: lists, dictionaries (`Counter`, `defaultdict` and
    `OrderedDict` too), sets, deques, NumPy arrays, and tensors that need no gradient, also inside of each other.

    Collections and arrays stay where they are, for others may hold them too: a hook that fills a list, for example.
    Their contents are put back. Tensors, which the backward pass of the loss may still need as they are changed, have
    copies in their places meanwhile.
    """

    def __init__(self) -> None:
        self._contents: dict[int, tuple[Any, Any]] = {}
        self._tensors: dict[int, tuple[Tensor, Tensor]] = {}
        self._bytes_left = _MOST_BYTES

    def add(self, value: Any, limited: bool = True) -> None:
        """
        Take in a value and what is in it; values of other classes are left alone.

        Args:
            value: the value.
            limited (`bool`, *optional*, defaults to `True`): whether to leave it out if there are more than 100,000
                entries in it, or with what was taken in before more than 16 MiB in tensors and arrays.
        """
        found: dict[int, Any] = {}
        entries = size = 0
        waiting = [value]
        while waiting:
            part = waiting.pop()
            if type(part) is tuple:
                waiting.extend(part)
            known = id(part) in found or id(part) in self._contents or id(part) in self._tensors
            if known or not holds_plain_values(part):
                continue
            found[id(part)] = part
            if isinstance(part, (Tensor, np.ndarray)):
                size += part.nbytes
            else:
                entries += len(part)
                waiting.extend(part.values() if isinstance(part, dict) else part)
            if limited and (entries > _MOST_ENTRIES or size > self._bytes_left):
                return
        self._bytes_left -= size
        for key, part in found.items():
            if isinstance(part, Tensor):
                self._tensors[key] = part, part.clone()
            else:
                self._contents[key] = part, _contents_of(part)

    def copy_of(self, value: Any) -> Any:
        """The copy of a tensor that was taken in; any other value itself."""
        return self._tensors[id(value)][1] if id(value) in self._tensors else value

    def put_copies(self) -> None:
        """Put the copies of tensors into the collections that were taken in."""
        for part, contents in self._contents.values():
            if isinstance(part, (list, deque, dict)):
                for key, entry in contents.items() if isinstance(part, dict) else enumerate(contents):
                    if id(entry) in self._tensors:
                        part[key] = self.copy_of(entry)

    def restore(self) -> None:
        """Give each collection and array the contents again that it had when it was taken in."""
        for part, contents in self._contents.values():
            if isinstance(part, np.ndarray):
                part[...] = contents
            elif isinstance(part, list):
                part[:] = contents
            else:
                part.clear()
                part.extend(contents) if isinstance(part, deque) else part.update(contents)


def _contents_of(part: Any) -> Any:
    if isinstance(part, np.ndarray):
        return part.copy()
    return dict(part) if isinstance(part, dict) else list(part)
