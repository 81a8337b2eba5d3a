"""The output of frozen layers, kept by rows, so that a training step can begin at the lowest trained layer."""

from .cache import PrefixCache
from .store import DiskStore, MemoryStore


__all__ = ["DiskStore", "MemoryStore", "PrefixCache"]
