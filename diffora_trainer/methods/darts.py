"""Logits learned by Adam, as in DARTS (https://huggingface.co/papers/1806.09055): sigmoids, or a softmax."""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import Tensor

from ..core.budget import Budget
from .base import GradientMethod
from .context import bounded
from .registry import register_method


class _AdamMatrix(GradientMethod):
    """Logits learned by Adam with DARTS' betas; the subclass says how logits become gates."""

    default_learning_rate = 0.05

    def __init__(self, budget: Budget, learning_rate: float | None = None, seed: int = 0) -> None:
        super().__init__(budget, learning_rate, seed)
        self._logits = torch.zeros(len(budget), dtype=torch.float32, requires_grad=True)
        assert self.learning_rate is not None
        self._optimizer = torch.optim.Adam([self._logits], lr=self.learning_rate, betas=(0.5, 0.999))
        # Create the moments now, so that the state has the same entries before and after the first step.
        self._logits.grad = torch.zeros_like(self._logits)
        self._optimizer.step()
        self._optimizer.state[self._logits]["step"].zero_()

    @abstractmethod
    def _relax(self, logits: Tensor) -> Tensor:
        """Logits to gates in [0, 1], differentiable."""

    def values(self) -> Tensor:
        with torch.no_grad():
            return self._relax(self._logits)

    def step(self, gradient: Tensor) -> None:
        self.steps += 1
        self._optimizer.zero_grad()
        self._relax(self._logits).backward(bounded(gradient))
        self._optimizer.step()

    def _tensors(self) -> dict[str, Tensor]:
        state = self._optimizer.state[self._logits]
        return {"logits": self._logits, **{f"adam_{name}": state[name] for name in ("step", "exp_avg", "exp_avg_sq")}}


@register_method("sigmoid")
class Sigmoid(_AdamMatrix):
    """
    Independent sigmoids learned by Adam, under which the weights train: DARTS
    (https://huggingface.co/papers/1806.09055) read literally.
    """

    def _relax(self, logits: Tensor) -> Tensor:
        return torch.sigmoid(logits)


@register_method("softmax")
class Softmax(_AdamMatrix):
    """
    A softmax over each row, or over the whole matrix when that is the scope of the choice, times the number of modules
    that may be kept, at most 1. Zero-sum: a gate can rise only if others fall. The weights train with all gates open:
    under the soft gates they would make up for small ones, and the useful modules would ask for less.
    """

    trains_open = True

    def _relax(self, logits: Tensor) -> Tensor:
        budget = self.budget
        # The same shift for all logits of a group changes no softmax and keeps `exp` in range.
        largest = torch.zeros(len(budget.targets), dtype=torch.float32).scatter_reduce(
            0, budget.group, logits.detach(), "amax", include_self=False
        )
        weights = (logits - largest[budget.group]).exp()
        totals = torch.zeros(len(budget.targets), dtype=torch.float32).index_add(0, budget.group, weights)
        counts = budget.counts_of_groups().float()
        return (weights / totals[budget.group] * counts[budget.group]).clamp(max=1.0)
