"""How a trainer comes by its held-out data, and leaves it out of training until the cut."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

from accelerate.data_loader import SeedableRandomSampler
from datasets import Dataset
from torch.utils.data import DataLoader, IterableDataset, RandomSampler
from transformers.trainer_utils import has_length

from ..compat import (
    collator_without_unused_columns,
    makes_completions,
    noted_preparation,
    prepare_inputs,
    train_batch_size,
    without_unused_columns,
)
from ..config import DiffoRAConfig
from ..logging import get_logger
from .callback import DiffoRACallback
from .checks import read_head, steps_of_epoch, subset
from .data import (
    ArchitectureBatches,
    HeldOutBatches,
    HeldOutSampler,
    HeldOutStream,
    RolloutBatches,
    SplitPlan,
    split_indices,
)


logger = get_logger(__name__)

if TYPE_CHECKING:
    from transformers import Trainer

    class _Base(Trainer):
        args: Any
        data_collator: Any
        model: Any
        train_dataset: Any

else:
    _Base = object


class HeldOutMixin(_Base):
    """
    A trainer that holds a part of its training data out until the cut, unless it has an `arch_dataset`. What is held
    out, and when it goes back, is in [`SplitPlan`]. One that makes its own completions holds
    nothing out: its search reads what its training steps were given ([`RolloutBatches`]).
    """

    diffora_config: DiffoRAConfig
    arch_dataset: Any
    _callback: DiffoRACallback
    _split: SplitPlan | None = None
    _held_out_rows: Any = None
    _rollouts: RolloutBatches | None = None
    _generates_for_loss: bool
    _samples = _removes_columns = False

    def get_train_dataloader(self) -> DataLoader:
        """The parent's data loader; until the cut it leaves the held-out rows out."""
        self._samples = self._removes_columns = False
        trained_on = self._callback.is_cut(self.model) and not self._callback.resumed_after_cut
        if trained_on or self.arch_dataset is not None or makes_completions(self):
            self._split = None
            return super().get_train_dataloader()
        stock = self.train_dataset
        if has_length(stock):
            self._split = SplitPlan(
                split_indices(len(stock), self.diffora_config.arch_split, self.diffora_config.arch_seed),
                self.diffora_config.arch_seed,
            )
            loader = super().get_train_dataloader()
            return loader if self._samples else self._without_held_out()
        self._split = SplitPlan((), self.diffora_config.arch_seed)
        self._held_out_rows = read_head(self, stock)
        self.train_dataset = HeldOutStream(stock, self._held_out_rows, self._split)
        try:
            return super().get_train_dataloader()
        finally:
            self.train_dataset = stock

    def _without_held_out(self) -> DataLoader:
        """The parent's data loader of the other rows, where it does not draw them by `_get_train_sampler`."""
        assert self._split is not None
        stock, held_out, self._split = self.train_dataset, self._split.held_out, None
        if isinstance(stock, IterableDataset):
            raise ValueError(
                f"The training set is a {type(stock).__name__} with a length, which can only be read in its order, so "
                "no rows can be held out. Please pass `arch_dataset=` to the trainer, or a data set that has "
                "`__getitem__`."
            )
        self._held_out_rows = subset(stock, sorted(held_out))
        self.train_dataset = subset(stock, [index for index in range(len(stock)) if index not in held_out])
        logger.info(
            f"{type(self).__name__} has a way of its own to draw batches, so the {len(held_out)} held-out rows stay "
            "out of training after the cut too."
        )
        try:
            return super().get_train_dataloader()
        finally:
            self.train_dataset = stock

    def _remove_unused_columns(self, dataset: Any, description: str | None = None) -> Any:
        self._removes_columns = True
        return super()._remove_unused_columns(dataset, description)

    def _get_collator_with_removed_columns(self, data_collator: Any, description: str | None = None) -> Any:
        self._removes_columns = True
        return super()._get_collator_with_removed_columns(data_collator, description)

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        self._samples = True
        sampler = super()._get_train_sampler(train_dataset)
        if self._split is None or sampler is None:
            return sampler
        if self.args.train_sampling_strategy == "batch_rebalance":
            raise ValueError(
                f"`train_sampling_strategy={self.args.train_sampling_strategy!r}` makes whole batches, from which "
                "single rows cannot be held out. Please pass `arch_dataset=` to the trainer, or use another strategy."
            )
        if isinstance(sampler, RandomSampler) and self.args.accelerator_config.use_seedable_sampler:
            # What accelerate makes of a random sampler when it is not wrapped: the order of a stock run.
            sampler = SeedableRandomSampler(
                data_source=sampler.data_source,
                replacement=sampler.replacement,
                num_samples=sampler.num_samples,
                generator=sampler.generator,
                data_seed=self.args.data_seed,
            )
        return HeldOutSampler(sampler, self._split, len(self.train_dataset))

    def _set_cut(self, cut: int) -> None:
        if self._split is not None:
            self._split.set_cut(cut, *steps_of_epoch(self))
            self._split.given_back = self._callback.is_cut(self.model)

    def _kept_rollouts(self) -> AbstractContextManager[None]:
        """While the search lasts, keep for it what a training step is given."""
        if self._rollouts is None or not self._callback.gates_active:
            return nullcontext()
        return noted_preparation(self, self._rollouts.add)

    def _prepare_architecture_batch(self, batch: Any) -> Any:
        """A batch of the search as the loss takes it. One of a training step has been prepared, at some cost."""
        return dict(batch if makes_completions(self) else prepare_inputs(self, batch))

    def _make_held_out(self, cut: int) -> ArchitectureBatches:
        """The batches that a run searches on, and the moment at which held-out rows go back to training."""
        if makes_completions(self):
            config = self.diffora_config
            self._rollouts = RolloutBatches(1 if config.method == "diffora" else config.score_batches)
            return self._rollouts
        if self.arch_dataset is not None:
            rows = self.arch_dataset if has_length(self.arch_dataset) else read_head(self, self.arch_dataset)
        elif self._held_out_rows is not None:
            rows = self._held_out_rows
        else:
            assert self._split is not None
            rows = subset(self.train_dataset, sorted(self._split.held_out))
        self._set_cut(cut)
        collate = self.data_collator
        if not self._removes_columns:  # the data loader of the training rows leaves all columns in
            pass
        elif isinstance(rows, Dataset):
            rows = without_unused_columns(self, rows, "held-out")
        else:
            collate = collator_without_unused_columns(self, collate, "held-out")
        return HeldOutBatches(
            rows,
            collate,
            batch_size=self.diffora_config.arch_batch_size or train_batch_size(self),
            seed=self.diffora_config.arch_seed,
            rank=self.args.process_index,
            world_size=self.args.world_size,
            comparable=not self._generates_for_loss,
        )

    def _give_held_out_back(self) -> None:
        self._held_out_rows = self._rollouts = None
        if self._split is not None:
            self._split.given_back = True
