"""Methods that train a gate for each component, beside the weights and by the same loss."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..core.budget import Budget
from ..core.grid import Grid
from ..core.ranks import RankBudget
from ..core.values import check_number
from .context import ScoreContext, Site, bounded
from .options import MethodOptions
from .ranks import RankMethod


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


@dataclass(frozen=True)
class GateOptions(MethodOptions):
    """
    Options of a method that trains gates, as they stand in `DiffoRAConfig(method_options=...)`.

    Args:
        gate_learning_rate (`float`, *optional*): step size of what the gates are made from. Defaults to that of the
            weights, whose schedule it then follows.
    """

    gate_learning_rate: float | None = None

    def __post_init__(self) -> None:
        if self.gate_learning_rate is None:
            return
        rate = check_number("gate_learning_rate", self.gate_learning_rate)
        object.__setattr__(self, "gate_learning_rate", rate)
        if rate <= 0:
            raise ValueError(f"You passed `gate_learning_rate={rate}`; it must be positive.")


class GateMethod(RankMethod):
    """
    A method with a gate for each component that the training loss moves, at each step until the choice. What the gates
    have come to is multiplied into `lora_B` then.

    A new one is a subclass that says which gates its `numbers` make ([`gates`]), and how a gradient of the gates moves
    these ([`move`]), such as by the step that its `adam` gives. A component is worth the size of its gate.

    Attributes:
        numbers (`Tensor` of shape `(m,)`): what is trained, a number for each component, in float32.
        adam ([`Adam`]): Adam on these numbers.
    """

    Options: ClassVar[type[MethodOptions]] = GateOptions
    trains_gates = True
    reads_data = False
    reads_matrices = False
    begins_at: ClassVar[float] = 1.0
    """The number of each component at first, where its gate is 1: so a run begins as one of plain LoRA."""
    saved_as: ClassVar[str] = "gates"
    """What a saved state calls the numbers."""

    def __init__(self, budget: Budget, seed: int = 0) -> None:
        super().__init__(budget, seed)
        self._begin()

    def prepare(self, grid: Grid, ranks: RankBudget | None) -> None:
        super().prepare(grid, ranks)
        self._begin()

    def _begin(self) -> None:
        self.numbers = torch.full((self.num_scores,), self.begins_at, dtype=torch.float32)
        self.adam = Adam(self.num_scores)

    @abstractmethod
    def gates(self) -> Tensor:
        """The gates of all components that the present numbers make, `(m,)` in float32."""

    @abstractmethod
    def move(self, gradient: Tensor, learning_rate: float) -> None:
        """
        Move the numbers.

        Args:
            gradient (`Tensor` of shape `(m,)`): that of the training loss with respect to [`gates`].
            learning_rate (`float`): the step size of the numbers: their own (`gate_learning_rate`), or else the
                present one of the weights.
        """

    def component_gates(self) -> list[Tensor]:
        """The gates of the next training step: `(r,)` for each module, in float32."""
        return [own.clone() for own in self.split(self.gates())]

    def doubt_gates(self, steps: int, learning_rate: float) -> str | None:
        """
        What the log warns of before the gates are trained, if anything.

        Args:
            steps (`int`): how often they are moved before the choice.
            learning_rate (`float`): the largest step of each time.
        """
        return None

    def gate_step(self, gradient: Tensor, learning_rate: float) -> None:
        """
        Learn from a training step.

        Args:
            gradient (`Tensor` of shape `(m,)`): that of the training loss, finite float32.
            learning_rate (`float`): see [`move`].
        """
        self.steps += 1
        self.move(bounded(gradient), learning_rate)
        self._scores.copy_(self.gates().abs())

    def after_gate_step(self, sites: Sequence[Site], progress: float) -> None:  # noqa: B027 (most change no weight)
        """
        Change the weights after a step of the gates.

        Args:
            sites (`Sequence[Site]`): the modules, in the order of the grid.
            progress (`float`): part of the steps until the choice that were made, in (0, 1].
        """

    def score(self, context: ScoreContext) -> Tensor:
        return self.gates().abs().double()

    def before_pruning(self, sites: Sequence[Site]) -> None:
        for site, own in zip(sites, self.component_gates(), strict=True):
            site.fold_components(own)
        self.numbers.fill_(self.begins_at)  # what they were is in the weights

    def _tensors(self) -> dict[str, Tensor]:
        return {**super()._tensors(), self.saved_as: self.numbers, **self.adam.tensors()}
