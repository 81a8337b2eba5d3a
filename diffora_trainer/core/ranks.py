"""Ranks under a budget of parameters: an even spread, and its shift to where ranks are worth most."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class RankBudget:
    """
    How many parameters may be trained, and how they become ranks. All choices are deterministic.

    Args:
        groups (`tuple[int, ...]` of length `n`): the group in which each module competes: its layer, or the model.
        costs (`tuple[int, ...]` of length `n`): trainable parameters of each unit of rank.
        ranks (`tuple[int, ...]` of length `n`): the largest rank of each module.
        limits (`tuple[int, ...]`): parameters that each group may keep.
    """

    groups: tuple[int, ...]
    costs: tuple[int, ...]
    ranks: tuple[int, ...]
    limits: tuple[int, ...]

    def start(self) -> tuple[int, ...]:
        """
        The even spread that a run begins with: all modules of a group at the largest common rank that the budget has
        room for, but at least 1; what is left over goes into one rank more for modules far apart from each other.
        """
        rooms = [limit / sum(self.costs[index] for index in self._members(g)) for g, limit in enumerate(self.limits)]
        common = tuple(
            min(rank, max(1, math.floor(rooms[group]))) for rank, group in zip(self.ranks, self.groups, strict=True)
        )
        return self.grow(common, self.spread())

    def shift(self, favoured: Sequence[int], others: Sequence[int]) -> tuple[int, ...]:
        """
        The even spread, of which the others give up to half of their ranks to the favoured modules, but keep 1 at
        least.

        Args:
            favoured (`Sequence[int]`): indices of the modules that get more rank, the best first.
            others (`Sequence[int]`): indices of the others, the best first; they get back what nobody can take.
        """
        start = self.start()
        given = set(others)
        less = [(rank + 1) // 2 if index in given else rank for index, rank in enumerate(start)]
        return self.grow(self.grow(less, favoured), others)

    def fits(self, ranks: Sequence[int]) -> bool:
        """Whether ranks are under the limits."""
        return min(self.left(ranks)) >= 0

    def left(self, ranks: Sequence[int]) -> list[int]:
        """How many parameters ranks leave of each limit."""
        left = list(self.limits)
        for rank, cost, group in zip(ranks, self.costs, self.groups, strict=True):
            left[group] -= rank * cost
        return left

    def spread(self) -> list[int]:
        """Indices of all modules, each far from the one before: the order of an even growth."""
        return [index for group in range(len(self.limits)) for index in _far_apart(self._members(group))]

    def grow(self, ranks: Sequence[int], order: Iterable[int]) -> tuple[int, ...]:
        """
        Use up what the budget has left: each module of an order is given one unit of rank more, again and again, as
        far as it fits.

        Args:
            ranks (`Sequence[int]` of length `n`): the ranks to start from.
            order (`Iterable[int]`): indices of the modules that may grow, the best first.
        """
        grown, order, left = list(ranks), list(order), self.left(ranks)
        growing = True
        while growing:
            growing = False
            for index in order:
                group, cost = self.groups[index], self.costs[index]
                if grown[index] < self.ranks[index] and cost <= left[group]:
                    grown[index] += 1
                    left[group] -= cost
                    growing = True
        return tuple(grown)

    def take(self, ranks: Sequence[int], owner: Sequence[int], order: Iterable[int]) -> list[int]:
        """
        Use up what ranks leave of the budget with single components: each of an order is taken if it still fits.

        Args:
            ranks (`Sequence[int]` of length `n`): the ranks to start from.
            owner (`Sequence[int]` of length `m`): index of the module of each component.
            order (`Iterable[int]`): indices of the components that may be taken, the best first.

        Returns:
            `list[int]`: those that are taken, in this order.
        """
        taken, left = [], self.left(ranks)
        for index in order:
            group, cost = self.groups[owner[index]], self.costs[owner[index]]
            if cost <= left[group]:
                taken.append(index)
                left[group] -= cost
        return taken

    def _members(self, group: int) -> list[int]:
        return [index for index, own in enumerate(self.groups) if own == group]


def _far_apart(members: Sequence[int]) -> list[int]:
    """All members once, each far from the one before: by steps of about the golden section."""
    stride = max(1, round(len(members) * 0.618))
    while math.gcd(stride, len(members)) > 1:
        stride += 1
    if stride == len(members) - 1:  # from neighbour to neighbour, and of four or six no other stride reaches all
        return [*members[::2], *members[1::2]]
    return [members[number * stride % len(members)] for number in range(len(members))]
