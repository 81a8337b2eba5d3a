"""PRILoRA: ranks that rise with the depth (https://huggingface.co/papers/2401.11316)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..core.values import check_number
from .context import ScoreContext, matrices_of, wide
from .hidden import input_squares, mean_of_layers, numbered_rows, of_modules
from .options import ScoreOptions
from .papers import Paper
from .ranks import RankMethod, rows_and_columns
from .registry import register_method


PRILORA = Paper(
    "PRILoRA",
    "https://huggingface.co/papers/2401.11316",
    """\
@article{benedek2024prilora,
    title  = {{PRILoRA: Pruned and Rank-Increasing Low-Rank Adaptation}},
    author = {Benedek, Nadav and Wolf, Lior},
    year   = 2024,
    eprint = {arXiv:2401.11316},
}""",
)


@dataclass(frozen=True)
class PriLoraOptions(ScoreOptions):
    """
    Options of `method="prilora"`.

    Args:
        first_to_last (`float`, *optional*, defaults to `1/3`): rank of the first layer as a part of that of the last
            one, positive. More than 1 lets ranks fall with the depth.
    """

    first_to_last: float = 1 / 3

    def __post_init__(self) -> None:
        super().__post_init__()
        value = check_number("first_to_last", self.first_to_last)
        object.__setattr__(self, "first_to_last", value)
        if value <= 0:
            raise ValueError(f"You passed `first_to_last={value}`; it must be positive.")


@register_method("prilora")
class PriLora(RankMethod):
    """
    The rank rises linearly from the first layer to the last, and is equal for all modules of a layer:
    `r_l = r_first + (r_last - r_first) (l - 1) / (L - 1)`. In each module, those components stay for which the sum
    of `|A_ij| ||x_j||` is largest, where `||x_j||` is the norm of the `j`-th input of the module over all tokens: the
    magnitude of a weight times the statistics of what it reads.

    Chosen here: the paper sets a few entries of `lora_A` to zero throughout the training by that importance. A plain
    adapter would store these zeros like any other number, so here it decides between whole components. The ratio of
    the first rank to the last one is 1 to 3 by default, and the budget sets their size. Modules outside the numbered
    layers have the mean rank of the layers.
    """

    paper = PRILORA
    described = f"`prilora`, the ranks of {PRILORA.link} in an independent implementation"
    Options = PriLoraOptions
    reads_inputs = True
    advice_on_ties = None  # layers may be alike, and rank 1 tells no components apart

    def score(self, context: ScoreContext) -> Tensor:
        count = len(numbered_rows(context.grid))
        layers = torch.linspace(self.options.first_to_last if count > 1 else 1.0, 1.0, count, dtype=torch.float64)
        importance = []
        for site, squares in zip(context.sites, input_squares(context), strict=True):
            a = wide(rows_and_columns(matrices_of(site))[0]).cpu().double()
            importance.append((a.abs() * squares.sqrt()).sum(dim=1))
        return self.in_proportion(of_modules(context.grid, layers, mean_of_layers(layers)), importance)
