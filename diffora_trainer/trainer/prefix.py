"""The prefix cache of a trainer: made once modules were pruned, and asked in each training step."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn
from torch.utils.data import IterableDataset

from ..compat.transformers import prepare_inputs
from ..compat.trl import generates_in_step, makes_completions, own_training_step
from ..core.agreement import is_main_process
from ..core.isolation import replaced
from ..logging import get_logger
from ..prefix import DiskStore, MemoryStore, PrefixCache
from ..prefix.rows import KeyedCollator, take_rows_along
from .loss import loss_of_batch, preserved_bookkeeping


if TYPE_CHECKING:
    from .types import SearchingTrainer


logger = get_logger(__name__)


def check_prefix_cache(trainer: SearchingTrainer) -> None:
    """Raise a `ValueError` if a prefix cache was asked for and this training cannot have one."""
    kind = trainer.diffora_config.prefix_cache
    if kind == "none":
        return
    if makes_completions(trainer) or own_training_step(trainer) is not None:
        raise ValueError(
            f"You passed `prefix_cache={kind!r}` to {type(trainer).__name__}, which makes the completions that it "
            "trains on, so no row comes again. Please leave it out."
        )
    if generates_in_step(trainer):
        raise ValueError(
            f"You passed `prefix_cache={kind!r}` to {type(trainer).__name__}, whose `training_step` generates "
            "completions that it trains on in the place of those in the data, so rows do not come again. Please leave "
            "it out, or let it generate none (with GKD `lmbda=0.0` and `seq_kd=False`)."
        )
    if trainer.args.world_size > 1:
        raise ValueError(
            f"You passed `prefix_cache={kind!r}` with {trainer.args.world_size} processes. Rows go to another process "
            "in each epoch, so that what one has kept is of little use. Please leave it out."
        )


class TrainingPrefix:
    """
    What a trainer keeps of the layers below the lowest LoRA that is trained.

    Args:
        trainer (`Trainer`): the trainer.
    """

    def __init__(self, trainer: SearchingTrainer) -> None:
        self._trainer = trainer
        self._cache: PrefixCache | None = None

    @property
    def _wanted(self) -> bool:
        return bool(self._trainer.diffora_config.prefix_cache != "none")

    def keyed(self) -> AbstractContextManager[None]:
        """While a data loader is made: its batches will bring along what their rows are known by."""
        # The batches of a stream are dispatched, and on the way taken apart as if all of them were tensors.
        if not self._wanted or isinstance(self._trainer.train_dataset, IterableDataset):
            return nullcontext()
        return replaced(self._trainer, "data_collator", KeyedCollator(self._trainer.data_collator))

    def replayed(self, inputs: Any, is_pruned: bool) -> AbstractContextManager[None]:
        """For a training step on a batch: without the frozen layers, where that can be done."""
        rows = take_rows_along(inputs)
        if not (self._wanted and is_pruned):
            return nullcontext()
        if self._cache is None or self._cache.model is not self._trainer.model:
            self._cache = self._make()
        # As the parent does right after this: an evaluation, or the one who loaded the model, may have left it in the
        # other mode, in which no layer draws random numbers.
        self._trainer.model.train()
        return self._cache.replay(inputs, rows)

    def close(self) -> None:
        """Say how much it was of use, and give it back."""
        if self._cache is not None:
            if self._cache.off is None and is_main_process():
                logger.info(f"Prefix cache: {self._cache.describe()}.")
            self._cache.close()
        self._cache = None

    def _make(self) -> PrefixCache:
        trainer, config = self._trainer, self._trainer.diffora_config
        limit = int(config.prefix_cache_gib * 2**30)
        disk = config.prefix_cache == "disk"
        store = DiskStore(limit, Path(trainer.args.output_dir)) if disk else MemoryStore(limit)

        def loss_of(model: nn.Module, batch: Any) -> Any:
            with preserved_bookkeeping(trainer), trainer.compute_loss_context_manager():
                return loss_of_batch(trainer, model, dict(prepare_inputs(trainer, batch)))

        cache = PrefixCache(trainer.model, loss_of, store)
        if cache.prefix is not None and is_main_process():
            count, where = len(cache.prefix.layers), "on disk" if disk else "in memory"
            logger.info(
                f"Prefix cache: what the {count} layer(s) below {cache.prefix.names[-1]} compute is kept {where}, up "
                f"to {config.prefix_cache_gib:g} GiB."
            )
        return cache
