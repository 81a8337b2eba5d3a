"""The training and the evaluation set, from the Hub or from local files."""

from __future__ import annotations

import glob
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from gzip import BadGzipFile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..logging import get_logger


if TYPE_CHECKING:
    from datasets import Dataset


logger = get_logger(__name__)

# How the `datasets` library names the reader of a file, by the end of the file's name; `.gz` may follow.
FILE_READERS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}

NO_ROWS = "`dataset_name={!r}` has no rows, so nothing can be learned. Please check the file, and how it was made."

_PART = re.compile(r"train(\[.*\])?")
"""How `datasets` names the one split of a file, or a part of it."""


@dataclass
class DataArguments:
    """
    Which rows are trained on and which are evaluated on.

    Args:
        dataset_name (`str`, *optional*):
            Hub id or local folder of the data set (also one of `Dataset.save_to_disk`), or a local .jsonl, .json, .csv
            or .parquet file.
        dataset_config (`str`, *optional*):
            Configuration of the data set. Not used for a file.
        dataset_train_split (`str`, *optional*, defaults to `"train"`):
            Split to train on; of a file `"train"` or a part of it, such as `"train[:50%]"`.
        dataset_test_split (`str`, *optional*, defaults to `"test"`):
            Split to evaluate on; of a file it may be a part of `"train"` too. If it is that to train on, or the data
            set has no other one, `eval_fraction` of the training split is split off for evaluation instead.
        eval_fraction (`float`, *optional*, defaults to `0.1`):
            Part of the training split to split off for evaluation when there is no split to evaluate on.
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
        metadata={"help": "Split to evaluate on. If missing, `eval_fraction` of the training split is used."},
    )
    eval_fraction: float = field(
        default=0.1, metadata={"help": "Part of the training split to evaluate on if there is no split for it."}
    )
    max_train_samples: int | None = field(default=None, metadata={"help": "Train on this many examples at most."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "Evaluate on this many examples at most."})


def looks_local(name: str) -> bool:
    """Whether a name is a local path by its form, and not a Hub id."""
    return Path(name).is_absolute() or name.startswith(".")


def load_splits(args: DataArguments, seed: int) -> tuple[Dataset, Dataset]:
    """
    The training and the evaluation set.

    Raises:
        ValueError: if no data set, no such split, or no sensible `eval_fraction` was named, or a file cannot be read
            or has no rows.
        FileNotFoundError: if a local path does not exist.
    """
    from datasets import DatasetDict

    if not args.dataset_name:
        raise ValueError("`dataset_name` is missing: a Hub id, or a local file or folder.")
    path = Path(args.dataset_name)
    reader = FILE_READERS.get(Path(path.stem if path.suffix == ".gz" else path).suffix.lower())
    if (reader or looks_local(args.dataset_name)) and not path.exists():
        raise FileNotFoundError(
            f"`dataset_name` looks like a local path, but there is no {path}. Please start the script in the folder "
            "that the path is relative to, or pass a Hub id such as `--dataset_name stanfordnlp/sst2`."
        )
    if path.is_file() and reader is None:
        raise ValueError(
            f"`dataset_name={args.dataset_name!r}` is a file of a kind that is not read. Please pass one whose name "
            f"ends with {', '.join(FILE_READERS)}, or with .gz after that."
        )
    if path.is_file() and not path.stat().st_size:  # each reader says something else of it, and so does each version
        raise ValueError(NO_ROWS.format(args.dataset_name))
    if (path / "state.json").is_file() and (path / "dataset_info.json").is_file():
        data: Any = _load_saved(args)
    else:
        data = _load(args, path, reader if path.is_file() else None)
    assert isinstance(data, DatasetDict)
    if args.dataset_train_split not in data:
        raise ValueError(
            f"The data set has no split {args.dataset_train_split!r}; it has {', '.join(map(repr, data))}. Choose one "
            "with `--dataset_train_split`."
        )
    train = data[args.dataset_train_split]
    if not len(train):
        raise ValueError(NO_ROWS.format(args.dataset_name))
    if args.dataset_test_split in data and args.dataset_test_split != args.dataset_train_split:
        return limit_splits(args, train, data[args.dataset_test_split], seed)
    if args.dataset_test_split not in data:
        _check_test_split(args, list(data))
    if not 0 < args.eval_fraction < 1:
        raise ValueError(f"`eval_fraction` must be between 0 and 1, got {args.eval_fraction}.")
    if len(train) < 2:
        raise ValueError(
            f"The training split {args.dataset_train_split!r} has one row, so none can be split off for "
            "evaluation. Please add rows, or name another split with `--dataset_test_split`."
        )
    parts = train.train_test_split(test_size=args.eval_fraction, seed=seed)
    return limit_splits(args, parts["train"], parts["test"], seed)


def _check_test_split(args: DataArguments, found: list[str]) -> None:
    """
    Say what is evaluated on where a data set does not have the split for it. One that somebody named is refused where
    there are others; a recipe may name one that a user's own file does not have.
    """
    name, there = args.dataset_test_split, ", ".join(map(repr, found))
    if len(found) > 1 and name != type(args).dataset_test_split:
        raise ValueError(
            f"The data set has no split {name!r} to evaluate on; it has {there}. Please choose one with "
            f"`--dataset_test_split`, or {args.dataset_train_split!r} to split off `eval_fraction` of it."
        )
    logger.info(
        f"No split {name!r} (there are {there}): {args.eval_fraction:.0%} of {args.dataset_train_split!r} is split "
        "off for evaluation."
    )


def _splits_of_file(args: DataArguments) -> list[str]:
    """The parts of the one split of a file that are trained and evaluated on."""
    first, second = args.dataset_train_split, args.dataset_test_split
    if not _PART.fullmatch(first):
        raise ValueError(
            f"`dataset_name={args.dataset_name!r}` has no split {first!r}. Please pass `--dataset_train_split` as "
            "'train', or a part of it, such as `train[:50%]`."
        )
    return [first, second] if _PART.fullmatch(second) and second != first else [first]


def _load_saved(args: DataArguments) -> Any:
    """A folder that `Dataset.save_to_disk` has written, which has one split, as a file has."""
    from datasets import DatasetDict, ReadInstruction, load_from_disk

    data: Any = load_from_disk(str(args.dataset_name))
    found = {}
    for name in _splits_of_file(args):
        parts = ReadInstruction.from_spec(name).to_absolute({"train": len(data)})
        ranges = [range(part.from_ or 0, len(data) if part.to is None else part.to) for part in parts]
        found[name] = data.select([index for rows in ranges for index in rows])
    return DatasetDict(found)


def _load(args: DataArguments, path: Path, reader: str | None) -> Any:
    """A data set as `datasets` reads it; what it says of a file that it cannot read names neither file nor remedy."""
    from datasets import DatasetDict, load_dataset
    from datasets.exceptions import DatasetGenerationError

    name = args.dataset_name
    pattern = glob.escape(str(path.absolute()))  # as which it reads paths: brackets and stars may stand in names
    parts = [] if reader is None else _splits_of_file(args)
    try:
        if reader is None:
            return load_dataset(name, name=args.dataset_config)
        return DatasetDict({part: load_dataset(reader, data_files=pattern, split=part) for part in parts})
    except StopIteration as error:  # from a look at the first rows
        raise ValueError(NO_ROWS.format(name)) from error
    except (DatasetGenerationError, BadGzipFile, EOFError, ValueError) as error:
        if "corresponds to no data" in str(error) or "at least one example" in str(error.__cause__):  # `datasets` 4
            raise ValueError(NO_ROWS.format(name)) from error
        if reader is None and isinstance(error, ValueError):  # such as a configuration that there is not
            raise
        reason = str(error.__cause__ or error).strip().split("\n")[0].rstrip(".")
        raise ValueError(
            f"`dataset_name={name!r}` cannot be read{f' as {reader}' if reader else ''}: {reason}. Please check that "
            "the file is complete and that all rows have the same columns, with values of one type in each."
        ) from error
    except FileNotFoundError as error:
        if path.is_dir() and pattern != str(path.absolute()):
            raise ValueError(
                f"`dataset_name={name!r}` is a folder with a bracket or a star in its path, which `datasets` reads as "
                "a pattern. Please pass a file in it, or rename the folder."
            ) from error
        raise


def check_texts(splits: Sequence[Dataset], columns: Sequence[str], lists: bool = False) -> None:
    """
    Check that each row has something to read in some columns.

    Args:
        splits (`Sequence[Dataset]`): the training and the evaluation set.
        columns (`Sequence[str]`): what is read of them; they have them.
        lists (`bool`, *optional*, defaults to `False`): whether lists may stand there too: of messages, or of tokens.

    Raises:
        ValueError: if a column holds something else, or bytes that are not text, or rows have nothing there.
    """
    from datasets import Value

    for which, data in zip(("training", "evaluation"), splits, strict=True):
        for name in columns:
            feature, column = data.features[name], data.data.column(name)
            kind = feature.dtype if isinstance(feature, Value) else "string" if lists else type(feature).__name__
            if "string" not in kind and kind != "null":
                raise ValueError(
                    f"The column {name!r} of the {which} set holds values of type {kind}, not texts. "
                    "Please name another column, or write its values as strings."
                )
            try:
                column.validate(full=True)  # the reader of JSON takes any bytes
            except ValueError as error:
                raise ValueError(
                    f"The column {name!r} of the {which} set cannot be read: {error}. Please save the file as UTF-8."
                ) from error
            if not column.null_count:  # of the whole file, also of rows that are not in this split
                continue
            batches = data.select_columns([name]).with_format("arrow").iter(1000)
            if missing := sum(batch.column(name).null_count for batch in batches):
                raise ValueError(
                    f"{missing:,} of the {len(data):,} rows of the {which} set have nothing (null) in the column "
                    f"{name!r}. Please drop them, or write a text there."
                )


def limit_splits(args: DataArguments, train: Dataset, test: Dataset, seed: int) -> tuple[Dataset, Dataset]:
    """
    At most the named numbers of examples, drawn at random.

    Raises:
        ValueError: if no example would be left.
    """
    for option in ("max_train_samples", "max_eval_samples"):
        if (limit := getattr(args, option)) is not None and limit < 1:
            raise ValueError(
                f"You passed `{option}={limit}`, so there would be no row to read. Please pass 1 or more, or leave it "
                "out for all rows."
            )
    if not len(test):
        raise ValueError(
            f"The evaluation split {args.dataset_test_split!r} has no rows. Please name another one with "
            "`--dataset_test_split`; without it, a part of the training split is used."
        )
    if args.max_train_samples is not None:
        train = train.shuffle(seed=seed).select(range(min(args.max_train_samples, len(train))))
    if args.max_eval_samples is not None:
        test = test.shuffle(seed=seed).select(range(min(args.max_eval_samples, len(test))))
    return train, test
