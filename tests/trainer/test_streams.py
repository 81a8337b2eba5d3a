"""How much of a stream is held out, and runs that find nothing to train on."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from torch.utils.data import IterableDataset

from diffora_trainer.trainer.held_out import read_head
from helpers.checks import adapter, assert_same, step_logs
from helpers.data import classification_dataset, rows_of
from helpers.options import make_config
from helpers.trainers import CUT, make_trainer


class Stream(IterableDataset):
    """Rows one at a time, which notes how many were read in each pass."""

    def __init__(self, count: int) -> None:
        self.rows = list(rows_of(min(count, 40)).remove_columns("row"))
        self.count, self.read = count, []

    def __iter__(self) -> Iterator[Any]:
        self.read.append(0)
        for index in range(self.count):
            self.read[-1] += 1
            yield self.rows[index % len(self.rows)]


@pytest.mark.parametrize(
    ("size", "steps", "share", "expected"),
    [
        (2000, 60, 0.1, 192),  # a tenth of the 1,920 rows that the run reads
        (1500, 60, 0.1, 150),  # the stream is shorter than what the run reads
        (1500, 200, 0.3, 450),
        (30_000, 2000, 0.1, 2048),  # all that the search reads
        (7, 60, 0.1, 1),
    ],
)
def test_at_most_its_share_is_held_out(
    size: int, steps: int, share: float, expected: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a stream as of a data set with a length. The batches are those of 32 rows."""
    stream = Stream(size)
    trainer = make_trainer(
        tmp_path,
        train_dataset=stream,
        args={"max_steps": steps, "per_device_train_batch_size": 32},
        diffora_config=make_config(arch_split=share, arch_every=1, discretize_at=0.9),
    )
    rows = read_head(trainer, stream)
    assert len(rows) == expected
    assert rows == [stream.rows[index % len(stream.rows)] for index in range(expected)]
    assert stream.read == [min(size, round(min(2048, share * 32 * steps) / share))]  # no further than to know


@pytest.mark.parametrize(("size", "held_out"), [(2000, 4), (20, 2)])
def test_run_on_a_stream_says_what_it_holds_out(
    size: int, held_out: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trainer = make_trainer(tmp_path, train_dataset=Stream(size))
    with caplog.at_level(logging.INFO, logger="diffora_trainer"):
        trainer.train()
    assert re.search(rf"on {held_out} held-out rows", caplog.text)
    assert trainer.state.global_step == 12 and trainer.selection.step == CUT
    assert "diffora/gap" in step_logs(trainer)[CUT]


@pytest.mark.parametrize("method", ["sora", "beamlora"])
def test_trained_gates_hold_out_of_a_stream_what_losses_are_compared_on(method: str, tmp_path: Path) -> None:
    """Their gates learn in the training steps. There are 8 batches of 4 rows."""
    options = {"gate_learning_rate": 0.1}
    config = make_config(method=method, method_options=options, arch_split=0.9, selection_ratio=0.5, discretize_at=CUT)
    trainer = make_trainer(tmp_path, train_dataset=Stream(2000), diffora_config=config)
    trainer.train()
    assert len(read_head(trainer, trainer.train_dataset)) == 32
    assert trainer.selection.step == CUT and "diffora/gap" in step_logs(trainer)[CUT]


def test_a_shuffled_stream_that_was_read_before_holds_the_same_rows_out(tmp_path: Path) -> None:
    stream = classification_dataset(64).to_iterable_dataset(2).shuffle(seed=3, buffer_size=16)

    def make(folder: Path) -> Any:
        args = {"save_strategy": "steps", "save_steps": 5, "max_steps": 12, "dataloader_num_workers": 0}
        return make_trainer(folder, train_dataset=stream, args=args)

    whole = make(tmp_path)
    whole.train()
    stream.set_epoch(1)  # where a run of several epochs leaves it
    resumed = make(tmp_path / "resumed")
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-5"))
    assert resumed.selection == whole.selection


def test_a_shuffled_stream_keeps_its_rows_out_of_every_epoch_before_the_pruning(tmp_path: Path) -> None:
    stream = classification_dataset(12).to_iterable_dataset(2).shuffle(seed=3, buffer_size=16)
    args = {"max_steps": 12, "dataloader_num_workers": 0, "per_device_train_batch_size": 4}
    trainer = make_trainer(tmp_path, train_dataset=stream, args=args)
    seen: list[tuple[int, list[tuple[int, ...]]]] = []
    step = trainer.training_step

    def noted(model: Any, inputs: Any, *others: Any) -> Any:
        rows = zip(inputs["input_ids"].tolist(), inputs["attention_mask"].tolist(), strict=True)
        read = [tuple(token for token, there in zip(ids, mask, strict=True) if there) for ids, mask in rows]
        seen.append((trainer.state.global_step, read))
        return step(model, inputs, *others)

    trainer.training_step = noted
    trainer.train()
    held_out = {tuple(row["input_ids"]) for row in read_head(trainer, stream)}
    before = [row for number, rows in seen for row in rows if number < CUT]
    after = [row for number, rows in seen for row in rows if number >= CUT]
    assert len(before) > 24 and held_out and not held_out & set(before)  # more than two epochs
    assert held_out <= set(after)


def test_stream_of_one_row_is_refused(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, train_dataset=Stream(1))
    with pytest.raises(ValueError, match="has 1 row.*pass a longer stream, or `arch_dataset=`"):
        trainer.train()


class Once(Stream):
    """A stream that can be read a single time, as a generator can."""

    def __iter__(self) -> Iterator[Any]:
        if not self.read:
            yield from super().__iter__()


def test_stream_that_cannot_be_read_again_is_refused(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, train_dataset=Once(200))
    with pytest.raises(ValueError, match="no row beside the 4 that are held out.*can be read again from its start"):
        trainer.train()


class Empty(IterableDataset):
    def __iter__(self) -> Iterator[Any]:
        return iter(())


def test_run_without_a_step_is_an_error(tmp_path: Path) -> None:
    """Else an adapter that was never trained would be saved, and a card written for it."""
    args = {"accelerator_config": {"dispatch_batches": False}}
    # With data of its own to search on nothing is read of the training stream before its first step.
    trainer = make_trainer(tmp_path, train_dataset=Empty(), arch_dataset=rows_of(8).remove_columns("row"), args=args)
    before = adapter(trainer.model)
    with pytest.raises(ValueError, match="step 0 of 12 without having made a step"):
        trainer.train()
    assert_same(adapter(trainer.model), before)
    assert not any(module._forward_hooks for module in trainer.model.modules())

    trainer = make_trainer(tmp_path, train_dataset=Stream(200), args=args)
    trainer.train()
    trainer.train_dataset = Empty()  # the model goes on as it was cut
    with pytest.raises(ValueError, match="step 0 of 12 without having made a step"):
        trainer.train()


def test_finished_run_may_be_resumed(tmp_path: Path) -> None:
    make_trainer(tmp_path, args={"save_strategy": "steps", "save_steps": 12}).train()
    resumed = make_trainer(tmp_path)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 12 and resumed.selection.step == CUT
