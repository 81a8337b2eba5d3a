"""GeLoRA: ranks by the intrinsic dimension of hidden states (https://huggingface.co/papers/2412.09250)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..core.grid import Grid
from ..core.ranks import RankBudget
from .context import ScoreContext, Site
from .hidden import (
    check_layers,
    check_position,
    is_constant,
    layer_states,
    mean_of_layers,
    of_modules,
    passes_for_states,
    reduced,
)
from .options import ScoreOptions
from .papers import GELORA
from .ranks import RankMethod, magnitudes
from .registry import register_method


_FITTED = 0.9
"""Part of the ratios that the line is fitted to; the largest ones are those of points on the edge."""


@dataclass(frozen=True)
class GeLoraOptions(ScoreOptions):
    """
    Options of `method="gelora"`.

    Args:
        position (`str`, *optional*, defaults to `"mean"`): which state of a layer is the point of a row: that of its
            `"first"` or `"last"` token, the `"mean"` of all, or `"auto"`, the first where tokens see those behind
            them and the last elsewhere.
    """

    position: str = "mean"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_position(self.position)


@register_method("gelora")
class GeLora(RankMethod):
    """
    The intrinsic dimension of the states that come out of a layer, less that of the states that go into it, is a lower
    bound of the rank of its update. The ranks of all modules of a layer are in proportion to
    `max(d_out - d_in, 0) + 1`, with the dimensions estimated by TwoNN (Facco et al., 2017,
    https://huggingface.co/papers/1803.06992): with `mu` the ratio of the distances of a point to its second and its
    first neighbour, and `F` the part of the points whose ratio is not larger, `-log(1 - F(mu)) = d log(mu)`.

    Chosen here: of the paper we could confirm the bound and the estimator, but not the details of its experiments. The
    `+ 1` keeps a layer whose dimension falls from having none. There is one point for each row, the mean of its
    tokens; the line is fitted through the origin to the 90 % smallest ratios; equal points count once. Where the bound
    is more or less than what the budget has room for, it is kept in proportion. Modules outside the numbered layers
    have the mean of the layers, and of the components of a module the largest stay. It needs a few hundred rows:
    `score_batches` times the batch size.
    """

    paper = GELORA
    described = f"`gelora`, the ranks of {GELORA.link} in an independent implementation"
    Options = GeLoraOptions

    def prepare(self, grid: Grid, ranks: RankBudget | None) -> None:
        super().prepare(grid, ranks)
        check_layers(grid)

    def try_out(self, context: ScoreContext) -> None:
        layer_states(context, self.options.position)

    def num_passes(self, batches: int, grid: Grid, sites: Sequence[Site]) -> tuple[int, int]:
        count = passes_for_states(batches, grid, self.options.position)
        return count, count

    def score(self, context: ScoreContext) -> Tensor:
        states = layer_states(context, self.options.position)
        found = reduced(context, [intrinsic_dimension(part) for pair in states for part in pair])
        layers = (found[1::2] - found[0::2]).clamp(min=0.0) + 1.0
        weights = of_modules(context.grid, layers, mean_of_layers(layers))
        return self.in_proportion(weights, [magnitudes(site) for site in context.sites])


def intrinsic_dimension(points: Tensor) -> float:
    """
    The dimension of the manifold that points lie on, by TwoNN; 0 if all are the same one.

    Args:
        points (`Tensor` of shape `(n, size)`): float64.

    Raises:
        ValueError: if there are fewer than three different points.
    """
    if len(points) >= 3 and is_constant(points):
        return 0.0  # as the states that go into the first layer are, where all texts begin or end with one token
    points = torch.unique(points, dim=0)
    if len(points) < 3:
        raise ValueError(
            f"The intrinsic dimension of {len(points)} different states cannot be estimated; it takes three at least, "
            "and some hundreds for a good estimate. Please score on more batches (`score_batches`)."
        )
    nearest = torch.cdist(points, points, compute_mode="donot_use_mm_for_euclid_dist").sort(dim=1).values[:, 1:3]
    ratios = (nearest[:, 1] / nearest[:, 0]).log().sort().values
    count = max(1, int(_FITTED * len(ratios)))
    below = torch.arange(1, len(ratios) + 1, dtype=torch.float64) / len(ratios)
    x, y = ratios[:count], -torch.log1p(-below[:count])
    return float((x * y).sum() / (x * x).sum().clamp(min=torch.finfo(torch.float64).tiny))
