"""The held-out part of a training set, and the order in which its rows go back to training after the pruning."""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import Any

import torch
from torch.utils.data import IterableDataset, Sampler


class SplitPlan:
    """
    Which rows are held out, and until when. Shared by all readers of the training data; the moment of the pruning is
    filled in when the length of the run is known, before the first row is read.

    Everything is a function of the position in the data and of the step at which an epoch began, so workers that fetch
    ahead and runs that are resumed see the same order.

    Args:
        held_out (`Iterable[int]`): indices (map-style) or ordinals (streaming) of the held-out rows.
        seed (`int`): seed of the rows that stand in for held-out ones.

    Attributes:
        given_back (`bool`): whether the pruning has been made. Only streams in their second epoch have to ask.
    """

    def __init__(self, held_out: Iterable[int], seed: int) -> None:
        self.held_out = frozenset(held_out)
        self.seed = seed
        self.given_back = False
        self._prune_step = self._steps_per_epoch = self._rows_per_step = 0
        self._began: int | None = None

    def set_prune_step(self, step: int, steps_per_epoch: int, rows_per_step: int) -> None:
        """
        Args:
            step (`int`): optimizer step at whose end the rows are given back.
            steps_per_epoch (`int`): optimizer steps in an epoch.
            rows_per_step (`int`): rows that all processes together read for one optimizer step.
        """
        self._prune_step, self._steps_per_epoch, self._rows_per_step = step, steps_per_epoch, rows_per_step

    def begin_epoch(self, step: int) -> None:
        """
        Say at which optimizer step the epoch that will be read next begins in fact. It may be an earlier one than by
        the steps of an epoch: a callback can end one before its last row (`control.should_epoch_stop`).
        """
        self._began = step

    def rows_before_pruning(self, epoch: int) -> float:
        """Rows of an epoch that are read before the pruning; infinite if all of them are."""
        steps = self._prune_step - (epoch * self._steps_per_epoch if self._began is None else self._began)
        if steps >= self._steps_per_epoch > 0:
            return math.inf
        return max(0, steps) * self._rows_per_step


class HeldOutSampler(Sampler[int]):
    """
    The training order with held-out rows moved to after the pruning.

    Before the pruning a held-out row is put off to the end of the epoch; if the epoch ends before the pruning, other
    rows of that epoch, drawn at random, stand in for those put off. An epoch has the same length with and without, so
    schedules do not change.

    Args:
        sampler (`Sampler[int]`): the order of a stock run.
        plan ([`SplitPlan`]): what is held out.
        size (`int`): rows of the training set.
    """

    def __init__(self, sampler: Sampler[int], plan: SplitPlan, size: int) -> None:
        self.sampler = sampler
        self.plan = plan
        self.size = size
        self.epoch = 0

    @property
    def generator(self) -> torch.Generator | None:
        """
        What the stock order is drawn with; there is none where that has none. With `use_seedable_sampler=False`
        accelerate looks for it, and gives all processes the same.
        """
        return self.sampler.generator  # type: ignore[attr-defined]

    @generator.setter
    def generator(self, value: torch.Generator | None) -> None:
        self.sampler.generator = value  # type: ignore[attr-defined]

    def set_epoch(self, epoch: int) -> None:
        """Called by the training loop before each epoch."""
        self.epoch = epoch
        if hasattr(self.sampler, "set_epoch"):
            self.sampler.set_epoch(epoch)

    def __len__(self) -> int:
        return len(self.sampler)  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[int]:
        # The epoch is read once: a random sampler moves itself on to the next one when it is exhausted.
        epoch, held_out = self.epoch, self.plan.held_out
        before_pruning = self.plan.rows_before_pruning(epoch)
        put_off, position = [], 0
        drawn = bytearray(self.size)  # a sampler of the user's may leave rows out, or draw them with replacement
        for index in map(self._row, self.sampler):
            if index in held_out and position < before_pruning:
                put_off.append(index)
                continue
            drawn[index] = True
            yield index
            position += 1
        generator = torch.Generator(device="cpu").manual_seed(self.plan.seed + epoch)
        for index in put_off:
            yield index if position >= before_pruning else self._stand_in(generator, drawn)
            position += 1

    def _row(self, index: Any) -> int:
        """An index as a number: a 0-d tensor is in no set of numbers."""
        try:
            row = operator.index(index)
        except TypeError:
            row = -1
        if not 0 <= row < self.size:
            raise ValueError(
                f"{type(self.sampler).__name__}, the sampler of the training rows, gave {index!r}, but the training "
                f"set has {self.size} rows, by numbers from 0 on. Please check what it was built from; if it gives "
                "anything but row numbers, pass `arch_dataset=` to the trainer, so that no rows are held out."
            )
        return row

    def _stand_in(self, generator: torch.Generator, drawn: bytearray) -> int:
        if not any(drawn):
            raise ValueError(
                f"{type(self.sampler).__name__}, the sampler of the training rows, gave held-out rows alone, so there "
                "is nothing to train on before the pruning. Please pass `arch_dataset=` to the trainer."
            )
        while True:
            index = int(torch.randint(self.size, (), generator=generator, device="cpu"))
            if drawn[index] and index not in self.plan.held_out:
                return index


class HeldOutStream(IterableDataset):
    """
    A stream whose first rows are held out; they come back right after the pruning, and in later epochs in their place.
    Until the pruning each epoch has the order of the first one: one that shuffles itself would have other first rows.

    Args:
        stream (`Iterable`): the training stream.
        rows (`Sequence`): its first rows, which are held out.
        plan ([`SplitPlan`]): when they are given back.
    """

    def __init__(self, stream: Iterable[Any], rows: Sequence[Any], plan: SplitPlan) -> None:
        self.stream = stream
        self.rows = rows
        self.plan = plan
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Called by the training loop before each epoch."""
        self.epoch = epoch
        if hasattr(self.stream, "set_epoch"):
            self.stream.set_epoch(epoch if self.plan.given_back else 0)

    def __iter__(self) -> Iterator[Any]:
        # A stream has no length, so in later epochs only time can tell whether the pruning is over.
        later = 0 if self.plan.given_back else math.inf
        before_pruning = self.plan.rows_before_pruning(0) if self.epoch == 0 else later
        if before_pruning == 0:
            yield from self.stream
            return
        position = 0
        for row in islice(iter(self.stream), len(self.rows), None):
            if position == before_pruning:
                yield from self.rows
            yield row
            position += 1
        if position == 0:  # accelerate would say that a batch is `None`
            raise ValueError(
                f"The training stream gave no row beside the {len(self.rows)} that are held out, so there is nothing "
                "to train on. Please pass a longer stream, one that can be read again from its start, or "
                "`arch_dataset=` to the trainer."
            )


def split_indices(size: int, part: float, seed: int) -> list[int]:
    """
    Indices of a seeded held-out part of `size` rows, sorted.

    Raises:
        ValueError: if nothing would be left to train on.
    """
    if size == 1:
        raise ValueError(
            "The training set has one row, which cannot be both held out and trained on. Please pass more rows, or "
            "`arch_dataset=` to the trainer."
        )
    held_out = math.ceil(part * size)
    if held_out >= size:
        raise ValueError(
            f"The training set has {size} rows, and `arch_split={part}` holds out {held_out} of them, so no data is "
            "left to train on. Please use a smaller `arch_split`, more data, or pass `arch_dataset=` to the trainer."
        )
    generator = torch.Generator(device="cpu").manual_seed(seed)
    return sorted(torch.randperm(size, generator=generator, device="cpu")[:held_out].tolist())
