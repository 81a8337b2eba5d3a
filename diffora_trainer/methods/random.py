"""A random order: the control that every other method is compared to."""

from __future__ import annotations

import torch
from torch import Tensor

from .base import ScoreMethod
from .context import ScoreContext
from .registry import register_method


@register_method("random")
class Random(ScoreMethod):
    """
    Random numbers from a generator of their own, seeded by `arch_seed`: every set of modules is as likely as another
    of its size. When the modules are scored more than once, each time is another draw.
    """

    described = "chance"
    informed = False
    normalizable = False
    comparable = True
    reads_data = False

    def score(self, context: ScoreContext) -> Tensor:
        generator = torch.Generator(device="cpu").manual_seed(self.seed)
        shape = (context.draw + 1, len(context.grid))
        return torch.rand(shape, dtype=torch.float64, generator=generator, device="cpu")[-1]
