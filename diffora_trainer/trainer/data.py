"""
What the matrix learns from: a part of the training set that is held out and given back to training after the cut, or
the completions that a trainer made for its own steps.
"""

from __future__ import annotations

import math
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

import torch
from torch.utils.data import IterableDataset, Sampler
from transformers.trainer_utils import has_length

from ..core.isolation import isolated_random_state


_IGNORED = -100  # the label of what is not trained on
_CHECKED_BATCHES = 8


class SplitPlan:
    """
    Which rows are held out, and until when. Shared by all readers of the training data; the moment of the cut is
    filled in when the length of the run is known, before the first row is read.

    Everything is a function of the position in the data, not of time, so workers that fetch ahead and runs that are
    resumed see the same order.

    Args:
        held_out (`Iterable[int]`): indices (map-style) or ordinals (streaming) of the held-out rows.
        seed (`int`): seed of the rows that stand in for held-out ones.

    Attributes:
        given_back (`bool`): whether the cut has been made. Only streams in their second epoch have to ask.
    """

    def __init__(self, held_out: Iterable[int], seed: int) -> None:
        self.held_out = frozenset(held_out)
        self.seed = seed
        self.given_back = False
        self._cut = self._steps_per_epoch = self._rows_per_step = 0

    def set_cut(self, cut: int, steps_per_epoch: int, rows_per_step: int) -> None:
        """
        Args:
            cut (`int`): optimizer step at whose end the rows are given back.
            steps_per_epoch (`int`): optimizer steps in an epoch.
            rows_per_step (`int`): rows that all processes together read for one optimizer step.
        """
        self._cut, self._steps_per_epoch, self._rows_per_step = cut, steps_per_epoch, rows_per_step

    def rows_before_cut(self, epoch: int) -> float:
        """Rows of an epoch that are read before the cut; infinite if all of them are."""
        steps = self._cut - epoch * self._steps_per_epoch
        if steps >= self._steps_per_epoch > 0:
            return math.inf
        return max(0, steps) * self._rows_per_step


class HeldOutSampler(Sampler[int]):
    """
    The training order with held-out rows moved behind the cut.

    Before the cut a held-out row is put off to the end of the epoch; if the epoch ends before the cut, other rows,
    drawn at random, stand in for those put off. An epoch has the same length with and without, so schedules do not
    change.

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
        before_cut = self.plan.rows_before_cut(epoch)
        put_off, position = [], 0
        for index in self.sampler:
            if index in held_out and position < before_cut:
                put_off.append(index)
                continue
            yield index
            position += 1
        generator = torch.Generator().manual_seed(self.plan.seed + epoch)
        for index in put_off:
            yield index if position >= before_cut else self._stand_in(generator)
            position += 1

    def _stand_in(self, generator: torch.Generator) -> int:
        while True:  # the training part is not empty, so this ends
            index = int(torch.randint(self.size, (), generator=generator))
            if index not in self.plan.held_out:
                return index


class HeldOutStream(IterableDataset):
    """
    A stream whose first rows are held out; they come back right after the cut, and in later epochs in their place.

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
            self.stream.set_epoch(epoch)

    def __iter__(self) -> Iterator[Any]:
        # A stream has no length, so in later epochs only time can tell whether the cut is over.
        before_cut = self.plan.rows_before_cut(0) if self.epoch == 0 else 0 if self.plan.given_back else math.inf
        if before_cut == 0:
            yield from self.stream
            return
        position = 0
        for row in islice(iter(self.stream), len(self.rows), None):
            if position == before_cut:
                yield from self.rows
            yield row
            position += 1
        if position == 0:  # accelerate would say that a batch is `None`
            raise ValueError(
                f"The training stream gave no row beside the {len(self.rows)} that are held out, so there is nothing "
                "to train on. Please pass a longer stream, one that can be read again from its start, or "
                "`arch_dataset=` to the trainer."
            )


class HeldOutBatches:
    """
    An endless sequence of held-out batches. Batch `t` depends on the seed and `t` alone, so a resumed search goes on
    where it stopped, and reading touches no random stream.

    Args:
        dataset: held-out rows; map-style.
        collate (`Callable`): makes a batch of rows.
        batch_size (`int`): rows of a batch on each process.
        seed (`int`): seed of the order.
        rank (`int`, *optional*, defaults to `0`): this process.
        world_size (`int`, *optional*, defaults to `1`): all processes; they read different rows.
        comparable (`bool`, *optional*, defaults to `True`): whether the losses of two models on the same rows tell
            which is better. They do not where each loss is taken on completions made for it.
    """

    def __init__(
        self,
        dataset: Any,
        collate: Callable[[list[Any]], Any],
        batch_size: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        comparable: bool = True,
    ) -> None:
        if len(dataset) == 0:
            raise ValueError(
                "The held-out data set is empty, so the matrix has nothing to learn from. Please pass an "
                "`arch_dataset` with rows, or none, to hold out a part of the training set."
            )
        self.dataset = dataset
        self.collate = collate
        self.batch_size = max(1, min(batch_size, len(dataset) // world_size))
        self.seed = seed
        self.rank, self.world_size = rank, world_size
        self.comparable = comparable
        self.position = 0
        self._order: tuple[int, list[int]] | None = None

    def describe(self) -> str:
        """What the gradient of the gates is taken on, as a run says it in the log."""
        return f"on {len(self.dataset):,} held-out rows"

    def check(self) -> Any:
        """Read the first batch that has labels, so that what is wrong with the data is said before training."""
        return next(self.sample(_CHECKED_BATCHES))

    def __next__(self) -> Any:
        batch = self.batch(self.position)
        self.position += 1
        return batch

    def batch(self, number: int) -> Any:
        """Batch `number` of the sequence on this process."""
        start = (number * self.world_size + self.rank) * self.batch_size
        indices = [self._index(position) for position in range(start, start + self.batch_size)]
        with isolated_random_state(torch.device("cpu")):  # rows may be augmented, and tokens masked, at random
            if hasattr(self.dataset, "__getitems__"):
                rows = self.dataset.__getitems__(indices)
            else:
                rows = [self.dataset[index] for index in indices]
            batch = self.collate(rows)
        if batch is None or (isinstance(batch, (Mapping, list, tuple)) and not batch):
            raise TypeError(
                f"The data collator made {batch!r} of {len(rows)} held-out rows, so there is nothing to run the model "
                "on. Please let it return the batch, a dictionary of tensors."
            )
        return batch

    def sample(self, count: int) -> Iterator[Any]:
        """
        The first `count` batches, or fewer if the data has fewer: always the same rows, each once. Those without any
        label are left out, unless all are: their loss is not a number. Not on several processes, which have to make
        equally many passes where the model is sharded.
        """
        labelled = False
        for number in range(min(count, self._epoch)):
            batch = self.batch(number)
            if self.world_size > 1 or not without_labels(batch):
                labelled = True
                yield batch
        if not labelled:
            yield self.batch(0)

    def take(self, count: int) -> Iterator[Any]:
        """The next `count` batches, or fewer if the data has fewer: other rows at each call, until all were read."""
        for _ in range(min(count, self._epoch)):
            yield next(self)

    @property
    def _epoch(self) -> int:
        return max(1, len(self.dataset) // (self.batch_size * self.world_size))

    def _index(self, position: int) -> int:
        epoch, offset = divmod(position, len(self.dataset))
        if self._order is None or self._order[0] != epoch:
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
            self._order = (epoch, torch.randperm(len(self.dataset), generator=generator).tolist())
        return self._order[1][offset]


class RolloutBatches:
    """
    The latest batches of a trainer that makes its own completions (GRPO, RLOO), where [`HeldOutBatches`] are those of
    other trainers. Nothing is held out: a batch holds completions, rewards and log-probabilities of the training step
    just made, which a row of the training set lacks.

    Args:
        count (`int`): how many batches are kept, on the device that they are on.
    """

    dataset: Sequence[Any] = ()
    # Of completions that the model has just made, a policy gradient's loss is the mean advantage, whatever the model.
    comparable = False

    def __init__(self, count: int) -> None:
        self.position = 0
        self._batches: deque[Any] = deque(maxlen=count)

    def add(self, batch: Any) -> None:
        """Keep a copy of a batch as the training step was given it; its tensors are shared."""
        self._batches.append(dict(batch) if isinstance(batch, Mapping) else batch)

    def describe(self) -> str:
        """What the gradient of the gates is taken on, as a run says it in the log."""
        return "on the completions of the training steps, with nothing held out"

    def check(self) -> Any:
        """There is nothing to read before training."""

    def __next__(self) -> Any:
        if not self._batches:
            raise ValueError(
                "No training step has prepared its batch with `_prepare_inputs`, so there are no completions to take "
                "the gradient of the gates on. Please call the parent's `training_step` in that of your trainer."
            )
        self.position += 1
        return self._batches[-1]

    def sample(self, count: int) -> Iterator[Any]:
        """The latest `count` batches, or fewer if there are fewer; the last one first."""
        yield from list(reversed(self._batches))[:count]

    take = sample


ArchitectureBatches = HeldOutBatches | RolloutBatches


def without_labels(batch: Any) -> bool:
    """Whether every label of a batch is -100, so that nothing in it is trained on."""
    labels = batch.get("labels") if isinstance(batch, Mapping) else None
    return isinstance(labels, torch.Tensor) and labels.numel() > 0 and bool((labels == _IGNORED).all())


def split_indices(size: int, part: float, seed: int) -> list[int]:
    """
    Indices of a seeded held-out part of `size` rows, sorted.

    Raises:
        ValueError: if nothing would be left to train on.
    """
    held_out = math.ceil(part * size)
    if held_out >= size:
        raise ValueError(
            f"The training set has {size} row(s), and `arch_split={part}` holds out {held_out} of them, so no data is "
            "left to train on. Please use a smaller `arch_split`, more data, or pass `arch_dataset=` to the trainer."
        )
    generator = torch.Generator().manual_seed(seed)
    return sorted(torch.randperm(size, generator=generator)[:held_out].tolist())


def check_dataset(name: str, dataset: Any) -> None:
    """Raise if what was passed as a data set cannot be one, or has no rows. `None` is for others to judge."""
    if dataset is None:
        return
    if isinstance(dataset, (str, bytes, os.PathLike)):
        raise TypeError(
            f"You passed `{name}={dataset!r}`, which is a name and not data. Please load it first, for example with "
            "`datasets.load_dataset`."
        )
    if isinstance(dataset, Mapping):
        raise TypeError(
            f"You passed a dictionary with {', '.join(map(repr, list(dataset)[:5])) or 'no entry'} as `{name}`, but "
            f"one data set is needed. Please pass one part, such as `{name}=data['train']`, or turn columns into rows "
            "with `datasets.Dataset.from_dict`."
        )
    if not hasattr(dataset, "__iter__") and not hasattr(dataset, "__getitem__"):
        raise TypeError(
            f"You passed `{name}={dataset!r}` of type {type(dataset).__name__}, from which no rows can be read. "
            "Please pass a `datasets.Dataset`, a `torch.utils.data.Dataset` or a list of rows."
        )
    if has_length(dataset) and len(dataset) == 0:
        raise ValueError(
            f"The `{name}` that you passed has no rows, so nothing can be learned. Please check how it was made."
        )
