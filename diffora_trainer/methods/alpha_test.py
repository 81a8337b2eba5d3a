"""The alpha test of HeteroLoRA (https://huggingface.co/papers/2406.14956, section 3.1)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..core.grid import Grid
from .base import ScoreMethod
from .context import MeanLosses, ScoreContext, Site
from .papers import HETEROLORA, ZERO_COST
from .registry import register_method


@register_method("alpha_test")
class AlphaTest(ScoreMethod):
    """
    For each module the smallest `a / 10`, `a` from 0 to 10, such that the loss stays within a tolerance when the
    module's contribution is multiplied by it, found by bisection. The tolerance is an average module's part of what
    all of them have gained: the loss without any, less the loss with all, divided by their number.

    A module whose loss without it is within the tolerance costs one forward pass over the batches, another one four
    or five. Eleven values make ties; between equal ones the rise of the loss without the module decides.
    """

    paper = HETEROLORA
    described = f"`alpha_test`, {ZERO_COST}"
    comparable = True
    compares_losses = True

    def num_passes(self, batches: int, grid: Grid, sites: Sequence[Site]) -> tuple[int, int]:
        return (2 + len(grid)) * batches, (2 + 5 * len(grid)) * batches

    def score(self, context: ScoreContext) -> tuple[Tensor, Tensor]:
        # Over several processes they have to bisect alike: where the model is sharded, one that made more passes than
        # another would wait for it for ever. So each loss is averaged over them.
        count, losses = len(context.grid), MeanLosses(context)

        def mean_loss(values: Tensor) -> float:
            with context.gated(values):
                return losses.mean()

        def without(index: int, tenths: int) -> float:
            values = torch.ones(count, dtype=torch.float32)
            values[index] = tenths / 10
            return mean_loss(values)

        whole = mean_loss(torch.ones(count, dtype=torch.float32))
        limit = whole + max(0.0, mean_loss(torch.zeros(count, dtype=torch.float32)) - whole) / count
        scores, rises = torch.zeros(count, dtype=torch.float64), torch.zeros(count, dtype=torch.float64)
        for index in range(count):
            off = without(index, 0)
            rises[index] = off - whole
            fails, holds = (-1, 0) if off <= limit else (0, 10)
            while holds - fails > 1:
                middle = (fails + holds) // 2
                fails, holds = (fails, middle) if without(index, middle) <= limit else (middle, holds)
            scores[index] = holds / 10
        return scores, rises
