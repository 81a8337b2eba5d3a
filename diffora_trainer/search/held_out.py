"""What a search learns from: endless batches of held-out rows, or the batches that training steps were given."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch

from ..core.isolation import isolated_random_state
from .batches import Batches, without_labels


GAP_BATCHES = 8
"""Held-out batches on which losses are compared."""
_CHECKED_BATCHES = 8


class HeldOutBatches:
    """
    An endless sequence of held-out batches. Batch `t` depends on the seed and `t` alone, so a resumed search goes on
    where it stopped, and reading touches no random stream.

    Args:
        dataset: held-out rows; map-style.
        collate (`Callable`): makes a batch of rows.
        batch_size (`int`): rows of a batch on each process.
        seed (`int`): seed of the order.
        process (`tuple[int, int]`, *optional*, defaults to `(0, 1)`): which process this is, of how many; they read
            different rows.
        comparable (`bool`, *optional*, defaults to `True`): whether the losses of two models on the same rows tell
            which is better. They do not where each loss is taken on completions made for it.
    """

    def __init__(
        self,
        dataset: Any,
        collate: Callable[[list[Any]], Any],
        batch_size: int,
        seed: int,
        process: tuple[int, int] = (0, 1),
        comparable: bool = True,
    ) -> None:
        self.training_rows: int | None = None
        """Rows of a training batch on each process, where they are known: by these a step is measured."""
        if len(dataset) == 0:
            raise ValueError(
                "The held-out data set is empty, so the matrix has nothing to learn from. Please pass an "
                "`arch_dataset` with rows, or none, to hold out a part of the training set."
            )
        self.dataset = dataset
        self.collate = collate
        self.rank, self.world_size = process
        self.batch_size = max(1, min(batch_size, len(dataset) // self.world_size))
        self.seed = seed
        self.comparable = comparable
        self.position = 0
        self._order: tuple[int, list[int]] | None = None

    def describe(self) -> str:
        """What the gradient of the gates is taken on, as a run says it in the log."""
        return f"on {len(self.dataset):,} held-out rows"

    def check(self) -> Any:
        """Read the first batch that has labels, so that what is wrong with the data is reported before training."""
        for number in range(min(_CHECKED_BATCHES, self._epoch)):
            if not without_labels(batch := self.batch(number)):
                return batch
        return self.batch(0)

    def __next__(self) -> Any:
        batch = self.batch(self.position)
        self.position += 1
        return batch

    def batch(self, number: int) -> Any:
        """Batch `number` of the sequence on this process."""
        start = (number * self.world_size + self.rank) * self.batch_size
        return self._collated([self._index(position) for position in range(start, start + self.batch_size)])

    def _collated(self, indices: list[int]) -> Any:
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

    def like_training(self, rows: int) -> Any:
        """
        A batch of as many rows as a training batch has, whatever [`batch_size`] is, to measure a step on: always the
        same ones, some of them again if there are too few.

        Args:
            rows (`int`): how many, on this process.
        """
        return self._collated([self._index(self.rank * rows + number) for number in range(rows)])

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
            generator = torch.Generator(device="cpu").manual_seed(self.seed * 1_000_003 + epoch)
            self._order = (epoch, torch.randperm(len(self.dataset), generator=generator, device="cpu").tolist())
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


def batch_to_measure(batches: Batches) -> Any:
    """The batch on which a training step is measured: of the rows of one where these are known, else the first one."""
    if isinstance(batches, HeldOutBatches) and batches.training_rows is not None:
        return batches.like_training(batches.training_rows)
    return next(iter(batches.sample(1)))
