"""ALoRA: what the held-out loss says of a component when it is alone, and when it is missing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..core.grid import Grid
from .context import MeanLosses, ScoreContext, Site
from .options import ScoreOptions
from .papers import Paper
from .ranks import RankMethod
from .registry import register_method


ALORA = Paper(
    "ALoRA",
    "https://huggingface.co/papers/2403.16187",
    """\
@article{liu2024alora,
    title  = {{ALoRA: Allocating Low-Rank Adaptation for Fine-tuning Large Language Models}},
    author = {Liu, Zequan and Lyn, Jiawen and Zhu, Wei and Tian, Xing and Graham, Yvette},
    year   = 2024,
    eprint = {arXiv:2403.16187},
}""",
)


@dataclass(frozen=True)
class ALoraOptions(ScoreOptions):
    """
    Options of `method="alora"`.

    Args:
        score_batches (`int`, *optional*, defaults to `1`): held-out batches that each component is tried on. There
            are two forward passes for each batch and each component.
    """

    score_batches: int = 1


@register_method("alora")
class ALora(RankMethod):
    """
    The importance of a component `k`, by ablation (AB-LoRA, section 3 of https://huggingface.co/papers/2403.16187):

    ```
    IS(k) = S(M) - S(M without k) + S(M with k alone)
    ```

    where `S` is the negative loss on held-out data, `M` the model with all components of all adapters, and the others
    are switched off by gates of 0. `S(M)` is the same for all, so what decides is `loss(without k) - loss(k alone)`.
    It is given against the loss of the bare model, so that a component that does nothing is worth 0 and one that does
    harm less than that; those are not kept, also where the budget has room for them.

    Chosen here: this is the formula as we know it from others' accounts of the paper, whose text we could not read.
    The paper moves a few ranks at a time, from modules that lose some to modules that lose none, in a run whose ranks
    are as many from its beginning to its end; here all components are there from the start, and the budget goes to the
    best of them at once. That is the limit of its moves in which every component has been tried.
    """

    paper = ALORA
    described = f"`alora`, the ablation of {ALORA.link} in an independent implementation"
    Options = ALoraOptions
    compares_losses = True
    reads_matrices = False
    keeps_worthless = False

    def num_passes(self, batches: int, grid: Grid, sites: Sequence[Site]) -> tuple[int, int]:
        count = (2 + 2 * self.num_scores) * batches
        return count, count

    def score(self, context: ScoreContext) -> Tensor:
        count, losses = self.num_scores, MeanLosses(context)

        def loss(open_: Tensor) -> float:
            with context.masked(self.split(open_)):
                return losses.mean()

        whole, bare = loss(torch.ones(count, dtype=torch.float32)), loss(torch.zeros(count, dtype=torch.float32))
        found = torch.zeros(count, dtype=torch.float64)
        for index in range(count):
            alone = torch.zeros(count, dtype=torch.float32)
            alone[index] = 1.0
            found[index] = (loss(1.0 - alone) - whole) + (bare - loss(alone))
        return found
