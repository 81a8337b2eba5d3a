"""Which rows of a data set the commands train on, and which they evaluate on."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset

from diffora_trainer.cli.data import DataArguments, load_splits


@pytest.fixture
def file(tmp_path: Path) -> str:
    path = tmp_path / "rows.jsonl"
    numbered(20).to_json(path)
    return str(path)


def numbered(count: int) -> Dataset:
    return Dataset.from_dict({"row": list(range(count))})


def splits_of(name: str, **options: Any) -> list[list[int]]:
    return [sorted(data["row"]) for data in load_splits(DataArguments(dataset_name=name, **options), seed=0)]


def test_part_of_a_file(file: str) -> None:
    train, test = splits_of(file, dataset_train_split="train[:50%]")
    assert len(train) == 9 and sorted(train + test) == list(range(10))
    parts = {"dataset_train_split": "train[:15]", "dataset_test_split": "train[15:]"}
    assert splits_of(file, **parts) == [list(range(15)), list(range(15, 20))]


@pytest.mark.parametrize("saved", [False, True])
def test_split_that_a_file_does_not_have(saved: bool, file: str, tmp_path: Path) -> None:
    if saved:
        numbered(20).save_to_disk(file := str(tmp_path / "saved"))
    with pytest.raises(
        ValueError, match=r"has no split 'validation'.*'train', or a part of it, such as `train\[:50%\]`"
    ):
        splits_of(file, dataset_train_split="validation")


def test_folder_that_was_saved_to_disk(tmp_path: Path) -> None:
    numbered(20).save_to_disk(folder := str(tmp_path / "saved"))
    train, test = splits_of(folder)
    assert len(train) == 18 and sorted(train + test) == list(range(20))
    parts = {"dataset_train_split": "train[:50%]", "dataset_test_split": "train[-2:]"}
    assert splits_of(folder, **parts) == [list(range(10)), [18, 19]]


def test_split_to_evaluate_on_that_there_is_not(file: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """It is said where rows of the training split take its place, and refused where another split was meant."""
    with caplog.at_level(logging.INFO, logger="diffora_trainer"):
        assert len(splits_of(file, dataset_test_split="tset", eval_fraction=0.2)[1]) == 4
    assert "No split 'tset' (there are 'train'): 20% of 'train' is split off for evaluation." in caplog.text
    numbered(20).to_json(tmp_path / "folder" / "train.jsonl")
    numbered(5).to_json(tmp_path / "folder" / "validation.jsonl")
    folder = str(tmp_path / "folder")
    with pytest.raises(ValueError, match="no split 'tset'.*'train', 'validation'.*`--dataset_test_split`"):
        splits_of(folder, dataset_test_split="tset")
    assert list(map(len, splits_of(folder, dataset_test_split="validation"))) == [20, 5]
    assert list(map(len, splits_of(folder, dataset_test_split="train"))) == [18, 2]
    with caplog.at_level(logging.INFO, logger="diffora_trainer"):
        assert list(map(len, splits_of(folder))) == [18, 2]
    assert "No split 'test' (there are 'train', 'validation'): 10% of 'train'" in caplog.text
