"""How gates of components are trained."""

from __future__ import annotations

import torch
from torch import Tensor


_BETAS, _EPSILON = (0.9, 0.999), 1e-8


class Adam:
    """
    Adam on a vector, with a state that a method can save.

    Args:
        count (`int`): how many numbers.
    """

    def __init__(self, count: int) -> None:
        self._mean, self._square, self._steps = (torch.zeros(count, dtype=torch.float32) for _ in range(3))

    def step(self, gradient: Tensor, learning_rate: float) -> Tensor:
        """What to add to the vector."""
        first, second = _BETAS
        self._steps += 1
        self._mean.lerp_(gradient, 1 - first)
        self._square.lerp_(gradient.square(), 1 - second)
        size = (self._square / (1 - second**self._steps)).sqrt() + _EPSILON
        return -learning_rate * (self._mean / (1 - first**self._steps)) / size

    def forget(self, place: slice) -> None:
        """Begin anew for some of the numbers."""
        for moments in (self._mean, self._square, self._steps):
            moments[place] = 0.0

    def tensors(self) -> dict[str, Tensor]:
        """Its state."""
        return {"adam_mean": self._mean, "adam_square": self._square, "adam_steps": self._steps}
