"""GeLoRA: ranks by the intrinsic dimension of hidden states (https://huggingface.co/papers/2412.09250)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..logging import get_logger
from .context import ScoreContext
from .hidden import StateMethod, StateOptions, mean_of_layers, of_modules, reduced
from .papers import Paper
from .ranks import RankMethod, magnitudes
from .registry import register_method


logger = get_logger(__name__)

GELORA = Paper(
    "GeLoRA",
    "https://huggingface.co/papers/2412.09250",
    """\
@article{eddib2024gelora,
    title  = {{GeLoRA: Geometric Adaptive Ranks For Efficient LoRA Fine-tuning}},
    author = {Ed-dib, Abdessalam and Datbayev, Zhanibek and Aboussalah, Amine Mohamed},
    year   = 2024,
    eprint = {arXiv:2412.09250},
}""",
)

_FITTED = 0.9
"""Part of the ratios that the line is fitted to; the largest ones are those of points on the edge."""
_ROUNDING = 1e-5
"""
Part of the size of states by which equal ones may differ. It is of their size, not of their distances, since rounding
is: in float32 it makes some 1e-7 of it, while states of different texts are 1e-2 or more apart.
"""
_FEW = 30
"""With fewer points an estimate is a guess."""


@dataclass(frozen=True)
class GeLoraOptions(StateOptions):
    """
    Options of `method="gelora"`.

    Args:
        position (`str`, *optional*, defaults to `"mean"`): which state of a layer is the point of a row: that of its
            `"first"` or `"last"` token, the `"mean"` of all, or `"auto"`, the first where tokens see those behind
            them and the last elsewhere.
    """

    position: str = "mean"


@register_method("gelora")
class GeLora(StateMethod, RankMethod):
    """
    The intrinsic dimension of the states that come out of a layer, less that of the states that go into it, is a lower
    bound of the rank of its update. The ranks of all modules of a layer are in proportion to
    `max(d_out - d_in, 0) + 1`, with the dimensions estimated by TwoNN (Facco et al., 2017,
    https://huggingface.co/papers/1803.06992): with `mu` the ratio of the distances of a point to its second and its
    first neighbour, and `F` the part of the points whose ratio is not larger, `-log(1 - F(mu)) = d log(mu)`.

    Chosen here: of the paper we could confirm the bound and the estimator, but not the details of its experiments. The
    `+ 1` keeps a layer whose dimension falls from having none. There is one point for each row, the mean of its
    tokens; the line is fitted through the origin to the 90 % smallest ratios. Equal points count once, also where they
    differ by the rounding of float32, as the same text does in batches of different length: with a neighbour at
    distance 0 the dimension would come out near 0. Where a layer reads few values, as the first one does at the last
    token of texts that end with one of two, its dimension is 0. Where the bound is more or less than what the budget
    has room for, it is kept in proportion. Modules outside the numbered layers have the mean of the layers, and of the
    components of a module the largest stay. It needs a few hundred different rows: `score_batches` times the batch
    size. With fewer than 30 it warns.
    """

    paper = GELORA
    described = f"`gelora`, the ranks of {GELORA.link} in an independent implementation"
    Options = GeLoraOptions
    advice_on_ties = None  # layers may be alike, and rank 1 tells no components apart

    def score(self, context: ScoreContext) -> Tensor:
        states = [part for pair in self.states(context) for part in pair]
        nearest = [_neighbours(part) for part in states]
        most = max(map(len, nearest))
        estimated = [len(own) for own in nearest if not _are_few(len(own), most)]
        if (least := min(estimated, default=most)) < _FEW:
            logger.warning(
                f"The ranks of `method={self.name!r}` rest on dimensions that were estimated from {least} different "
                f"states of {len(states[0])} rows; it takes some hundreds for a good estimate. Please score on more "
                "batches (`score_batches`), of different texts."
            )
        dimensions = [_dimension(own, len(part), most) for own, part in zip(nearest, states, strict=True)]
        found = reduced(context, dimensions)
        layers = (found[1::2] - found[0::2]).clamp(min=0.0) + 1.0
        weights = of_modules(context.grid, layers, mean_of_layers(layers))
        return self.in_proportion(weights, [magnitudes(site) for site in context.sites])


def intrinsic_dimension(points: Tensor) -> float:
    """
    The dimension of the manifold that points lie on, by TwoNN; 0 if all are the same one.

    Args:
        points (`Tensor` of shape `(n, size)`): float64. Those that differ by rounding count once.

    Raises:
        ValueError: if there are fewer than three different points.
    """
    nearest = _neighbours(points)
    return _dimension(nearest, len(points), len(nearest))


def _neighbours(points: Tensor) -> Tensor:
    """For each of the `m` different points the distances to the two nearest of them, `(m, 2)`, if there are two."""
    apart = torch.cdist(points, points, compute_mode="donot_use_mm_for_euclid_dist")
    rounding = _ROUNDING * points.square().sum(dim=1).mean().sqrt()
    own = torch.arange(len(points))
    same = (apart <= rounding) | (own == own[:, None])  # also of what is not finite
    different = same.int().argmax(dim=1) == own  # the first one of those that are the same
    return apart[different][:, different].sort(dim=1).values[:, 1:3]


def _are_few(count: int, most: int) -> bool:
    """Whether states are some values that come again and again, while there are more of other layers."""
    return count < _FEW and 2 * count <= most


def _dimension(nearest: Tensor, rows: int, most: int) -> float:
    """
    The dimension by TwoNN; 0 where all points are the same one, or some few values.

    Args:
        nearest (`Tensor` of shape `(m, 2)`): what [`_neighbours`] gave.
        rows (`int`): how many points there were, equal ones too.
        most (`int`): how many different ones there are where there are most.
    """
    count = len(nearest)
    if (count == 1 and rows >= 3) or _are_few(count, most):
        return 0.0
    if count < 3:
        raise ValueError(
            f"The intrinsic dimension of {count} different states cannot be estimated; it takes three at least, "
            "and some hundreds for a good estimate. Please score on more batches (`score_batches`)."
        )
    ratios = (nearest[:, 1] / nearest[:, 0]).log().sort().values
    fitted = max(1, int(_FITTED * count))
    below = torch.arange(1, count + 1, dtype=torch.float64) / count
    x, y = ratios[:fitted], -torch.log1p(-below[:fitted])
    return float((x * y).sum() / (x * x).sum().clamp(min=torch.finfo(torch.float64).tiny))
