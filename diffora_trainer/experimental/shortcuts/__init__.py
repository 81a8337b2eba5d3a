"""Shortcuts: low-rank residual and cross-layer connections, after HeteroLoRA."""

from . import site as site  # registers the kind
from .model import ShortcutModel, load_shortcuts, save_shortcuts
from .shortcuts import ShortcutConfig, add_shortcuts, remove_shortcuts


__all__ = [
    "ShortcutConfig",
    "ShortcutModel",
    "add_shortcuts",
    "load_shortcuts",
    "remove_shortcuts",
    "save_shortcuts",
]
