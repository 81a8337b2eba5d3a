"""DiffoRA for the Hugging Face trainers: choose the LoRA modules of a model while it trains."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any


__version__ = "0.1.0.dev0"

# Names are imported when they are asked for: a search without a Trainer need not wait for transformers' and TRL's.
_HOMES = {
    "ArchitectureSearch": "search",
    "DiffoRAConfig": "config",
    "DiffoRAMixin": "trainer",
    "DiffoRASFTTrainer": "sft",
    "DiffoRATrainer": "trainer",
    "DifferentialAdaptationMatrix": "matrix",
    "Selection": "selection",
    "ShortcutConfig": "shortcuts",
    "ShortcutModel": "shortcut_model",
    "add_shortcuts": "shortcuts",
    "apply_selection": "surgery",
    "load_shortcuts": "shortcut_model",
    "remove_shortcuts": "shortcuts",
    "save_shortcuts": "shortcut_model",
}
__all__ = [
    "ArchitectureSearch",
    "DiffoRAConfig",
    "DiffoRAMixin",
    "DiffoRASFTTrainer",
    "DiffoRATrainer",
    "DifferentialAdaptationMatrix",
    "Selection",
    "ShortcutConfig",
    "ShortcutModel",
    "add_shortcuts",
    "apply_selection",
    "load_shortcuts",
    "remove_shortcuts",
    "save_shortcuts",
]

if TYPE_CHECKING:
    from .config import DiffoRAConfig
    from .matrix import DifferentialAdaptationMatrix
    from .search import ArchitectureSearch
    from .selection import Selection
    from .sft import DiffoRASFTTrainer
    from .shortcut_model import ShortcutModel, load_shortcuts, save_shortcuts
    from .shortcuts import ShortcutConfig, add_shortcuts, remove_shortcuts
    from .surgery import apply_selection
    from .trainer import DiffoRAMixin, DiffoRATrainer


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
