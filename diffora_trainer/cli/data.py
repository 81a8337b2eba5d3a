"""The training and the evaluation set, from the Hub or from local files."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING


if TYPE_CHECKING:
    from datasets import Dataset

# How the `datasets` library names the reader of a file, by the end of the file's name; `.gz` may follow.
FILE_READERS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}


@dataclass
class DataArguments:
    """
    Which rows are trained on and which are evaluated on.

    Args:
        dataset_name (`str`, *optional*):
            Hub id or local folder of the data set, or a local .jsonl, .json, .csv or .parquet file.
        dataset_config (`str`, *optional*):
            Configuration of the data set. Not used for a file.
        dataset_train_split (`str`, *optional*, defaults to `"train"`):
            Split to train on.
        dataset_test_split (`str`, *optional*, defaults to `"test"`):
            Split to evaluate on. If the data set has none of this name, `eval_fraction` of the training split is held
            out instead.
        eval_fraction (`float`, *optional*, defaults to `0.1`):
            Part of the training split that is held out when there is no split to evaluate on.
        max_train_samples (`int`, *optional*):
            Train on this many examples at most.
        max_eval_samples (`int`, *optional*):
            Evaluate on this many examples at most.
    """

    dataset_name: str | None = field(
        default=None, metadata={"help": "Hub id, local folder, or a local .jsonl/.json/.csv/.parquet file."}
    )
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of the data set."})
    dataset_train_split: str = field(default="train", metadata={"help": "Split to train on."})
    dataset_test_split: str = field(
        default="test",
        metadata={"help": "Split to evaluate on. If missing, `eval_fraction` of the training split is held out."},
    )
    eval_fraction: float = field(
        default=0.1, metadata={"help": "Part of the training split held out when there is no split to evaluate on."}
    )
    max_train_samples: int | None = field(default=None, metadata={"help": "Train on this many examples at most."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "Evaluate on this many examples at most."})


def load_splits(args: DataArguments, seed: int) -> tuple[Dataset, Dataset]:
    """
    The training and the evaluation set.

    Raises:
        ValueError: if no data set, no such split, or no sensible `eval_fraction` was named.
        FileNotFoundError: if a local path does not exist.
    """
    from datasets import DatasetDict, load_dataset

    if not args.dataset_name:
        raise ValueError("`dataset_name` is missing: a Hub id, or a local file or folder.")
    path = Path(args.dataset_name)
    reader = FILE_READERS.get(Path(path.stem if path.suffix == ".gz" else path).suffix.lower())
    if (reader or path.is_absolute() or args.dataset_name.startswith(".")) and not path.exists():
        raise FileNotFoundError(
            f"`dataset_name` looks like a local path, but there is no {path}. Please start the script in the folder "
            "that the path is relative to, or pass a Hub id such as `--dataset_name stanfordnlp/sst2`."
        )
    if reader and path.is_file():
        data = load_dataset(reader, data_files={args.dataset_train_split: str(path)})
    else:
        data = load_dataset(args.dataset_name, name=args.dataset_config)
    assert isinstance(data, DatasetDict)
    if args.dataset_train_split not in data:
        raise ValueError(
            f"The data set has no split {args.dataset_train_split!r}; it has {', '.join(map(repr, data))}. Choose one "
            "with `--dataset_train_split`."
        )
    train = data[args.dataset_train_split]
    if args.dataset_test_split in data and args.dataset_test_split != args.dataset_train_split:
        return limit_splits(args, train, data[args.dataset_test_split], seed)
    if not 0 < args.eval_fraction < 1:
        raise ValueError(f"`eval_fraction` must be between 0 and 1, got {args.eval_fraction}.")
    parts = train.train_test_split(test_size=args.eval_fraction, seed=seed)
    return limit_splits(args, parts["train"], parts["test"], seed)


def limit_splits(args: DataArguments, train: Dataset, test: Dataset, seed: int) -> tuple[Dataset, Dataset]:
    """At most the named numbers of examples, drawn at random."""
    if args.max_train_samples is not None:
        train = train.shuffle(seed=seed).select(range(min(args.max_train_samples, len(train))))
    if args.max_eval_samples is not None:
        test = test.shuffle(seed=seed).select(range(min(args.max_eval_samples, len(test))))
    return train, test
