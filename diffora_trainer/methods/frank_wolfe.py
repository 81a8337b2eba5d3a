"""The default: the matrix inside of the budget polytope, moved by stochastic Frank-Wolfe steps."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..core.budget import Budget
from .base import GradientMethod
from .context import bounded
from .options import GradientOptions
from .registry import register_method


@dataclass(frozen=True)
class FrankWolfeOptions(GradientOptions):
    """Options of `method="diffora"`: those of every search; `arch_learning_rate` is at most 1."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.arch_learning_rate is not None and self.arch_learning_rate > 1:
            raise ValueError(
                f"You passed `arch_learning_rate={self.arch_learning_rate}` with `method='diffora'`. It is the length "
                "of a Frank-Wolfe step, and a step longer than 1 leaves the budget. Use a value in (0, 1]."
            )


@register_method("diffora")
class FrankWolfe(GradientMethod):
    """
    The matrix kept in the budget polytope `{0 <= gate <= 1, sum of gates <= budget}` and learned by stochastic
    Frank-Wolfe: at each step `t` it moves by `2 / (t + 2)` towards the set within the budget that has the largest
    linear gain on held-out data. One held-out batch is noisy, so gains are averaged over steps, as Mokhtari et al.,
    2018 (https://huggingface.co/papers/1804.09554) do. The newest weighs `2 / (t + 1)`, which makes the weights rise
    linearly with `t`: it remembers longer than their `(t + 8)^(-2/3)`, since a search makes tens of steps and not
    thousands.

    It is zero-sum by construction, needs no learning rate, and drifts towards a 0/1 matrix. The gradient is taken at
    the matrix itself, so near the target sparsity: with all gates at 1 it would ask which module wants *more*, and
    rank the modules that have already learned last. The weights train with all gates open, so that until the gates of
    others fade out a run is, bit for bit, one of plain LoRA on all modules and the rows that are not held out.
    """

    Options = FrankWolfeOptions
    trains_open = True
    spends_ranks = True

    def __init__(self, budget: Budget, learning_rate: float | None = None, seed: int = 0) -> None:
        super().__init__(budget, learning_rate, seed)
        self._values = budget.share.float()
        self._gains = torch.zeros(len(budget), dtype=torch.float32)

    def values(self) -> Tensor:
        return self._values.clone()

    def step(self, gradient: Tensor) -> None:
        self.steps += 1
        self._gains.lerp_(-bounded(gradient), 2.0 / (self.steps + 1.0))
        length = 2.0 / (self.steps + 2.0) if self.learning_rate is None else self.learning_rate
        self._values.lerp_(self.budget.linear_oracle(self._gains), length).clamp_(0.0, 1.0)

    def tie_breaker(self) -> Tensor:
        # Several modules can stand at exactly 0 or 1; the averaged gain says which of them is worth more.
        return self._gains.clone()

    def worth(self) -> Tensor:
        return self._gains.clone()

    def _tensors(self) -> dict[str, Tensor]:
        return {"values": self._values, "gains": self._gains}
