"""How sure a choice is: whether two halves of a search would have chosen alike, and whether anything was learned."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor


_ONE_SIDED_5_PERCENT = 1.645


@dataclass
class SplitHalf:
    """
    The gains that a search has seen, summed apart over its odd and its even steps.

    Args:
        sums (`Tensor` of shape `(2, n)`): float64.
        steps (`int`, *optional*, defaults to `0`): how many were added.
    """

    sums: Tensor
    steps: int = field(default=0)

    @classmethod
    def empty(cls, count: int) -> SplitHalf:
        """Of a search among so many modules that has not begun."""
        return cls(torch.zeros(2, count, dtype=torch.float64))

    def add(self, gains: Tensor) -> None:
        """Add the gains of one step, `(n,)`."""
        self.sums[self.steps % 2] += gains.double()
        self.steps += 1

    def correlation(self) -> float | None:
        """
        Spearman's rank correlation of the two halves, in [-1, 1]; `None` with fewer than two steps or three modules,
        or where all gains of a half are equal.
        """
        if self.steps < 2 or self.sums.shape[1] < 3:
            return None
        ranks = torch.stack([_ranks(half) for half in self.sums])
        centred = ranks - ranks.mean(dim=1, keepdim=True)
        norms = centred.norm(dim=1)
        if not bool((norms > 0).all()):
            return None
        return min(1.0, max(-1.0, float(centred[0] @ centred[1] / norms.prod())))  # rounded, it may be beyond


@dataclass(frozen=True)
class Confidence:
    """
    How sure a choice is.

    Args:
        agreement (`float` or `None`): Spearman's correlation of the gains of the two halves of the search.
        count (`int`): number of modules.
        effect (`tuple[float, float, float]` or `None`): held-out loss without the LoRA and with it, and the standard
            error of the difference over batches.
        progress (`tuple[float, float, float]`, *optional*): held-out loss after a third of the search and at its end,
            and the standard error of the difference.
    """

    agreement: float | None
    count: int
    effect: tuple[float, float, float] | None
    progress: tuple[float, float, float] | None = None

    @property
    def value(self) -> float | None:
        """
        The agreement of the two halves, in [0, 1]: the correlation of two searches of full length, predicted from that
        of two halves (Spearman, 1910; Brown, 1910), and 0 if nothing was learned (see [`learned`]). `None` if it
        is not known. The halves share weights and neighbouring steps, so searches of other seeds may agree less.
        """
        if self.agreement is None:
            return None
        if self.learned is False:
            return 0.0
        return 2 * self.agreement / (1 + self.agreement) if self.agreement > 0 else 0.0

    @property
    def learned(self) -> bool | None:
        """
        Whether the LoRA lowers the held-out loss, and this has fallen while the search went on, both by more than
        noise would in 95 of 100 cases: on a plateau gates only tell what helps to stay there. `None` if it was not
        measured.
        """
        measured = [pair for pair in (self.effect, self.progress) if pair is not None]
        return all(_has_fallen(pair) for pair in measured) if measured else None

    @property
    def beyond_chance(self) -> bool:
        """
        Whether something was learned, and the halves agree better than two random rankings would in 95 of 100 cases:
        their rank correlation has a standard error of `1 / sqrt(n - 1)` (Hotelling and Pabst, 1936).
        """
        if self.agreement is None or self.learned is False:
            return False
        return self.agreement * math.sqrt(self.count - 1) > _ONE_SIDED_5_PERCENT

    def doubt(self) -> str | None:
        """Why the choice cannot be distinguished from chance, as a sentence; `None` if it can."""
        if self.beyond_chance or self.agreement is None:
            return None
        if self.learned is False:
            if self.effect is not None and not _has_fallen(self.effect):
                without, with_all, error = self.effect
                return (
                    "When the choice was made, the LoRA had not lowered the held-out loss beyond its noise "
                    f"({without:.4g} without it, {with_all:.4g} with it, standard error {error:.2g})"
                )
            assert self.progress is not None
            middle, end, error = self.progress
            return (
                "When the choice was made, the held-out loss was on a plateau "
                f"({middle:.4g} after a third of the search, {end:.4g} at its end, standard error {error:.2g})"
            )
        return (
            f"The two halves of the search rank the {self.count} modules no more alike than chance "
            f"(rank correlation {self.agreement:.2f})"
        )


def paired(before: Tensor, after: Tensor) -> tuple[float, float, float] | None:
    """
    The means of two losses of the same batches, `(k,)` each, and the standard error of their difference. Batches in
    which one is not finite, as without any label, are left out; `None` if there are no others.
    """
    both = torch.isfinite(before) & torch.isfinite(after)
    before, after = before[both], after[both]
    if not len(before):
        return None
    difference = (before - after).double()
    error = float(difference.std() / math.sqrt(len(difference))) if len(difference) > 1 else 0.0
    return float(before.mean()), float(after.mean()), error


def _has_fallen(pair: tuple[float, float, float]) -> bool:
    before, after, error = pair
    return before - after > _ONE_SIDED_5_PERCENT * error


def _ranks(values: Tensor) -> Tensor:
    """The rank of each value, `(n,)`; equal values have the mean of theirs."""
    found, inverse, counts = torch.unique(values, return_inverse=True, return_counts=True)
    del found
    last = counts.cumsum(0).double()
    return (last - (counts.double() - 1) / 2)[inverse]
