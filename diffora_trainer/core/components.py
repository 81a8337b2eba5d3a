"""Single components of adapters as the entries of a matrix. No model in here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from .grid import Grid


@dataclass(frozen=True)
class Components:
    """
    The components of adapters among which a search chooses, where a matrix has an entry for each of them and not one
    for a whole module. A component is a row of `lora_A` with its column of `lora_B`. The `m` entries stand module by
    module, and are the first components of each: those that a run begins with.

    Args:
        counts (`tuple[int, ...]` of length `n`): how many components of each module are entries.
        ranks (`tuple[int, ...]` of length `n`): how many each adapter has.
    """

    counts: tuple[int, ...]
    ranks: tuple[int, ...]

    def __len__(self) -> int:
        return sum(self.counts)

    @cached_property
    def module(self) -> Tensor:
        """Index of the module of each entry, `(m,)`."""
        return torch.arange(len(self.counts)).repeat_interleave(torch.tensor(self.counts))

    @cached_property
    def _places(self) -> Tensor:
        """Place of each entry among all components of all adapters, `(m,)`."""
        places: list[int] = []
        first = 0
        for count, rank in zip(self.counts, self.ranks, strict=True):
            places += range(first, first + count)
            first += rank
        return torch.tensor(places)

    def expand(self, values: Tensor) -> tuple[Tensor, ...]:
        """
        One vector a module, `(r,)`, of numbers of the entries, `(m,)`; 1 for a component that is none. Gradients flow
        back through it.
        """
        every = torch.ones(sum(self.ranks), dtype=values.dtype, device=values.device)
        return every.index_copy(0, self._places.to(values.device), values).split(list(self.ranks))

    def of_each(self, values: Sequence[int]) -> list[int]:
        """A number of each module as one of each of its entries."""
        return [value for value, count in zip(values, self.counts, strict=True) for _ in range(count)]

    def sum(self, values: Tensor) -> Tensor:
        """Numbers of the entries, `(..., m)`, summed for each module, `(..., n)`."""
        return values.new_zeros(*values.shape[:-1], len(self.counts)).index_add(-1, self.module, values)

    def mean(self, values: Tensor) -> Tensor:
        """Numbers of the entries, `(..., m)`, averaged for each module, `(..., n)`."""
        return self.sum(values) / torch.tensor(self.counts)

    def count(self, kept: Tensor) -> tuple[int, ...]:
        """How many entries of each module are among those kept, `(m,)` bools."""
        return tuple(self.sum(kept.long()).tolist())

    def order(self, scores: Tensor, tie_breaker: Tensor | None = None) -> list[int]:
        """Indices of all entries, the best ones first; equal ones, `(m,)` numbers, as a `tie_breaker` has them."""
        order = torch.arange(len(self))
        for key in (tie_breaker, scores):
            if key is not None:
                order = order[torch.sort(key[order], descending=True, stable=True).indices]
        return order.tolist()

    def best(self, ranks: Sequence[int], scores: Tensor, tie_breaker: Tensor | None = None) -> Tensor:
        """
        The best entries of each module.

        Args:
            ranks (`Sequence[int]` of length `n`): how many of each.
            scores (`Tensor` of shape `(m,)`): higher is better.
            tie_breaker (`Tensor` of shape `(m,)`, *optional*): decides between equal ones.

        Returns:
            `Tensor` of shape `(m,)` and dtype `torch.bool`.
        """
        left, kept = list(ranks), torch.zeros(len(self), dtype=torch.bool)
        for entry in self.order(scores, tie_breaker):
            module = int(self.module[entry])
            if left[module]:
                kept[entry] = True
                left[module] -= 1
        return kept

    def indices(self, kept: Tensor, ranks: Sequence[int]) -> tuple[tuple[int, ...], ...]:
        """
        Which components each adapter ends with: the entries that are kept, and as many of those that are not entries
        as it takes to reach a rank.

        Args:
            kept (`Tensor` of shape `(m,)` and dtype `torch.bool`): the entries that stay.
            ranks (`Sequence[int]` of length `n`): the rank of each module.
        """
        indices = []
        for entries, rank in zip(kept.split(list(self.counts)), ranks, strict=True):
            stay = entries.nonzero().flatten().tolist()
            indices.append((*stay, *range(len(entries), len(entries) + rank - len(stay))))
        return tuple(indices)

    def masks(self, kept: Tensor | None, ranks: Sequence[int], faded: float) -> list[Tensor | None]:
        """
        What each component of an adapter is multiplied with; `None` where all take part.

        Args:
            kept (`Tensor` of shape `(m,)` and dtype `torch.bool`, or `None`): the entries that stay, once that is
                decided; before, all entries take part and nothing else.
            ranks (`Sequence[int]` of length `n`): the rank that each module ends with.
            faded (`float`): how far the entries that go have faded out, in [0, 1].
        """
        stay = torch.ones(len(self), dtype=torch.bool) if kept is None else kept
        ends = self.indices(stay, self.counts if kept is None else ranks)
        return fading_masks(self.ranks, self.counts, ends, faded)


def fading_masks(
    ranks: Sequence[int], counts: Sequence[int], ends: Sequence[Sequence[int]], faded: float
) -> list[Tensor | None]:
    """
    What each component of an adapter is multiplied with while those that go fade out: `(r,)` for each module, or
    `None` where all take part.

    Args:
        ranks (`Sequence[int]` of length `n`): how many components each adapter has.
        counts (`Sequence[int]` of length `n`): how many of these, the first ones, a run began with.
        ends (`Sequence[Sequence[int]]` of length `n`): which ones each module ends with.
        faded (`float`): how far those that go have faded out, in [0, 1].
    """
    masks: list[Tensor | None] = []
    for rank, count, stay in zip(ranks, counts, ends, strict=True):
        mask = torch.zeros(rank, dtype=torch.float32)
        mask[:count] = 1.0 - faded
        mask[list(stay)] = 1.0
        masks.append(None if bool((mask == 1).all()) else mask)
    return masks


def check_components(components: Sequence[Sequence[int]], grid: Grid, ranks: Sequence[int]) -> None:
    """Raise a `ValueError` if components, given for each module or for none, cannot be those that it keeps."""
    if not components:
        return
    if len(components) != len(grid):
        raise ValueError(f"A selection of {len(grid)} modules has {len(components)} entries in `components`.")
    for site, indices, rank in zip(grid.sites, components, ranks, strict=True):
        possible = all(type(index) is int and 0 <= index < site.rank for index in indices)
        if not possible or len(indices) != rank or list(indices) != sorted(set(indices)):
            raise ValueError(
                f"A selection leaves {site.name!r} the components {list(indices)!r}, which are not {rank} of "
                f"{site.rank}."
            )
