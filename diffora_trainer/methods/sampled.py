"""Gates in {0, 1} drawn at the target ratio, with a straight-through gradient; the weights train under such gates."""

from __future__ import annotations

import torch
from torch import Tensor

from ..core.budget import Budget
from .base import GradientMethod
from .context import bounded
from .registry import register_method


@register_method("sampled")
class Sampled(GradientMethod):
    """
    Gates in {0, 1}, drawn without replacement at the target ratio (Gumbel top-k, Kool et al., 2019,
    https://huggingface.co/papers/1903.06059). The gradient of the held-out loss at the drawn gates passes straight
    through to the logits, which move by plain gradient ascent in units of the root mean square of all gains: Adam's
    normalisation of each entry would make a useless module's noise as large as a useful one's gain.
    """

    default_learning_rate = 0.1

    def __init__(self, budget: Budget, learning_rate: float | None = None, seed: int = 0) -> None:
        super().__init__(budget, learning_rate, seed)
        self._logits = torch.zeros(len(budget), dtype=torch.float32)
        self._mean_square = torch.zeros((), dtype=torch.float32)

    def values(self) -> Tensor:
        return self.budget.calibrate(self._logits)

    def scores(self) -> Tensor:
        return self._logits.clone()

    def training_gates(self) -> Tensor:
        drawn = torch.empty(len(self.budget), dtype=torch.float32, device="cpu")
        noise = -drawn.exponential_(generator=self.generator).log()
        return self.budget.discretize(self._logits + noise).float()

    def evaluation_gates(self) -> Tensor:
        return self.discretize().float()  # of the kind that the weights train under

    def search_gates(self) -> Tensor:
        return self.training_gates()

    def step(self, gradient: Tensor) -> None:
        self.steps += 1
        gradient = bounded(gradient)
        # The average over the steps so far, so that early steps are not blown up.
        self._mean_square.lerp_(gradient.square().mean(), 1.0 / min(self.steps, 10))
        scale = self._mean_square.sqrt().clamp(min=1e-12)
        assert self.learning_rate is not None
        self._logits.sub_(gradient / scale, alpha=self.learning_rate)

    def _tensors(self) -> dict[str, Tensor]:
        return {"logits": self._logits, "mean_square": self._mean_square}
