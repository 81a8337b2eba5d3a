"""A `compute_loss` that counts and logs: architecture steps leave no trace in it."""

from __future__ import annotations

from collections import Counter, defaultdict, deque
from pathlib import Path
from typing import Any

import numpy as np
import torch

from diffora_trainer import DiffoRATrainer
from diffora_trainer.trainer.bookkeeping import own_containers
from helpers.trainers import make_trainer


class Counting(DiffoRATrainer):
    """Notes each loss in every way that somebody may think of."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.number, self.tensor, self.array = 0, torch.zeros(()), np.zeros(1)
        self.losses, self.recent = [], deque(maxlen=100)
        self.nested = {"all": defaultdict(list), "count": Counter()}
        self.also_nested = self.nested["all"]
        self.shapes = set()
        self.untouched = {"model": self.model}

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        loss = super().compute_loss(model, inputs, *args, **kwargs)
        value = float(loss.detach())
        self.number += 1
        self.tensor += 1
        self.array += 1
        self.losses.append(value)
        self.recent.append(value)
        self.nested["all"]["loss"].append(value)
        self.nested["count"]["loss"] += 1
        self.also_nested["again"].append(value)
        self.shapes.add(value)
        assert self.untouched["model"] is self.model
        self.log({"own_loss": value})
        return loss


def test_architecture_steps_leave_no_trace_in_a_loss_of_ones_own(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, "llama", cls=Counting, search={"fade_out": 2})
    held, losses = trainer.nested["all"], trainer.losses
    trainer.train()
    assert trainer.selection is not None
    steps, logged = trainer.state.max_steps, [log for log in trainer.state.log_history if "own_loss" in log]
    assert (trainer.number, float(trainer.tensor), trainer.array.tolist()) == (steps, steps, [steps])
    assert len(logged) == len(losses) == len(trainer.recent) == len(trainer.shapes) == steps
    assert [log["own_loss"] for log in logged] == losses
    assert trainer.nested["count"] == {"loss": steps} and held["loss"] == held["again"] == losses
    assert trainer.nested["all"] is trainer.also_nested is held and trainer.losses is losses


def test_what_is_copied_of_a_trainer() -> None:
    model, weight, small = object(), torch.zeros(2, requires_grad=True), [1]
    given = {
        "models": [model],
        "weight": weight,
        "many": [small, list(range(100_000))],
        "small": small,
        "large": torch.zeros(2**22 + 1),
        "text": "a",
        "size": torch.Size([2]),
        "factory": defaultdict(lambda: 7),
    }
    found = own_containers(given)
    assert set(found) == {"models", "small", "factory"}
    assert found["models"] is not given["models"] and found["models"][0] is model
    assert (
        found["small"] == small and found["small"] is not small and found["factory"][0] == 7 and not given["factory"]
    )
