"""Copies of what a trainer counts and notes in, for a loss that should not show there."""

from __future__ import annotations

import copy
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor


_DICTS = (dict, Counter, defaultdict, OrderedDict)
_SEQUENCES = (list, deque)
# Copied in each architecture step: what is larger is data, or a cache.
_MOST_ENTRIES = 100_000
_MOST_BYTES = 2**24


class _TooLarge(Exception):
    """There is more in a container than should be copied."""


def own_containers(attributes: Mapping[str, Any]) -> dict[str, Any]:
    """
    Copies of those attributes that may be changed in place and hold plain values: lists, dictionaries (`Counter`,
    `defaultdict` and `OrderedDict` too), sets, deques, NumPy arrays, and tensors that need no gradient, also inside of
    each other. Other objects in them are in the copies too, and are not copied. Left out are attributes of more than
    100,000 entries or with a tensor or array of more than 16 MiB, and those of other classes.

    Args:
        attributes (`Mapping[str, Any]`): the attributes by name. One value under two names is one in the copies.
    """
    found, memo = {}, dict[int, Any]()
    for name, value in attributes.items():
        if not _is_own(value):
            continue
        copier = _Copier(memo)
        try:
            found[name] = copier.copied(value)
        except _TooLarge:  # what of it was copied already may be half done
            continue
        memo = copier.memo
    return found


def _is_own(value: Any) -> bool:
    if type(value) is Tensor:
        return not value.requires_grad and value.layout is torch.strided
    return type(value) in (*_DICTS, *_SEQUENCES, set, np.ndarray)


class _Copier:
    """Copies one attribute; `memo` holds all copies by the identity of what they are of."""

    def __init__(self, memo: Mapping[int, Any]) -> None:
        self.memo = dict(memo)
        self._left = _MOST_ENTRIES

    def copied(self, value: Any) -> Any:
        if not _is_own(value):
            return value
        if id(value) in self.memo:
            return self.memo[id(value)]
        if isinstance(value, (Tensor, np.ndarray)):
            if value.nbytes > _MOST_BYTES:
                raise _TooLarge
            new = value.clone() if isinstance(value, Tensor) else value.copy()
            return self.memo.setdefault(id(value), new)
        self._left -= len(value)
        if self._left < 0:
            raise _TooLarge
        new = self.memo[id(value)] = copy.copy(value)  # of the same factory, or greatest length
        if isinstance(new, dict):
            for key, entry in value.items():
                new[key] = self.copied(entry)
        elif not isinstance(new, set):
            new.clear()
            new.extend(map(self.copied, value))
        return new
