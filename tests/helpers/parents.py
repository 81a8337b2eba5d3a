"""Trainers of TRL wherever a version has them, and their data."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import (
    Trainer,
    TrainingArguments,
)

from diffora_trainer import DiffoRAMixin
from helpers.data import preference_dataset


def of_trl(name: str) -> tuple[type[Trainer], type[TrainingArguments]]:
    """A trainer of TRL and its arguments. Where it stands depends on the version: the newest have some in
    `trl.experimental`, and another set of them than older ones."""
    for module in (f"trl.experimental.{name.lower()}", "trl"):
        try:
            found = import_module(module)
            trainer, args = getattr(found, f"{name}Trainer"), getattr(found, f"{name}Config")
        except (ImportError, AttributeError):
            continue
        return _real(trainer), _real(args)
    pytest.skip(f"this version of TRL has no {name}Trainer")


def _real(cls: type[Any]) -> type[Any]:
    """What a class that only warns of its deprecation is derived from."""
    while cls.__bases__[0].__name__ == cls.__name__:
        cls = cls.__bases__[0]
    return cls


TOKENS = {"input_ids": torch.arange(5, 17).reshape(2, 6)}


def kto_dataset(count: int, seed: int = 0) -> Dataset:
    """Right answers, which are wanted, and wrong ones in turn."""
    rows = [
        {"prompt": row["prompt"], "completion": row["rejected" if index % 2 else "chosen"], "label": index % 2 == 0}
        for index, row in enumerate(preference_dataset(count, seed))
    ]
    return Dataset.from_list(rows)


def reward_dataset(count: int) -> Dataset:
    """Preferences as conversations."""

    def talk(row: dict[str, str], which: str) -> list[dict[str, str]]:
        return [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row[which]}]

    return Dataset.from_list(
        [{which: talk(row, which) for which in ("chosen", "rejected")} for row in preference_dataset(count)]
    )


def searching(parent: type[Trainer]) -> type[Any]:
    """The two lines of the README."""
    return type(f"DiffoRA{parent.__name__}", (DiffoRAMixin, parent), {})
