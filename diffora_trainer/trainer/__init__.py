"""The search inside of the trainers of transformers and TRL."""

from __future__ import annotations

import importlib
from typing import Any


_HOMES = {"DiffoRAMixin": "mixin", "DiffoRASFTTrainer": "sft", "DiffoRATrainer": "trainers"}  # sft alone imports TRL
__all__ = ["DiffoRAMixin", "DiffoRASFTTrainer", "DiffoRATrainer"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)
