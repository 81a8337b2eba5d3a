"""What the tests of reallocation share."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from diffora_trainer.methods.base import ScoreMethod


DYNAMIC = {"method": "snip", "reallocate_every": 2, "selection_scope": "model", "score_batches": 2}
MOMENTS = [3, 5, 7]  # from the end of the warm-up, before the pruning at step 8


def weights_of(model: nn.Module, name: str) -> list[str]:
    return [f"base_model.model.{name}.lora_{part}.default.weight" for part in "AB"]


def rotating(monkeypatch: pytest.MonkeyPatch) -> None:
    """Scores of which a third of the modules is best in turn, so that modules go, wait and come back."""

    def choose(self: ScoreMethod) -> Tensor:
        return torch.arange(len(self.budget)) % 3 == self.steps % 3

    monkeypatch.setattr(ScoreMethod, "discretize", choose)
