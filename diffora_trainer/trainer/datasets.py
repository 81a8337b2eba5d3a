"""The data sets of a trainer: what cannot be one, and how one for the search is prepared."""

from __future__ import annotations

import inspect
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from datasets import Dataset, IterableDataset
from torch.utils.data import Subset
from transformers.trainer_utils import has_length

from ..compat.transformers import columns_of_model
from ..compat.trl import preparation, with_reference_log_probs
from ..search.batches import NO_LABELS


if TYPE_CHECKING:
    from .types import SearchingTrainer


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


def prepare_arch_dataset(trainer: SearchingTrainer, given: Any, formatting_func: Any) -> Any:
    """
    The user's own held-out data of a trainer, prepared as the trainer prepared its training set; `None` if there is
    none.

    Args:
        trainer (`Trainer`): the trainer, with its `arch_dataset` as it was passed.
        given (`Dataset`, *optional*): the training set as it was passed.
        formatting_func (`Callable`, *optional*): what was passed for both.

    Raises:
        TypeError: if the trainer can only prepare data sets of `datasets`, and was given another.
        ValueError: if the data cannot be prepared, lacks columns, or no row is left of it or of the training set.
    """
    dataset = trainer.arch_dataset
    if dataset is not None:
        dataset = _prepare(trainer, dataset, formatting_func)
        _check_columns(trainer, dataset, getattr(given, "column_names", None))
    _check_rows_left("train_dataset", trainer.train_dataset)
    _check_rows_left("arch_dataset", dataset)
    return dataset


def _check_rows_left(name: str, dataset: Any) -> None:
    """Raise a `ValueError` if preparing a data set has left nothing of it. TRL drops rows without any label."""
    if dataset is not None and has_length(dataset) and len(dataset) == 0:
        raise ValueError(
            f"All rows of the `{name}` that you passed were dropped when the trainer prepared it. {NO_LABELS}"
        )


def _check_columns(trainer: SearchingTrainer, dataset: Any, given: list[str] | None) -> None:
    """
    Raise a `ValueError` if the user's held-out data lacks what the model is given of the training data, or what the
    trainer has added to the columns of the training set that it was given.
    """
    train, held_out = (getattr(data, "column_names", None) for data in (trainer.train_dataset, dataset))
    if not train or not held_out:
        return
    needed = set() if given is None else set(train) - set(given)
    if trainer.args.remove_unused_columns:
        needed = set(columns_of_model(trainer))
    missing = [name for name in train if name in needed and name not in held_out]
    if missing and given is not None and not set(missing) & set(given) and preparation(trainer) is None:
        name = type(trainer).__name__
        raise ValueError(
            f"The `arch_dataset` has the columns {held_out}, but the model is trained with {missing} too. "
            f"{name} makes these in its constructor, of its own data sets alone, so yours cannot be "
            "prepared. Please leave `arch_dataset` out, to hold out a part of the training set, or pass the "
            f"`train_dataset` of a {name} that was made of your rows."
        )
    if missing:
        raise ValueError(
            f"The `arch_dataset` has the columns {held_out}, but the model is trained with {missing} too, which it "
            "lacks. Please pass rows in the form of the training set, or leave `arch_dataset` out, to hold out a part "
            "of the training set."
        )


def _prepare(trainer: SearchingTrainer, dataset: Any, formatting_func: Any) -> Any:
    """
    A data set, prepared as the trainer prepared its training set. TRL's trainers tokenize
    it, and leave a tokenized data set as it is; what they take for that differs from one trainer to another.
    """
    prepare = preparation(trainer)
    if prepare is None:
        return dataset
    known = {
        "dataset": dataset,
        "processing_class": trainer.processing_class,
        "args": trainer.args,
        "packing": getattr(trainer.args, "packing", False),
        "formatting_func": formatting_func,
        "dataset_name": "arch",
    }
    try:
        dataset = prepare(**{name: known[name] for name in inspect.signature(prepare).parameters if name in known})
        return with_reference_log_probs(trainer, dataset)
    except (AttributeError, KeyError, StopIteration) as error:
        if not isinstance(dataset, (Dataset, IterableDataset)):
            raise TypeError(
                f"`arch_dataset` must be a `Dataset` or `IterableDataset` here, as the training set, got "
                f"`{type(dataset).__name__}`. Please make one, for example with `datasets.Dataset.from_list`."
            ) from error
        raise ValueError(
            f"The `arch_dataset` with the columns {getattr(dataset, 'column_names', None)} could not be prepared as "
            f"the training set was ({type(error).__name__}: {error}). Please pass rows in the same form."
        ) from error


def subset(dataset: Any, indices: list[int]) -> Any:
    """Some rows of a map-style data set."""
    return dataset.select(indices) if isinstance(dataset, Dataset) else Subset(dataset, indices)
