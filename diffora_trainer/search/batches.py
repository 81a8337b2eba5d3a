"""The held-out batches of a run, whatever a training loop has them in."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol, runtime_checkable

from torch import Tensor

from ..core.isolation import OwnRandomState


IGNORED_LABEL = -100
"""The label of what is not trained on."""

NO_LABELS = (
    "Nothing in these rows is trained on: every label is -100. With `assistant_only_loss=True`, please check that the "
    "chat template marks the assistant's tokens (`{% generation %}`) and that the rows have an assistant's turn; with "
    "`completion_only_loss=True`, that the completions are not empty; and that truncation (`max_length`) does not cut "
    "off what is to be learned."
)


@runtime_checkable
class Batches(Protocol):
    """
    An endless sequence of held-out batches that a resumed run goes on with where it stopped.

    Attributes:
        position (`int`): how many batches were read by `next`.
        dataset (`Sequence`): the rows, as far as they are known.
        comparable (`bool`): whether the losses of two models on the same batches tell which is better.
    """

    position: int
    dataset: Sequence[Any]
    comparable: bool

    def __next__(self) -> Any:
        """The next batch."""

    def sample(self, count: int) -> Iterator[Any]:
        """The same `count` batches at each call, or fewer if there are fewer."""

    def take(self, count: int) -> Iterator[Any]:
        """The next `count` batches, or fewer if there are fewer."""

    def check(self) -> Any:
        """The first batch, or an error that says what is wrong with it."""

    def describe(self) -> str:
        """What the gradient of the gates is taken on, as a run says it in the log."""


def as_batches(
    batches: Iterable[Any] | Batches,
    keep: int,
    seed: int,
    around: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> Batches:
    """
    Any iterable as [`Batches`].

    Args:
        batches (`Iterable`): the batches.
        keep (`int`): how many of them are read again and again at most.
        seed (`int`): seed of what they draw at random.
        around (`Callable`, *optional*): gives what surrounds the reading of each one.

    Raises:
        TypeError: if it cannot be iterated over.
    """
    if isinstance(batches, Batches):
        return batches
    if isinstance(batches, (str, bytes, Mapping)) or not isinstance(batches, Iterable):
        raise TypeError(
            f"`held_out_batches` must be batches that are not trained on, got {type(batches).__name__}. Please pass a "
            "list of them, a `DataLoader`, or an endless iterator."
        )
    return LoopBatches(batches, keep, seed, around)


class LoopBatches:
    """
    [`Batches`] of an iterable, which is read again from its start when it ends. The first ones are kept, since losses
    are compared on the same batches. A `DataLoader` that shuffles, or rows that are augmented, draw from random
    streams of their own: the training goes on as if nothing were read, and a resumed run reads the same.

    Args:
        batches (`Iterable`): the batches.
        keep (`int`): how many of the first ones are kept.
        seed (`int`): seed of what they draw at random.
        around (`Callable`, *optional*): gives what surrounds the reading of each one.
    """

    comparable = True
    dataset: Sequence[Any] = ()

    def __init__(
        self,
        batches: Iterable[Any],
        keep: int,
        seed: int,
        around: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        self._length = _length(batches)
        self._stream = _endless(batches)
        self._first: list[Any] = []
        self._keep = keep
        self._around = around
        self._random = OwnRandomState(seed)
        self._position = 0

    @property
    def most_sampled(self) -> int | None:
        """
        How many batches [`sample`] gives at most, or `None` if that is not known. Losses are averaged over processes
        batch by batch, so each has to have as many.
        """
        return None if self._length is None else min(self._length, self._keep)

    @property
    def position(self) -> int:
        """How many batches were read. A fresh sequence can be moved on by setting it."""
        return self._position

    @position.setter
    def position(self, value: int) -> None:
        while self._position < value:
            next(self)

    def __next__(self) -> Any:
        if self._position >= len(self._first):
            batch = self._read()
            if batch is None:
                raise ValueError(
                    f"The held-out batches have come to an end after {self._position}. Please pass a list, a "
                    "`DataLoader` or an endless iterator, with at least one batch."
                )
            if len(self._first) < self._keep:
                self._first.append(batch)
        else:
            batch = self._first[self._position]
        self._position += 1
        return batch

    def sample(self, count: int) -> Iterator[Any]:
        """The first `count` batches, or fewer if there are or were kept fewer."""
        count = min(count, self._keep, count if self._length is None else self._length)
        while len(self._first) < count and (batch := self._read()) is not None:
            self._first.append(batch)
        yield from self._first[:count]

    def take(self, count: int) -> Iterator[Any]:
        """The next `count` batches, or fewer if the iterable has fewer."""
        for _ in range(count if self._length is None else min(count, self._length)):
            yield next(self)

    def check(self) -> Any:
        """The first batch."""
        found = list(self.sample(1))
        if not found:
            raise ValueError("There is not one held-out batch. Please pass at least one.")
        return found[0]

    def describe(self) -> str:
        """What the gradient of the gates is taken on."""
        return "on the held-out batches"

    def _read(self) -> Any:
        with self._random(), self._around():
            return next(self._stream, None)


def _length(batches: Iterable[Any]) -> int | None:
    try:
        return len(batches)  # type: ignore[arg-type]
    except TypeError:  # an iterator, or a `DataLoader` of rows that come one after the other
        return None


def own_copy(batch: Any) -> Any:
    """A batch that a loss function may take its labels out of: the same one is read again."""
    return copy.copy(batch) if isinstance(batch, Mapping) else batch


def _endless(batches: Iterable[Any]) -> Iterator[Any]:
    while True:
        empty = True
        for batch in batches:
            empty = False
            yield batch
        if empty:  # also the second time that an iterator is read
            return


def without_labels(batch: Any) -> bool:
    """Whether every label of a batch is -100, so that nothing in it is trained on."""
    labels = batch.get("labels") if isinstance(batch, Mapping) else None
    return isinstance(labels, Tensor) and labels.numel() > 0 and bool((labels == IGNORED_LABEL).all())
