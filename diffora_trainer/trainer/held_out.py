"""How a trainer comes by its held-out data, and leaves it out of training until the pruning."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from itertools import islice
from typing import TYPE_CHECKING, Any

from accelerate.data_loader import SeedableRandomSampler, get_sampler
from datasets import Dataset
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)
from transformers.trainer_utils import has_length

from ..compat.transformers import collator_without_unused_columns, train_batch_size, without_unused_columns
from ..compat.trl import makes_completions, noted_preparation, repeats_first_order
from ..core.isolation import replaced
from ..logging import get_logger
from ..methods.build import make_schedule, method_of
from ..search.held_out import GAP_BATCHES, ArchitectureBatches, HeldOutBatches, RolloutBatches
from .datasets import subset
from .split import HeldOutSampler, HeldOutStream, SplitPlan, split_indices


if TYPE_CHECKING:
    from .types import SearchingTrainer


logger = get_logger(__name__)

# A stream has no length, so its held-out part is what the search will read, up to this many batches.
_MAX_STREAM_BATCHES = 64


class HeldOutData:
    """
    The data that the search of a trainer reads: a part of the training data, held out until the pruning, unless the
    trainer has an `arch_dataset`. What is held out, and when it goes back, is in [`SplitPlan`]. A trainer that makes
    its own completions holds nothing out: its search reads what its training steps were given ([`RolloutBatches`]).

    Args:
        trainer (`Trainer`): the trainer, with its `diffora_config` and `arch_dataset`.

    Attributes:
        split ([`SplitPlan`] or `None`): which rows are held out, where they go back to training after the pruning.
        rollouts ([`RolloutBatches`] or `None`): what the training steps were given, until the pruning.
        removes_columns (`bool`): whether the trainer takes columns that its model does not know out of the training
            rows, and so out of the held-out ones.
    """

    def __init__(self, trainer: SearchingTrainer) -> None:
        self.split: SplitPlan | None = None
        self.rollouts: RolloutBatches | None = None
        self.removes_columns = self.repeats_order = False
        self._trainer = trainer
        self._count = self._prune_step = 0
        self._rows: Any = None
        self._samples = False

    def train_dataloader(
        self, parent: Callable[[], DataLoader], count: int | None = None, *, again: bool = False
    ) -> DataLoader:
        """
        The data loader of the training rows; until the pruning it leaves the held-out ones out.

        Args:
            parent (`Callable[[], DataLoader]`): the parent trainer's `get_train_dataloader`.
            count (`int`, *optional*): how many rows a run that is resumed after its pruning has held out, whatever the
                trainer has now; 0 if none. By default it is as in a run that begins now.
            again (`bool`, *optional*, defaults to `False`): whether another one is in use in the present loop, whose
                plan holds for this one too.
        """
        trainer, config = self._trainer, self._trainer.diffora_config
        self._samples = self.removes_columns = self.repeats_order = False
        if count is None and (trainer.arch_dataset is not None or makes_completions(trainer)):
            count = 0
        if count == 0:
            self.split, self._count = None, 0
            return parent()
        stock = trainer.train_dataset
        if has_length(stock):
            if self.split is None or not again:
                rows = split_indices(len(stock), config.arch_split, config.arch_seed)
                self.split = SplitPlan(rows, config.arch_seed)
            self._count = len(self.split.held_out)
            with replaced(trainer, "_get_train_sampler", self._of_sampler(trainer._get_train_sampler)):
                loader = parent()
            return loader if self._samples else self._without_held_out(parent)
        if self.split is None or not again:
            self.split = SplitPlan((), config.arch_seed)
        self._rows = read_head(trainer, stock, count)
        self._count = len(self._rows)
        with replaced(trainer, "train_dataset", HeldOutStream(stock, self._rows, self.split)):
            return parent()

    def _without_held_out(self, parent: Callable[[], DataLoader]) -> DataLoader:
        """The parent's data loader of the other rows, where it does not draw them by `_get_train_sampler`."""
        assert self.split is not None
        stock, held_out, self.split = self._trainer.train_dataset, self.split.held_out, None
        if isinstance(stock, IterableDataset):
            raise ValueError(
                f"The training set is a {type(stock).__name__} with a length, which can only be read in its order, so "
                "no rows can be held out. Please pass `arch_dataset=` to the trainer, or a data set that has "
                "`__getitem__`."
            )
        self._rows = subset(stock, sorted(held_out))
        others = subset(stock, [index for index in range(len(stock)) if index not in held_out])
        logger.info(
            f"{type(self._trainer).__name__} builds its own batches, so the {len(held_out)} held-out rows are not "
            "returned to training after the pruning."
        )
        with replaced(self._trainer, "train_dataset", others):
            loader = parent()
        sampler = get_sampler(loader) if isinstance(loader, DataLoader) else None
        of_weights = isinstance(sampler, WeightedRandomSampler) and len(sampler.weights) != len(others)
        of_indices = isinstance(sampler, SubsetRandomSampler) and max(sampler.indices, default=0) >= len(others)
        if of_weights or of_indices:
            raise ValueError(
                f"`get_train_dataloader` of {type(self._trainer).__name__} draws by a {type(sampler).__name__}, which "
                f"is not one of the {len(others)} rows that `self.train_dataset` has while {len(held_out)} of "
                f"{len(stock)} are held out. Please build it from `self.train_dataset`, make it in "
                "`_get_train_sampler`, where rows keep their numbers, or pass `arch_dataset=` to the trainer."
            )
        return loader

    def _of_sampler(self, get_train_sampler: Callable[..., Any]) -> Callable[..., Any]:
        """A `_get_train_sampler` that leaves the held-out rows out, also one that does not ask the mixin's."""

        def get(*args: Any, **kwargs: Any) -> Any:
            sampler = get_train_sampler(*args, **kwargs)
            return sampler if isinstance(sampler, HeldOutSampler) else self.train_sampler(sampler)

        return get

    def train_sampler(self, sampler: Any) -> Any:
        """The order of the training rows, of which the parent trainer gives the one of a stock run."""
        args = self._trainer.args
        self.repeats_order = repeats_first_order(sampler)
        # One that draws whole batches, as a trainer that packs rows has, leaves the held-out ones to the data set.
        self._samples = not isinstance(sampler, BatchSampler) or args.train_sampling_strategy == "batch_rebalance"
        if self.split is None or not self._samples:
            return sampler
        if sampler is None:  # what a data loader takes then
            sampler = SequentialSampler(self._trainer.train_dataset)
        if args.train_sampling_strategy == "batch_rebalance":
            raise ValueError(
                f"`train_sampling_strategy={args.train_sampling_strategy!r}` makes whole batches, from which "
                "single rows cannot be held out. Please pass `arch_dataset=` to the trainer, or use another strategy."
            )
        if isinstance(sampler, RandomSampler) and args.accelerator_config.use_seedable_sampler:
            # What accelerate makes of a random sampler when it is not wrapped: the order of a stock run.
            sampler = SeedableRandomSampler(
                data_source=sampler.data_source,
                replacement=sampler.replacement,
                num_samples=sampler.num_samples,
                generator=sampler.generator,
                data_seed=args.data_seed,
            )
        return HeldOutSampler(sampler, self.split, len(self._trainer.train_dataset))

    @property
    def given_back(self) -> tuple[int, int]:
        """How many training rows are held out of the present run, and the step at whose end they go back."""
        return self._count, self._prune_step

    def set_prune_step(self, step: int, given_back: bool) -> None:
        """
        Set the moment at which the held-out rows go back to training, once the length of the run is known.

        Args:
            step (`int`): optimizer step at whose end that is.
            given_back (`bool`): whether it is over.
        """
        self._prune_step = step
        if self.split is not None:
            self.split.set_prune_step(step, *steps_of_epoch(self._trainer))
            self.split.given_back = given_back

    def begin_epoch(self, step: int) -> None:
        """Note at which optimizer step the epoch begins that will be read now."""
        if self.split is not None:
            self.split.begin_epoch(step)

    def keep_rollouts(self, searching: bool) -> AbstractContextManager[None]:
        """While the search lasts, keep for it what a training step is given, if that is what it reads."""
        if self.rollouts is None or not searching:
            return nullcontext()
        return noted_preparation(self._trainer, self.rollouts.add)

    def batches(self, comparable: bool) -> ArchitectureBatches:
        """
        The batches that the search of a run reads.

        Args:
            comparable (`bool`): whether the losses of two models on the same rows tell which is better.

        Raises:
            ValueError: if the trainer has made a data loader of all rows, past the mixin.
        """
        trainer, config = self._trainer, self._trainer.diffora_config
        if makes_completions(trainer):
            _, options = method_of(config)
            self.rollouts = RolloutBatches(options.score_batches)
            return self.rollouts
        if trainer.arch_dataset is not None:
            rows = trainer.arch_dataset
            rows = rows if has_length(rows) else read_head(trainer, rows)
        elif self._rows is not None:
            rows = self._rows
        else:
            if self.split is None:
                raise ValueError(
                    f"{type(trainer).__name__} makes its data loader in a `get_train_dataloader` of its own, which "
                    "does not call the one of the mixin, so no rows are held out for the search. Please pass "
                    "`arch_dataset=` to the trainer, or put the method into a parent class behind the mixin: "
                    "`class Parent(Trainer)` with it, and `class MyTrainer(DiffoRAMixin, Parent)`."
                )
            rows = subset(trainer.train_dataset, sorted(self.split.held_out))
        collate = trainer.data_collator
        if not self.removes_columns:  # the data loader of the training rows leaves all columns in
            pass
        elif isinstance(rows, Dataset):
            rows = without_unused_columns(trainer, rows, "held-out")
        else:
            collate = collator_without_unused_columns(trainer, collate, "held-out")
        batches = HeldOutBatches(
            rows,
            collate,
            batch_size=config.arch_batch_size or train_batch_size(trainer),
            seed=config.arch_seed,
            process=(trainer.args.process_index, trainer.args.world_size),
            comparable=comparable,
        )
        batches.training_rows = train_batch_size(trainer)
        return batches

    def give_back(self) -> None:
        """The pruning is made: the rows go back to training, and nothing is kept for the search any more."""
        self._rows = self.rollouts = None
        if self.split is not None:
            self.split.given_back = True


def read_head(trainer: SearchingTrainer, stream: Any, count: int | None = None) -> list[Any]:
    """
    The first rows of a stream: as many as the search will read, up to a limit, of the training stream never more than
    `arch_split` of it or of what the run reads of it, but one at least; to know how long a short stream is, it is read
    on without keeping the rows.

    Args:
        trainer (`Trainer`): the trainer.
        stream (`Iterable`): its training stream, or its `arch_dataset`.
        count (`int`, *optional*): how many rows, where the run that is resumed has said so.

    Raises:
        ValueError: if the training stream is read by a worker, or there are no rows, or only one to hold out.
    """
    args, config = trainer.args, trainer.diffora_config
    training = stream is trainer.train_dataset
    # Also with a single one: `datasets` seeds the buffers of `shuffle` and what it interleaves anew in each, and those
    # that are persistent would not hear when the rows are given back.
    if args.dataloader_num_workers > 0 and training:
        raise ValueError(
            f"`dataloader_num_workers={args.dataloader_num_workers}` reads the training stream in another process, "
            "whose order may be another one, so its first rows cannot be held out. Please set "
            "`dataloader_num_workers=0`, or pass `arch_dataset=` to the trainer."
        )
    if training and hasattr(stream, "set_epoch"):
        stream.set_epoch(0)  # as the loop will: a shuffled stream that was read before may be at a later one
    source = iter(stream)
    if count is not None:
        return list(islice(source, count))
    (method, options), updates = method_of(config), len(make_schedule(config, args.max_steps).updates)
    if method.trains_gates:  # in the training steps: only losses are compared on held-out rows
        updates = GAP_BATCHES
    batches = max(options.score_batches, min(updates * options.score_batches, _MAX_STREAM_BATCHES))
    rows_a_batch = (config.arch_batch_size or args.per_device_train_batch_size) * args.world_size
    needed = batches * rows_a_batch
    if training:
        rows_a_step = args.per_device_train_batch_size * args.world_size * args.gradient_accumulation_steps
        needed = max(1, min(needed, _part(config.arch_split, args.max_steps * rows_a_step)))
    rows = list(islice(source, needed))
    if not rows:
        raise ValueError(
            "The stream that held-out rows should be read from is empty. Please check its source and its filters."
        )
    if training:
        enough = max(2, math.ceil(len(rows) / config.arch_split))
        found = len(rows) + sum(1 for _ in islice(source, enough - len(rows)))
        if found == 1:
            raise ValueError(
                "The training stream has 1 row, so nothing is left to train on if it is held out. Please pass a "
                "longer stream, or `arch_dataset=` to the trainer."
            )
        if found < enough:  # that was all of it
            rows = rows[: max(1, _part(config.arch_split, found))]
    return rows


def _part(share: float, size: int) -> int:
    """So many of `size` rows as make at most a share of them, whatever the product is rounded to."""
    return math.floor(share * size + 1e-9)


def steps_of_epoch(trainer: SearchingTrainer) -> tuple[int, int]:
    """Optimizer steps in an epoch, and the rows that all processes together read for one of them."""
    args = trainer.args
    rows_a_step = train_batch_size(trainer) * args.gradient_accumulation_steps * args.world_size
    loader = trainer.callback_handler.train_dataloader
    if not has_length(trainer.train_dataset) or not has_length(loader):
        return args.max_steps, rows_a_step
    batches = len(loader)
    return max(math.ceil(batches / args.gradient_accumulation_steps), 1), rows_a_step
