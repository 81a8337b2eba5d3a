"""Which ranks a run begins with, and which it ends with, where the budget is spent in ranks."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ..core.budget import Budget
from ..core.components import Components, fading_masks
from ..core.ranks import RankBudget
from ..methods.base import SelectionMethod


class RankPlan(ABC):
    """
    How a run spends a budget in ranks: what it begins with, what its matrix has an entry for, and what becomes of it.

    Args:
        budget ([`~diffora_trainer.core.ranks.RankBudget`]): what may be kept.

    Attributes:
        start (`tuple[int, ...]` of length `n`): how many components of each adapter a run begins with: its first ones.
        components ([`~diffora_trainer.core.components.Components`] or `None`): what the matrix has an entry for,
            where that are single components.
    """

    aim: str
    """What will be done at the choice, for the log."""
    start: tuple[int, ...]
    components: Components | None = None

    def __init__(self, budget: RankBudget) -> None:
        self.budget = budget

    @property
    def even(self) -> tuple[int, ...] | None:
        """The even spread, which is kept without evidence; `None` if the budget is too small for it."""
        even = self.budget.start()
        return even if self.budget.fits(even) else None

    @abstractmethod
    def matrix_budget(self, rows: Sequence[int]) -> Budget:
        """The budget under which the matrix is learned; `rows` are those of the modules."""

    @abstractmethod
    def choose(self, method: SelectionMethod, evident: bool) -> tuple[Tensor, tuple[int, ...]]:
        """
        The choice.

        Args:
            method ([`~diffora_trainer.methods.base.SelectionMethod`]): the matrix.
            evident (`bool`): whether it can be distinguished from chance.

        Returns:
            `tuple`: which entries stay, bools, and the rank that each module ends with.
        """

    @abstractmethod
    def masks(self, kept: Tensor | None, ranks: Sequence[int], faded: float) -> list[Tensor | None]:
        """
        What each component of an adapter is multiplied with; `None` where all take part.

        Args:
            kept (`Tensor` or `None`): the entries that stay, bools, once that is decided.
            ranks (`Sequence[int]` of length `n`): the ranks from then on.
            faded (`float`): how far what goes has faded out, in [0, 1].
        """

    def opened(self, kept: Tensor, ranks: Sequence[int]) -> list[list[int]]:
        """Which components of each adapter take part from a choice on, and took no part before: indices."""
        found = []
        for old, new in zip(self.masks(None, self.start, 0.0), self.masks(kept, ranks, 0.0), strict=True):
            opens = torch.zeros(0) if old is None else (old == 0) & (True if new is None else new > 0)
            found.append(opens.nonzero().flatten().tolist())
        return found


class ModulePlan(RankPlan):
    """
    A gate for each module. A run begins with the even spread of ranks that fits, and at the choice the modules that
    the matrix favours get up to half of the ranks of the others.
    """

    aim = "then ranks go to the modules that it favours"

    def __init__(self, budget: RankBudget) -> None:
        super().__init__(budget)
        self.start = budget.start()

    def matrix_budget(self, rows: Sequence[int]) -> Budget:
        # Half of what all modules have at the ranks that a run begins with: a module belongs to it that earns its
        # place when half of the others are missing.
        start = [rank * cost for rank, cost in zip(self.start, self.budget.costs, strict=True)]
        if len(self.budget.limits) > 1:
            return Budget(rows, start, ratio=0.5, scope="layer")
        return Budget(rows, start, cap=max(sum(start) // 2, min(start)))

    def choose(self, method: SelectionMethod, evident: bool) -> tuple[Tensor, tuple[int, ...]]:
        kept = torch.ones(len(self.start), dtype=torch.bool)  # each keeps rank 1 at least
        if not evident:
            return kept, self.start
        favoured, scores, gains = method.discretize(), method.scores(), method.tie_breaker()
        keys = list(
            zip(favoured.tolist(), scores.tolist(), (scores if gains is None else gains).tolist(), strict=True)
        )
        order = sorted(range(len(keys)), key=lambda index: (*(-float(part) for part in keys[index]), index))
        count = int(favoured.sum())
        return kept, self.budget.shift(order[:count], order[count:])

    def masks(self, kept: Tensor | None, ranks: Sequence[int], faded: float) -> list[Tensor | None]:
        return fading_masks(self.budget.ranks, self.start, [range(rank) for rank in ranks], faded)


class ComponentPlan(RankPlan):
    """
    A gate for each component. A run begins with as many of them as the budget has room for, spread evenly, or with
    more, and at the choice the set is kept that the matrix favours, so that a module may end with any rank, also with
    none. Without evidence each module is left its part of the even spread, of its best components.

    The budget of the matrix is smaller than that of the run by what is to grow: new components for the modules whose
    components are worth most. They exist from the start, as initialised and behind a mask, and have columns of zeros
    in `lora_B`, so that the function of the model is the same with and without them.

    Args:
        budget ([`~diffora_trainer.core.ranks.RankBudget`]): what may be kept.
        margin (`float`): how many times the parameters of the budget a run begins with.
        growth (`float`): part of the budget that is given to new components, in [0, 1), as far as there are such.
    """

    components: Components

    def __init__(self, budget: RankBudget, margin: float, growth: float) -> None:
        super().__init__(budget)
        more = replace(budget, limits=tuple(int(margin * limit) for limit in budget.limits)).start()
        # No module begins with less than it is left where nothing was learned.
        self.start = tuple(map(max, more, budget.start()))
        self.components = Components(self.start, budget.ranks)
        self._growth = growth
        self.aim = "then the components that it favours stay" + (", and new ones grow" if growth else "")

    def matrix_budget(self, rows: Sequence[int]) -> Budget:
        each = self.components.of_each
        costs = list(zip(self.budget.groups, self.budget.costs, strict=True))
        # At least one component of each group is chosen, if the budget has room for it.
        least = [min(cost for own, cost in costs if own == group) for group in range(len(self.budget.limits))]
        # No more is left for new ones than there are of them.
        fresh = [0] * len(self.budget.limits)
        for (group, cost), start, rank in zip(costs, self.start, self.budget.ranks, strict=True):
            fresh[group] += cost * (rank - start)
        limits = [
            max(int((1 - self._growth) * limit), limit - new, min(one, limit))
            for limit, one, new in zip(self.budget.limits, least, fresh, strict=True)
        ]
        return Budget(
            each(rows), each(self.budget.costs), cap=sum(limits), kinds=each(self.budget.groups), limits=limits
        )

    def choose(self, method: SelectionMethod, evident: bool) -> tuple[Tensor, tuple[int, ...]]:
        scores, gains, even = method.scores(), method.tie_breaker(), self.even
        if not evident and even is not None:
            return self.components.best(even, scores, gains), even
        kept = method.discretize()
        ranks = self.components.count(kept)
        # What is new is not an entry of the matrix, so that it has room beside those that stay.
        room = map(lambda rank, old, every: rank + every - old, ranks, self.start, self.budget.ranks)
        costs = torch.tensor(self.budget.costs, dtype=torch.float32)
        worth = self.components.mean(scores if gains is None else gains) / costs
        order = torch.sort(worth, descending=True, stable=True).indices.tolist()
        ranks = replace(self.budget, ranks=tuple(room)).grow(ranks, order)
        # What is left where nothing new has room for it goes to entries that would not stay, the best first.
        others = [entry for entry in self.components.order(scores, gains) if not kept[entry]]
        more = torch.zeros_like(kept)
        more[self.budget.take(ranks, self.components.module.tolist(), others)] = True
        return kept | more, tuple(map(sum, zip(ranks, self.components.count(more), strict=True)))

    def masks(self, kept: Tensor | None, ranks: Sequence[int], faded: float) -> list[Tensor | None]:
        return self.components.masks(kept, ranks, faded)
