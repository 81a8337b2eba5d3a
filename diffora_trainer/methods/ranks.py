"""Methods that say how much: what each component of an adapter is worth, and so which rank its module keeps."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..core.budget import Budget, tied_at_boundary
from ..core.grid import LORA, Grid
from ..core.ranks import RankBudget
from .base import ScoreMethod
from .context import ScoreContext, Site, matrices_of, wide


class RankMethod(ScoreMethod):
    """
    A method that gives ranks. It says what each *component* is worth, a row of `lora_A` with its column of `lora_B`,
    and the best ones of the whole model are kept as long as the budget has room for them. A module ends with any rank
    up to that of its configuration, also with none, and its adapter really becomes smaller. All modules begin at full
    rank and are cut once, at `discretize_at`.

    A new one is a subclass with a [`score`] that returns a number for each component: those of the first module in the
    order of the grid, then those of the second, and so on (see [`split`]). [`spread`] makes them of ranks that were
    found for modules or layers.

    Where whole modules are kept or pruned (`selection_granularity="module"`, or a limit that knows no ranks), a module
    is worth what its components are together.
    """

    tells_ranks = True
    compares_layers = True
    normalizable = False
    comparable = True
    shardable = False
    reads_matrices: ClassVar[bool] = True
    """Whether it looks at the rows of `lora_A` and the columns of `lora_B`, whatever the gates of an adapter act on.
    If not, it closes gates, and an adapter whose components cannot be gated one by one counts as one component."""
    reads_inputs: ClassVar[bool] = False
    """Whether it looks at the vectors that `lora_A` multiplies."""

    def __init__(self, budget: Budget, seed: int = 0) -> None:
        super().__init__(budget, seed)
        self._counts = [1] * len(budget)
        self._ranks: RankBudget | None = None

    def inspect(self, model: Any, sites: Sequence[Site]) -> None:
        others = [site.name for site in sites if site.kind != LORA]
        if others:
            raise ValueError(
                f"You passed `method={self.name!r}`, which looks at single components of a LoRA, for a model with "
                f"other sites, such as {others[0]!r}. Please take them out, or use another method, such as 'snip'."
            )
        for site in sites:
            if self.reads_matrices and site.matrices is None:
                raise ValueError(
                    f"You passed `method={self.name!r}`, which looks at the rows of `lora_A` and the columns of "
                    f"`lora_B`, but the adapter of {site.name!r} ({type(site).__name__}) has no such pair of trained "
                    "matrices. Please use plain LoRA there, or another method, such as 'snip'."
                )
            if self.reads_inputs and not site.reads_vectors:
                raise ValueError(
                    f"You passed `method={self.name!r}`, which looks at the vectors that a module reads, but "
                    f"{site.name!r} is an embedding, which reads indices. Please leave it out of `target_modules`, or "
                    "use another method, such as 'adalora'."
                )
        self._counts = [
            site.num_components if site.matrices is None or not self.reads_matrices else len(site.matrices[0])
            for site in sites
        ]

    def prepare(self, grid: Grid, ranks: RankBudget | None) -> None:
        self._ranks = ranks
        if ranks is not None:  # then all adapters can be resized, so that each unit of rank is a component
            self._counts = list(grid.ranks)
        self._scores = torch.zeros(self.num_scores, dtype=torch.float64)
        self._tie_breaker = torch.zeros(self.num_scores, dtype=torch.float64)

    @abstractmethod
    def score(self, context: ScoreContext) -> Tensor | tuple[Tensor, Tensor]:
        """
        What each component is worth: as [`ScoreMethod.score`], but of shape `(m,)`, with a number for each component.
        """

    @property
    def owner(self) -> Tensor:
        return torch.arange(len(self._counts)).repeat_interleave(torch.tensor(self._counts))

    def scores(self) -> Tensor:
        return self._sum(self._scores)

    def tie_breaker(self) -> Tensor:
        return self._sum(self._tie_breaker)

    def component_scores(self) -> Tensor:
        """What each component was found to be worth, `(m,)`; 0 before it was scored."""
        return self._scores.clone()

    def split(self, values: Tensor) -> list[Tensor]:
        """Numbers of all components, `(m,)`, as those of each module."""
        return list(values.split(self._counts))

    def spread(self, found: Sequence[Tensor], importance: Sequence[Tensor]) -> Tensor:
        """
        What components are worth of which it is known what the first, the second, ... of each module adds, but not
        which one is the first: that is the most important one.

        Args:
            found (`Sequence[Tensor]` of length `n`): for each module as many falling numbers as it has components.
            importance (`Sequence[Tensor]` of length `n`): how important each of them is, such as [`magnitudes`].
        """
        worth = []
        for values, sizes in zip(found, importance, strict=True):
            own = torch.empty(len(sizes), dtype=torch.float64)
            own[torch.sort(sizes, descending=True, stable=True).indices] = values.double()
            worth.append(own)
        return torch.cat(worth)

    def in_proportion(self, weights: Tensor, importance: Sequence[Tensor]) -> Tensor:
        """
        What components are worth of modules whose ranks should be in proportion to some positive weights, `(n,)`: a
        module of weight `w` has the right to its `j`-th component before others of a smaller `w / j`. Under any budget
        this makes ranks as near to proportional as whole numbers can be (the rule of D'Hondt), but each module has its
        first component before any has its second.
        """
        found = []
        for weight, sizes in zip(weights.double(), importance, strict=True):
            shares = weight / torch.arange(1, len(sizes) + 1)
            shares[0] += weights.max()
            found.append(shares)
        return self.spread(found, importance)

    def components(self) -> Tensor:
        """
        Which components are kept under the budget, `(m,)` bools. Changes nothing.

        Raises:
            ValueError: if nothing was scored yet, or no component is worth keeping.
        """
        if not self.steps or self._ranks is None:
            raise ValueError("The components have no scores yet. Please call `score` before the choice is made.")
        worth, ties, owner = self._scores.tolist(), self._tie_breaker.tolist(), self.owner.tolist()
        able = [index for index in range(len(owner)) if self.keeps_worthless or worth[index] > 0]
        able.sort(key=lambda index: (-worth[index], -ties[index], index))
        kept = torch.zeros(len(owner), dtype=torch.bool)
        kept[self._ranks.take([0] * len(self._counts), owner, able)] = True
        if not kept.any():
            raise ValueError(
                f"`method={self.name!r}` found no component worth keeping: the largest score of "
                f"{len(owner)} is {max(worth):g}. Please score later (`discretize_at`), or use another method."
            )
        return kept

    def kept_components(self) -> tuple[tuple[int, ...], ...]:
        return tuple(tuple(own.nonzero().flatten().tolist()) for own in self.split(self.components()))

    def discretize(self) -> Tensor:
        if self._ranks is None:
            return super().discretize()
        return torch.tensor([bool(own) for own in self.kept_components()])

    def keeps_all(self, scores: Tensor) -> bool:
        if self._ranks is None:
            return super().keeps_all(scores)
        return self._ranks.fits(self._counts) and (self.keeps_worthless or bool((scores > 0).all()))

    def num_boundary_ties(self) -> int:
        if self._ranks is None:
            return super().num_boundary_ties()
        if max(self._counts) > 1:
            return 0  # of components, which are many and small
        keys = list(zip(self._scores.tolist(), self._tie_breaker.tolist(), strict=True))
        return sum(tied_at_boundary(keys, self.discretize().tolist()))

    def _sum(self, numbers: Tensor) -> Tensor:
        return torch.zeros(len(self.budget), dtype=torch.float64).index_add_(0, self.owner, numbers)


def magnitudes(site: Site) -> Tensor:
    """`||b_k|| ||a_k||` for each component: the Frobenius norm of what it adds to the weight."""
    a, b = rows_and_columns(matrices_of(site))
    return (wide(a).norm(dim=1) * wide(b).norm(dim=1)).cpu().double()


def rows_and_columns(pair: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """`lora_A` and `lora_B`, or their gradients, with a row for each component: `(r, in)` and `(r, out)`."""
    a, b = (matrix.detach() for matrix in pair)
    return a.flatten(1), b.flatten(1).T
