"""DiffoRA for the Hugging Face trainers: choose the LoRA modules of a model while it trains."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any


__version__ = "0.2.0.dev0"

# Names are imported when they are asked for: a search without a Trainer need not wait for transformers' and TRL's.
_HOMES = {
    "AlternateFactors": "schedules.alternate",
    "ArchitectureSearch": "search.search",
    "ChainedLoRA": "schedules.chained",
    "DiffoRACallback": "integrations.callback",
    "DiffoRAConfig": "config",
    "DiffoRAMixin": "trainer.mixin",
    "DiffoRASFTTrainer": "trainer.sft",
    "DiffoRATrainer": "trainer.trainers",
    "DifferentialAdaptationMatrix": "methods.deprecated",
    "GradientMethod": "methods.base",
    "LoraXS": "experimental.lora_xs",
    "PRoLoRA": "experimental.prolora",
    "ScoreMethod": "methods.base",
    "Selection": "core.selection",
    "SelectionRun": "search.run",
    "ShortcutConfig": "experimental.shortcuts",
    "ShortcutModel": "experimental.shortcuts",
    "add_shortcuts": "experimental.shortcuts",
    "apply_selection": "adapters.pruning",
    "load_shortcuts": "experimental.shortcuts",
    "register_method": "methods.registry",
    "remove_shortcuts": "experimental.shortcuts",
    "save_shortcuts": "experimental.shortcuts",
    "selected_lora_config": "hub.pull",
}
__all__ = [
    "AlternateFactors",
    "ArchitectureSearch",
    "ChainedLoRA",
    "DiffoRACallback",
    "DiffoRAConfig",
    "DiffoRAMixin",
    "DiffoRASFTTrainer",
    "DiffoRATrainer",
    "DifferentialAdaptationMatrix",
    "GradientMethod",
    "LoraXS",
    "PRoLoRA",
    "ScoreMethod",
    "Selection",
    "SelectionRun",
    "ShortcutConfig",
    "ShortcutModel",
    "add_shortcuts",
    "apply_selection",
    "load_shortcuts",
    "register_method",
    "remove_shortcuts",
    "save_shortcuts",
    "selected_lora_config",
]

if TYPE_CHECKING:
    from .adapters.pruning import apply_selection
    from .config import DiffoRAConfig
    from .core.selection import Selection
    from .experimental.lora_xs import LoraXS
    from .experimental.prolora import PRoLoRA
    from .experimental.shortcuts.model import ShortcutModel, load_shortcuts, save_shortcuts
    from .experimental.shortcuts.shortcuts import ShortcutConfig, add_shortcuts, remove_shortcuts
    from .hub.pull import selected_lora_config
    from .integrations.callback import DiffoRACallback
    from .methods.base import GradientMethod, ScoreMethod
    from .methods.deprecated import DifferentialAdaptationMatrix
    from .methods.registry import register_method
    from .schedules.alternate import AlternateFactors
    from .schedules.chained import ChainedLoRA
    from .search.run import SelectionRun
    from .search.search import ArchitectureSearch
    from .trainer.mixin import DiffoRAMixin
    from .trainer.sft import DiffoRASFTTrainer
    from .trainer.trainers import DiffoRATrainer


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)


def __dir__() -> list[str]:
    """The public names, without what this file imports for its own use."""
    return sorted({*(name for name in globals() if name.startswith("__")), *__all__})
