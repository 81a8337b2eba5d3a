"""Configurations of tests, whose options of a method stand beside the others."""

from __future__ import annotations

from typing import Any

from diffora_trainer import DiffoRAConfig


OF_METHOD = (
    *("arch_every", "arch_learning_rate", "arch_order", "fold_gates", "rank_margin", "rank_growth"),
    *("score_batches", "normalize_scores", "reallocate_every"),
)


def make_config(**options: Any) -> DiffoRAConfig:
    """A configuration in which the options of a method and of shortcuts go where they belong."""
    of_method = {name: options.pop(name) for name in OF_METHOD if name in options}
    shortcuts = {name: options.pop(old) for old, name in SHORTCUTS if old in options}
    if of_method:
        options["method_options"] = of_method
    if shortcuts:
        options["extra_sites"] = {"shortcuts": shortcuts}
    return DiffoRAConfig(**options)


SHORTCUTS = (("shortcuts", "kinds"), ("shortcut_ranking", "ranking"))
