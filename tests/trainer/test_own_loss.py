"""A `compute_loss` that counts and logs: architecture steps leave no trace in it."""

from __future__ import annotations

from collections import Counter, defaultdict, deque
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from diffora_trainer import DiffoRATrainer
from diffora_trainer.trainer.bookkeeping import Snapshot
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


class Matching(DiffoRATrainer):
    """Has a term of activations that a hook puts into a list, and makes another list when it first needs it."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        features = self.features = []
        self.stale = {"steps": 0}
        self.last = (None,)
        layer = next(module for name, module in self.model.named_modules() if name.endswith("layers.0"))
        layer.register_forward_hook(lambda module, inputs, output: features.append(output))

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        self.features.clear()
        loss = super().compute_loss(model, inputs, *args, **kwargs)
        if not hasattr(self, "late"):
            self.late = []
        self.late.append(float(loss.detach()))
        [feature] = self.features  # of this pass
        assert feature is not self.last[0]
        self.last = (feature,)
        return loss + 0.01 * (feature[0] if isinstance(feature, tuple) else feature).float().square().mean()


def test_a_list_that_a_hook_fills_is_the_one_that_the_loss_reads(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, "llama", cls=Matching, search={"fade_out": 2, "search_micro_batches": 2})
    features = trainer.features
    trainer.train()
    assert trainer.selection is not None and trainer.features is features
    assert len(trainer.late) >= trainer.state.max_steps
    plain = make_trainer(tmp_path / "ratio", "llama", cls=Matching, search={"fade_out": 2})
    plain.train()
    assert len(plain.late) == plain.state.max_steps


class WithOutputs(DiffoRATrainer):
    """Returns outputs that nobody has asked for."""

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        return super().compute_loss(model, inputs, return_outputs=True)


def test_what_is_no_loss_is_named(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, "llama", cls=WithOutputs, search={"method": "snip", "discretize_at": 0})
    with pytest.raises(TypeError, match="loss function returned tuple, but one number is needed"):
        trainer.train()


def test_values_are_put_back_in_place() -> None:
    model, weight, small = object(), torch.zeros(2, requires_grad=True), [1]
    tensor, array, center = torch.zeros(3), np.zeros(3), torch.ones(2)
    trained = {"center": center}
    given = {
        "models": [model, (small,)],
        "count": Counter("ab"),
        "factory": defaultdict(list, a=[1]),
        "recent": deque([1], maxlen=1),
        "set": {1},
        "tensor": tensor,
        "array": array,
    }
    too_many, too_large = [list(range(100_000)), small], [torch.zeros(2**22 + 1)]
    snapshot = Snapshot()
    for value in (given, too_many, too_large, trained):
        snapshot.add(value)
    snapshot.put_copies()
    # As in a loss that first moves a center and then needs it for its backward pass.
    trained["center"].mul_(3)
    loss = (weight.exp() * trained["center"]).sum()
    given["models"].clear()
    small.append(2)
    given["count"]["a"] += 1
    given["factory"]["b"].append(1)
    given["factory"]["a"].append(1)
    given["recent"].append(2)
    given["set"].add(2)
    given["tensor"] += 1
    given["array"] += 1
    held = {**given, "tensor": tensor}
    given.clear()
    too_many.append(0)
    too_large[0].add_(1)
    snapshot.restore()
    assert set(given) == set(held) and all(given[name] is value for name, value in held.items())
    assert given["models"] == [model, (small,)] and small == [1]
    assert given["count"] == Counter("ab") and given["factory"] == {"a": [1]} and given["factory"]["c"] == []
    assert list(given["recent"]) == [1] and given["set"] == {1} and not tensor.any() and not array.any()
    assert len(too_many) == 3 and bool(too_large[0].any())
    loss.backward()
    assert weight.grad.tolist() == [3.0, 3.0] and trained["center"] is center and center.tolist() == [1.0, 1.0]
