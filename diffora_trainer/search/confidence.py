"""How sure a choice is: whether two halves of a search would have chosen alike, and whether anything was learned."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


_NORMAL = 1.645
"""What a standard normal variable exceeds in 5 of 100 cases."""
_STUDENT = (6.314, 2.920, 2.353, 2.132, 2.015, 1.943, 1.895)
"""The same of Student's t, with 1 to 7 degrees of freedom: losses are compared on 8 batches at most."""


class Comparison(NamedTuple):
    """
    Two losses of the same batches.

    Args:
        before (`float`): mean of the first one.
        after (`float`): mean of the second one.
        error (`float`): standard error of their difference, over batches; 0 with a single batch.
        batches (`int`, *optional*, defaults to `8`): on how many it rests.
    """

    before: float
    after: float
    error: float
    batches: int = 8

    @classmethod
    def restore(cls, saved: tuple[float, ...] | None) -> Comparison | None:
        """From a checkpoint, of which old ones have no number of batches."""
        if saved is None:
            return None
        before, after, error, *batches = saved
        return cls(before, after, error, *map(int, batches))

    @property
    def has_fallen(self) -> bool:
        """
        Whether the second one is lower by more than noise would make it in 95 of 100 cases (Student's t, one-sided).
        A single batch does not tell its noise, so it only speaks against a fall: the halves of the search decide.
        """
        if self.batches < 2:
            return self.after < self.before
        return self.before - self.after > _STUDENT[min(self.batches - 1, len(_STUDENT)) - 1] * self.error

    @property
    def noise(self) -> str:
        """What its noise is, for a message."""
        return f"standard error {self.error:.2g}" if self.batches > 1 else "on a single batch"


class Agreement(NamedTuple):
    """
    How alike two halves of a search rank modules.

    Args:
        correlation (`float`): Spearman's rank correlation, in [-1, 1].
        freedom (`int`): number of modules less that of groups. For random rankings the correlation has a standard
            error of `1 / sqrt(freedom)` (Hotelling and Pabst, 1936, for one group: `1 / sqrt(n - 1)`).
    """

    correlation: float
    freedom: int


@dataclass
class SplitHalf:
    """
    The gains that a search has seen, summed apart over its odd and its even steps.

    Args:
        sums (`Tensor` of shape `(2, n)`): float64.
        steps (`int`, *optional*, defaults to `0`): how many were added.
    """

    sums: Tensor
    steps: int = 0

    @classmethod
    def empty(cls, count: int) -> SplitHalf:
        """Of a search among so many modules that has not begun."""
        return cls(torch.zeros(2, count, dtype=torch.float64))

    def add(self, gains: Tensor) -> None:
        """Add the gains of one step, `(n,)`."""
        self.sums[self.steps % 2] += gains.double()
        self.steps += 1

    def agreement(self, groups: Tensor | None = None) -> Agreement | None:
        """
        How alike the two halves rank what is chosen among; `None` with fewer than two steps, or with too little to
        rank: fewer than two modules more than there are groups. One in which all gains of a half are equal has no say.

        Only modules of one group compete. Ranks are those within a group, of mean 0 and variance 1, so a group counts
        by its size, and gains that differ from group to group (layers with larger gradients) make nothing agree.

        Args:
            groups (`Tensor` of shape `(n,)`, *optional*): the group of each module; by default all compete.
        """
        if self.steps < 2:
            return None
        groups = torch.zeros(self.sums.shape[1]) if groups is None else groups
        total, freedom = 0.0, 0
        for group in groups.unique():
            ranks = torch.stack([_ranks(half) for half in self.sums[:, groups == group]])
            centred = ranks - ranks.mean(dim=1, keepdim=True)
            norms = centred.norm(dim=1)
            if bool((norms > 0).all()):
                total += (ranks.shape[1] - 1) * float(centred[0] @ centred[1] / norms.prod())
                freedom += ranks.shape[1] - 1
        if freedom < 2:
            return None
        return Agreement(min(1.0, max(-1.0, total / freedom)), freedom)  # rounded, it may be beyond


@dataclass(frozen=True)
class Confidence:
    """
    How sure a choice is.

    Args:
        agreement ([`Agreement`] or `None`): that of the two halves of the search.
        effect ([`Comparison`] or `None`): held-out loss without the LoRA and with it.
        progress ([`Comparison`], *optional*): held-out loss after a third of the search and at its end.
    """

    agreement: Agreement | None
    effect: Comparison | None
    progress: Comparison | None = None

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
        half = self.agreement.correlation
        return 2 * half / (1 + half) if half > 0 else 0.0

    @property
    def learned(self) -> bool | None:
        """
        Whether the LoRA lowers the held-out loss, and this has fallen while the search went on, both by more than
        noise would in 95 of 100 cases: on a plateau gates only tell what helps to stay there. `None` if it was not
        measured.
        """
        measured = [pair for pair in (self.effect, self.progress) if pair is not None]
        return all(pair.has_fallen for pair in measured) if measured else None

    @property
    def beyond_chance(self) -> bool:
        """
        Whether something was learned, and the halves agree better than two random rankings would in 95 of 100 cases:
        a one-sided test of their correlation (see [`Agreement`]).
        """
        if self.agreement is None or self.learned is False:
            return False
        return self.agreement.correlation * math.sqrt(self.agreement.freedom) > _NORMAL

    def doubt(self) -> str | None:
        """Why the choice cannot be distinguished from chance, as a sentence; `None` if it can."""
        if self.beyond_chance or self.agreement is None:
            return None
        if self.effect is not None and not self.effect.has_fallen:
            return (
                "When the choice was made, the LoRA had not lowered the held-out loss beyond its noise "
                f"({self.effect.before:.4g} without it, {self.effect.after:.4g} with it, {self.effect.noise})"
            )
        if self.progress is not None and not self.progress.has_fallen:
            return (
                "When the choice was made, the held-out loss was on a plateau "
                f"({self.progress.before:.4g} after a third of the search, {self.progress.after:.4g} at its end, "
                f"{self.progress.noise})"
            )
        return (
            "The two halves of the search rank the modules that compete no more alike than chance "
            f"(rank correlation {self.agreement.correlation:.2f})"
        )


def paired(before: Tensor, after: Tensor) -> Comparison | None:
    """
    Compare two losses of the same batches, `(k,)` each. Batches in which one is not finite, as without any label, are
    left out; `None` if there are no others.
    """
    both = torch.isfinite(before) & torch.isfinite(after)
    before, after = before[both], after[both]
    if not len(before):
        return None
    difference = (before - after).double()
    error = float(difference.std() / math.sqrt(len(difference))) if len(difference) > 1 else 0.0
    return Comparison(float(before.mean()), float(after.mean()), error, len(difference))


def _ranks(values: Tensor) -> Tensor:
    """The rank of each value, `(n,)`; equal values have the mean of theirs."""
    found, inverse, counts = torch.unique(values, return_inverse=True, return_counts=True)
    del found
    last = counts.cumsum(0).double()
    return (last - (counts.double() - 1) / 2)[inverse]
