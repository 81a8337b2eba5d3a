"""SoRA: gates of components with a soft threshold after each step (https://huggingface.co/papers/2311.11696)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..core.budget import Budget
from ..core.grid import Grid
from ..core.ranks import RankBudget
from ..core.values import check_number
from .context import ScoreContext, Site, bounded
from .gate_steps import Adam
from .options import MethodOptions
from .papers import SORA
from .ranks import RankMethod
from .registry import register_method


@dataclass(frozen=True)
class SoraOptions(MethodOptions):
    """
    Options of `method="sora"`.

    Args:
        gate_learning_rate (`float`, *optional*): step size of the gates. Defaults to that of the weights, whose
            schedule it then follows.
        threshold (`float`, *optional*, defaults to `3e-4`): by how much each gate moves towards 0 after each step. It
            should be smaller than the learning rate, which is about the largest step away from 0.
    """

    gate_learning_rate: float | None = None
    threshold: float = 3e-4

    def __post_init__(self) -> None:
        for name in ("gate_learning_rate", "threshold"):
            if getattr(self, name) is None:
                continue
            value = check_number(name, getattr(self, name))
            object.__setattr__(self, name, value)
            if value < 0 or (value == 0 and name == "gate_learning_rate"):
                raise ValueError(f"You passed `{name}={value}`; it must be positive.")


@register_method("sora")
class Sora(RankMethod):
    """
    Each component has a gate, `B diag(g) A`, that is trained with the weights, on the same batches and the same loss.
    After each step it is moved towards 0 by a threshold, and stays at 0 where it would change its sign: the proximal
    step of an L1 penalty,

    ```
    g <- T(g - step),        T(x) = sign(x) max(|x| - threshold, 0)
    ```

    with the step of Adam. The components with the largest `|g|` are kept, none whose gate is 0, and what is left of
    the gates is multiplied into `lora_B`. Gates learn from the first step on, until `discretize_at`.

    Chosen here: gates start at 1, so that a run begins as one of plain LoRA (in the authors' code they are drawn at
    random). In the paper the threshold is `learning rate x lambda`, in the code a number of its own, 3e-4 in its
    script, which is the default here; it alone decides there how many components are left, while here the budget has
    the last word. To let the threshold decide, pass `selection_ratio=1.0`, and give it enough steps to get from 1
    to 0.
    """

    paper = SORA
    described = f"`sora`, the gates of {SORA.link} in an independent implementation"
    Options = SoraOptions
    trains_gates = True
    reads_data = False
    keeps_worthless = False
    reads_matrices = False

    def __init__(self, budget: Budget, seed: int = 0) -> None:
        super().__init__(budget, seed)
        self._gates = torch.ones(len(budget), dtype=torch.float32)
        self._adam = Adam(len(budget))

    def prepare(self, grid: Grid, ranks: RankBudget | None) -> None:
        super().prepare(grid, ranks)
        self._gates = torch.ones(self.num_scores, dtype=torch.float32)
        self._adam = Adam(self.num_scores)

    def component_gates(self) -> list[Tensor]:
        return [own.clone() for own in self.split(self._gates)]

    def doubt_gates(self, steps: int, learning_rate: float) -> str | None:
        threshold = self.options.threshold
        if learning_rate > threshold or steps * threshold < 1:
            return None
        return (
            f"A gate of `method='sora'` is moved by the threshold of {threshold:g} towards 0 after each of {steps:,} "
            f"steps, and a step away from it is {learning_rate:g} at most, so that all gates can be 0 before the "
            "choice. Please pass a smaller `threshold`, or a larger `gate_learning_rate`, in `method_options`."
        )

    def gate_step(self, gradient: Tensor, learning_rate: float) -> None:
        self.steps += 1
        moved = self._gates + self._adam.step(bounded(gradient), learning_rate)
        self._gates.copy_(moved.sign() * (moved.abs() - self.options.threshold).clamp(min=0.0))
        self._scores.copy_(self._gates.abs())

    def score(self, context: ScoreContext) -> Tensor:
        return self._gates.abs().double()

    def components(self) -> Tensor:
        tie = bool((self._scores == self._scores[0]).all())
        if self.steps and tie and not self.keeps_all(self._scores):
            raise ValueError(
                f"All {len(self._scores)} gates of `method='sora'` are {float(self._scores[0]):g}, so there is "
                "nothing to choose by. While `lora_B` is still 0 they have no gradient. Please choose later "
                "(`discretize_at`), or with a smaller `threshold`."
            )
        return super().components()

    def before_pruning(self, sites: Sequence[Site]) -> None:
        for site, own in zip(sites, self.split(self._gates), strict=True):
            site.fold_components(own)
        self._gates.fill_(1.0)  # what they were is in the weights

    def _tensors(self) -> dict[str, Tensor]:
        return {**super()._tensors(), "gates": self._gates, **self._adam.tensors()}
