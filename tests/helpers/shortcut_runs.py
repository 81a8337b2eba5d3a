"""Runs that choose among shortcuts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback

from diffora_trainer.adapters.grid import AdapterGrid
from diffora_trainer.experimental.shortcuts.files import SHORTCUT_CONFIG_NAME, SHORTCUT_TENSORS_NAME
from diffora_trainer.experimental.shortcuts.shortcuts import shortcut_tensors, shortcuts
from helpers.data import lm_dataset
from helpers.trainers import CUT, make_trainer


ALL = ["residual1", "residual2", "shortcut1", "shortcut2"]
SEARCHED = {"shortcuts": ALL, "shortcut_ranking": "separated", "fade_out": 2}
SCORED = {"shortcuts": ALL, "selection_scope": "model", "score_batches": 2, "fade_out": 0}
DYNAMIC = {**SCORED, "method": "grad_norm", "reallocate_every": 2}
# The search ends at step 6, so that the gates of the others close during the steps 7 and 8.
MOMENTS = {"warm-up": 2, "search": 5, "closing": 7, "cut": CUT, "selected": 10}


class SaveAt(TrainerCallback):
    """Saves a checkpoint at some steps."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_save = state.global_step in MOMENTS.values()


def shortcut_trainer(folder: Path, task: str = "cls", **kwargs: Any) -> Trainer:
    """A trainer whose search chooses among shortcuts, and that saves at the moments."""
    args = {"save_strategy": "steps", "save_steps": 1000, **kwargs.pop("args", {})}
    return make_trainer(folder, task, args=args, **{"search": SEARCHED, "callbacks": [SaveAt()], **kwargs})


def last(model: nn.Module, batches: Any) -> dict[str, float]:
    """Scores by which no shortcut is kept."""
    grid = AdapterGrid.from_model(model).grid
    return {name: 0.0 if name in grid.of_kind("shortcuts") else 1.0 + at for at, name in enumerate(grid.names)}


PLAIN = {"search": {**SCORED, "method": "custom"}, "score_function": last}


def tensors(model: nn.Module) -> dict[str, Tensor]:
    """A copy of the shortcuts."""
    return {name: tensor.detach().clone() for name, tensor in shortcut_tensors(model).items()}


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=torch.arange(3, 35).reshape(2, 16)).logits


def assert_chose(trainer: Trainer) -> None:
    """Some shortcuts were kept and some dropped, and the model has those that were kept, which have learned."""
    selection = trainer.selection
    assert 0 < len(selection.of_kind("shortcuts")) < len(selection.grid.of_kind("shortcuts"))
    assert sorted(shortcuts(trainer.model)) == sorted(selection.of_kind("shortcuts"))
    assert all(shortcut.B.any() for shortcut in shortcuts(trainer.model).values())


ACCUMULATED = {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2}
RUNS: dict[str, tuple[str, dict[str, Any]]] = {
    "classifier": ("cls", {}),
    "sft, accumulated": (
        "sft",
        {"args": ACCUMULATED, "train_dataset": lm_dataset(12), "search": {**SEARCHED, "shortcut_ranking": "combined"}},
    ),
    "scored once": ("cls", {"search": {**SCORED, "method": "snip"}}),
    "reallocated": ("sft", {"search": DYNAMIC}),
}


def cut_short(name: str, left: float) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[: int(len(content) * left)])

    return damage


def remove(*names: str) -> Callable[[Path], None]:
    return lambda folder: [(folder / name).unlink() for name in names] and None


JSON, BLOB = SHORTCUT_CONFIG_NAME, SHORTCUT_TENSORS_NAME
