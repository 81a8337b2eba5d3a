"""Which rows the weights and the matrix see, and when."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.data_loader import prepare_data_loader
from peft import get_peft_model
from torch.utils.data import DataLoader, RandomSampler, SequentialSampler, SubsetRandomSampler, WeightedRandomSampler
from transformers import DataCollatorWithPadding, Trainer, TrainerCallback, set_seed
from transformers.trainer_pt_utils import LengthGroupedSampler

from diffora_trainer import DiffoRATrainer
from diffora_trainer.core.schedule import Schedule
from diffora_trainer.search.held_out import HeldOutBatches
from diffora_trainer.trainer.split import HeldOutSampler, SplitPlan
from helpers.checks import adapter, assert_same, step_logs
from helpers.data import lm_dataset, rows_of, tiny_tokenizer
from helpers.marks import mostly_slow
from helpers.trainers import CUT, classifier, lora, make_trainer


ROWS = 40


def collate(rows: list[dict]) -> dict[str, torch.Tensor]:
    batch = {name: torch.tensor([row[name] for row in rows]) for name in rows[0]}
    batch["labels"] = batch.pop("label")
    return batch


class Notes(list):
    """Of a class of its own, so that it is not put back after an architecture step as a trainer's lists are."""


class Recorder:
    """Notes the rows of each training step, those of evaluations, and those of every other loss."""

    def __init__(self, *args: object, **kwargs: object) -> None:
        self.trained: dict[int, list[int]] = {}
        self.searched = Notes()
        self.evaluated: list[int] = []
        self._place = "search"
        super().__init__(*args, **kwargs)

    def training_step(self, model, inputs, *args, **kwargs):
        self.trained.setdefault(self.state.global_step + 1, []).extend(inputs["row"].tolist())
        self._place = "training"
        try:
            return super().training_step(model, inputs, *args, **kwargs)
        finally:
            self._place = "search"

    def evaluate(self, *args, **kwargs):
        self._place = "evaluation"
        try:
            return super().evaluate(*args, **kwargs)
        finally:
            self._place = "search"

    def compute_loss(self, model, inputs, *args, **kwargs):
        inputs = dict(inputs)
        rows = inputs.pop("row").tolist()
        if self._place == "search":
            self.searched += rows
        elif self._place == "evaluation":
            self.evaluated += rows
        return super().compute_loss(model, inputs, *args, **kwargs)

    def rows(self, first: int, last: int) -> list[int]:
        """What was trained on in these steps, in order."""
        return [row for step in range(first, last + 1) for row in self.trained[step]]


class Searching(Recorder, DiffoRATrainer):
    pass


class Stock(Recorder, Trainer):
    pass


def run(folder: Path, cls: type[Recorder] = Searching, **kwargs: object) -> Recorder:
    args = {"remove_unused_columns": False, **kwargs.pop("args", {})}
    resume = kwargs.pop("resume", None)
    settings = {"train_dataset": rows_of(ROWS), "data_collator": collate, **kwargs}
    if cls is Stock:
        settings["model"] = get_peft_model(classifier().model, lora(task_type="SEQ_CLS"))
        settings.pop("search", None)
        settings.pop("arch_dataset", None)
    trainer = make_trainer(folder, cls=cls, args=args, **settings)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


# Name: training arguments, options of the search, steps in an epoch. ROWS are 10 batches.
SPLITS = {
    "cut in the first epoch": ({"max_steps": 30}, {}, 10),
    "cut in the second epoch": ({"max_steps": 40}, {"discretize_at": 14}, 10),
    "cut at the end of an epoch": ({"max_steps": 30}, {"discretize_at": 10}, 10),
    "accumulation": ({"max_steps": 15, "gradient_accumulation_steps": 2}, {"discretize_at": 7}, 5),
    "uneven accumulation": ({"num_train_epochs": 4, "max_steps": -1, "gradient_accumulation_steps": 3}, {}, 4),
    "a worker": ({"max_steps": 30, "dataloader_num_workers": 1}, {}, 10),
    "a plain sampler": ({"max_steps": 30, "accelerator_config": {"use_seedable_sampler": False}}, {}, 10),
    "in order": ({"max_steps": 30, "train_sampling_strategy": "sequential"}, {"arch_split": 0.2}, 10),
}


@pytest.mark.parametrize(
    "name", mostly_slow(SPLITS, "cut in the second epoch", "uneven accumulation", "a worker", "a plain sampler")
)
def test_held_out_rows_are_kept_from_the_weights_until_the_cut(name: str, tmp_path: Path) -> None:
    args, search, epoch = SPLITS[name]
    found = run(tmp_path / "found", args=args, search=search)
    stock = run(tmp_path / "stock", Stock, args=args)
    cut, last = int(search.get("discretize_at", CUT)), max(stock.trained)
    held_out = set(found.searched)
    assert len(held_out) == math.ceil(search.get("arch_split", 0.1) * ROWS)

    # Before the cut: the order of the stock run without the held-out rows, as far as they leave rows in the epoch.
    for start in range(1, cut + 1, epoch):
        steps = start, min(start + epoch - 1, cut)
        order, expected = found.rows(*steps), [r for r in stock.rows(start, start + epoch - 1) if r not in held_out]
        assert not held_out & set(order)
        assert order[: len(expected)] == expected[: len(order)]
    # The cut gives them back, within the epoch if it is in the midst of one, and then every epoch is the stock run's.
    assert held_out <= set(found.rows(cut + 1, last))
    after = math.ceil(cut / epoch) * epoch
    if after != cut:
        assert set(found.rows(cut + 1, after)) >= held_out
        assert len(set(found.rows(after - epoch + 1, after))) == ROWS  # each row once in that epoch
    assert found.rows(after + 1, last) == stock.rows(after + 1, last)
    # Nothing of it changes the number of steps, or of rows in a step.
    assert {s: len(rows) for s, rows in found.trained.items()} == {s: len(rows) for s, rows in stock.trained.items()}
    assert found.state.max_steps == stock.state.max_steps and found.state.epoch == stock.state.epoch


# What the run had, and what is passed when it is resumed after its pruning.
ARCH: dict[str, Any] = {"arch_dataset": rows_of(8)}
EARLY: dict[str, Any] = {"decide_early": True, "discretize_at": 9}
CHANGES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "nothing": ({}, {}),
    "no arch_dataset any more": (ARCH, {"search": {"arch_seed": 5}}),
    "no arch_dataset any more, a stream": ({**ARCH, "stream": True}, {"stream": True}),
    "an arch_dataset": ({}, ARCH),
    "an arch_dataset, a stream": ({"stream": True}, {**ARCH, "stream": True}),
    "fewer held-out rows of a stream": ({"stream": True}, {"stream": True, "search": {"arch_batch_size": 1}}),
    "a later moment": ({"search": EARLY}, {"search": {**EARLY, "discretize_at": 10}}),
    "no early choice": ({"search": EARLY}, {"search": {"discretize_at": 9}}),
    "more steps": (
        {"search": {**EARLY, "discretize_at": 0.75, "arch_warmup": 0.25}},
        {"search": {**EARLY, "discretize_at": 0.75, "arch_warmup": 0.25}, "args": {"max_steps": 24}},
    ),
}


@pytest.mark.parametrize("name", CHANGES)
def test_rows_go_back_as_in_the_run_that_is_resumed_after_its_pruning(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Until the end of the epoch, whatever the trainer is given now: no row comes twice, and none is left out."""

    def decide(run: Any, batches: int) -> tuple[Schedule, str] | None:
        return (run.schedule.decided(run.step), "decided") if run.step == 5 else None

    def make(folder: Path, stream: bool = False, resume: str | None = None, **kwargs: Any) -> Recorder:
        search = {"discretize_at": 6, **kwargs.pop("search", {})}
        args = {"save_strategy": "steps", "save_steps": 6, **kwargs.pop("args", {})}
        rows = rows_of(ROWS).to_iterable_dataset() if stream else rows_of(ROWS)
        return run(folder, train_dataset=rows, search=search, args=args, resume=resume, **kwargs)

    monkeypatch.setattr("diffora_trainer.search.run.decide_early", decide)
    had, passed = CHANGES[name]
    whole = make(tmp_path, **had)
    assert whole.selection.step == (5 if "decide_early" in had.get("search", {}) else 6)
    assert sorted(whole.rows(1, 10)) == list(range(ROWS))
    resumed = make(tmp_path / "again", resume=f"{tmp_path}/checkpoint-6", **passed)
    assert resumed.rows(7, 10) == whole.rows(7, 10)


def test_rows_go_back_as_an_old_checkpoint_lets_know(tmp_path: Path) -> None:
    """One that does not say which rows were held out: then that is as the options say now."""
    args = {"save_strategy": "steps", "save_steps": 7}
    whole = run(tmp_path, search={"discretize_at": 6}, args=args)
    file = tmp_path / "checkpoint-7" / "diffora_state.json"
    state = json.loads(file.read_text())
    assert state.pop("given_back") == [4, 6]
    file.write_text(json.dumps({**state, "format": 7}))
    resumed = run(tmp_path / "again", search={"discretize_at": 6}, args=args, resume=str(file.parent))
    assert resumed.rows(8, 12) == whole.rows(8, 12)
    with pytest.raises(ValueError, match="`arch_seed` differ"):
        run(tmp_path / "other", search={"discretize_at": 6, "arch_seed": 5}, args=args, resume=str(file.parent))


class StopEpochs(TrainerCallback):
    """Ends each epoch after its third step, and saves one of them."""

    def on_step_end(self, args, state, control, **kwargs) -> None:
        control.should_epoch_stop = state.global_step % 3 == 0
        control.should_save = state.global_step == 7


@pytest.mark.parametrize("stock", [RandomSampler, lambda rows: LengthGroupedSampler(6, lengths=[1] * len(rows))])
def test_processes_share_an_order_that_accelerate_does_not_seed(stock: Any) -> None:
    """With `use_seedable_sampler=False`, whatever each has drawn at random before the epoch: as in a stock run."""

    held_out = [1, 5, 20]

    def order(split: bool) -> list[int]:
        """The rows of the batches that two processes take in turn."""
        batches = []
        for rank in range(2):
            plan = SplitPlan(held_out, seed=0)
            plan.set_prune_step(2, steps_per_epoch=4, rows_per_step=6)
            sampler = HeldOutSampler(stock(range(24)), plan, 24) if split else stock(range(24))
            torch.manual_seed(0)
            loader = prepare_data_loader(
                DataLoader(range(24), batch_size=3, sampler=sampler),
                num_processes=2,
                process_index=rank,
                put_on_device=False,
                use_seedable_sampler=False,
            )
            torch.manual_seed(rank)
            batches.append([batch.tolist() for batch in loader])
        return [row for pair in zip(*batches, strict=True) for batch in pair for row in batch]

    found, usual = order(split=True), order(split=False)
    assert sorted(found) == sorted(usual) == list(range(24))
    assert found[:12] == [row for row in usual if row not in held_out][:12]


def test_a_sampler_without_a_generator_has_none_when_it_is_wrapped() -> None:
    assert not hasattr(HeldOutSampler(SequentialSampler(range(4)), SplitPlan([1], seed=0), 4), "generator")


def test_each_epoch_before_the_cut_has_other_rows_in_the_place_of_the_held_out_ones() -> None:
    plan = SplitPlan([1, 5, 20, 21, 22], seed=0)
    plan.set_prune_step(100, steps_per_epoch=4, rows_per_step=6)
    sampler = HeldOutSampler(SequentialSampler(range(24)), plan, 24)
    epochs = []
    for epoch in range(2):
        sampler.set_epoch(epoch)
        epochs.append(list(sampler))
    for order in epochs:
        assert len(order) == 24 and order[:19] == [row for row in range(24) if row not in plan.held_out]
        assert not plan.held_out & set(order[19:])
    assert epochs[0][19:] != epochs[1][19:]


def test_each_pass_over_the_held_out_rows_has_another_order() -> None:
    batches = HeldOutBatches(range(8), collate=list, batch_size=4, seed=0)
    first, second = ([*next(batches), *next(batches)] for _ in range(2))
    assert sorted(first) == sorted(second) == list(range(8)) and first != second


def test_held_out_rows_stay_out_where_epochs_end_early(tmp_path: Path) -> None:
    """Also in a run that is resumed, whose place the parent takes from full epochs, and in one that skips no rows."""
    args = {"num_train_epochs": 10, "max_steps": -1, "save_strategy": "steps", "save_steps": 1000}
    options = {"train_dataset": rows_of(24), "search": {"discretize_at": 16}, "callbacks": [StopEpochs()]}
    runs = [run(tmp_path, args=args, **options)]
    for skip in (False, True):
        resumed = {**args, "ignore_data_skip": skip}
        runs.append(run(tmp_path / "resumed", args=resumed, resume=str(tmp_path / "checkpoint-7"), **options))
    for found in runs:
        held_out, first, last = set(found.searched), min(found.trained), max(found.trained)
        assert found.selection is not None and found.selection.step == 16 and len(held_out) == 3
        assert not held_out & set(found.rows(first, 16))
        assert held_out & set(found.rows(17, last))


def test_search_never_reads_the_evaluation_set(tmp_path: Path) -> None:
    trainer = run(tmp_path, eval_dataset=rows_of(12, start=1000), args={"eval_strategy": "steps", "eval_steps": 2})
    assert set(trainer.evaluated) == set(range(1000, 1012))
    assert trainer.searched and max(trainer.searched) < ROWS


def test_sampler_of_a_subclass_draws_by_the_numbers_of_the_whole_set(tmp_path: Path) -> None:
    """One weight a row, as it may stand in a file: rows of weight 0 are never trained on, nor stand in for others."""
    weights = [float(row % 3 > 0) for row in range(ROWS)]

    class Weighted(Searching):
        def _get_train_sampler(self, dataset: Any = None) -> Any:
            return WeightedRandomSampler(weights, ROWS)

    class Ordered(Searching):
        def _get_train_sampler(self, dataset: Any = None) -> Any:
            return None  # in order

    class Tensors(Searching):
        def _get_train_sampler(self, dataset: Any = None) -> Any:
            return torch.randperm(len(self.train_dataset if dataset is None else dataset))

    for cls in (Weighted, Ordered, Tensors):
        found = run(tmp_path, cls, args={"max_steps": 40}, search={"discretize_at": 12})
        held_out, before = set(found.searched), set(found.rows(1, 12))
        assert len(held_out) == 4 and before and not held_out & before
        if cls is Weighted:
            trained = set(found.rows(1, 40))
            assert trained <= {row for row in range(ROWS) if weights[row]} and held_out & trained
        else:
            assert held_out <= set(found.rows(13, 20)) and len(set(found.rows(21, 30))) == ROWS

    class Outside(Searching):
        def _get_train_sampler(self, dataset: Any = None) -> Any:
            return SubsetRandomSampler(range(2 * ROWS))

    with pytest.raises(ValueError, match="SubsetRandomSampler.*gave [0-9]+, .*has 40 rows"):
        run(tmp_path, Outside)


def test_stream_gives_its_first_rows_back_after_the_cut(tmp_path: Path) -> None:
    stream = rows_of(100).to_iterable_dataset()
    found = run(tmp_path / "found", train_dataset=stream, args={"max_steps": 20}, search={"arch_split": 0.25})
    held_out = list(range(5 * 4))  # five architecture steps of a batch of four
    assert sorted(set(found.searched)) == held_out
    assert found.rows(1, CUT) == list(range(20, 20 + 4 * CUT))
    assert found.rows(CUT + 1, CUT + 5) == held_out
    assert found.rows(CUT + 6, 20) == list(range(20 + 4 * CUT, 80))
    assert found.train_dataset is stream


def test_stream_of_several_epochs(tmp_path: Path) -> None:
    """24 rows, of which 12 are held out: the cut comes in the third pass over the others, the fourth pass is whole."""
    found = run(
        tmp_path,
        train_dataset=rows_of(24).to_iterable_dataset(),
        args={"max_steps": 18},
        search={"arch_every": 2, "arch_split": 0.5},  # three architecture steps
    )
    assert set(found.searched) == set(range(12))
    assert set(found.rows(1, CUT)) == set(range(12, 24))
    assert set(found.rows(CUT + 1, 18)) == set(range(24))


@pytest.mark.parametrize("streaming", [False, True])
def test_arch_dataset_leaves_the_training_data_alone(streaming: bool, tmp_path: Path) -> None:
    own = rows_of(16, start=500)
    args = {"max_steps": 14}
    found = run(tmp_path / "found", arch_dataset=own.to_iterable_dataset() if streaming else own, args=args)
    stock = run(tmp_path / "stock", Stock, args=args)
    assert set(found.searched) == set(range(500, 516))
    assert found.trained == stock.trained


@pytest.mark.parametrize("formatted", [False, True])
def test_sft_search_prepares_a_raw_arch_dataset(formatted: bool, tmp_path: Path) -> None:
    """
    Text is prepared as the training set's is, also by a `formatting_func`: the search gives the numbers that the
    prepared rows give.
    """
    own, options = lm_dataset(8, seed=3), {}
    if formatted:
        own = own.rename_column("text", "says")
        rows = lm_dataset(24).rename_column("text", "says")
        options = {"train_dataset": rows, "formatting_func": lambda row: row["says"]}
    raw = make_trainer(tmp_path, "sft", arch_dataset=own, **options)
    prepared = make_trainer(tmp_path, "sft")
    prepared.arch_dataset = prepared._prepare_dataset(
        lm_dataset(8, seed=3), prepared.processing_class, prepared.args, False, None, "arch"
    )
    for trainer in (raw, prepared):
        set_seed(3)
        trainer.train()
    losses = [log["diffora/arch_loss"] for log in step_logs(raw).values() if "diffora/arch_loss" in log]
    assert len(losses) == 5
    assert raw.selection == prepared.selection


@pytest.mark.parametrize("shape", ["packed", "padding-free", "stream"])
def test_sft_data_shapes(shape: str, tmp_path: Path) -> None:
    args = {
        "packed": {"packing": True, "max_length": 48},
        "padding-free": {"padding_free": True, "max_length": None},
        "stream": {},
    }[shape]
    rows = lm_dataset(60)
    trainer = make_trainer(
        tmp_path, "sft", args=args, train_dataset=rows.to_iterable_dataset() if shape == "stream" else rows
    )
    trainer.train()
    logs = step_logs(trainer)
    assert sorted(logs) == list(range(1, 13)) and "diffora/gap" in logs[CUT]
    assert all(math.isfinite(value) for log in logs.values() for value in log.values())
    assert 0 < len(trainer.selection.selected) < len(trainer.selection.modules)


def test_collator_that_draws_leaves_no_trace_in_the_training(tmp_path: Path) -> None:
    """One that masks tokens at random, say: more architecture steps change no weight and no row of the training."""
    pad = DataCollatorWithPadding(tiny_tokenizer())

    def masking(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        batch = dict(pad(rows))
        hidden = torch.rand(batch["input_ids"].shape) < 0.3 * random.random() + 0.3 * np.random.random()
        return {**batch, "input_ids": batch["input_ids"].masked_fill(hidden, 3)}

    found = []
    for every in (1, 100):
        search = {"selection_ratio": 1.0, "arch_every": every}
        trainer = make_trainer(tmp_path, data_collator=masking, search=search)
        trainer.train()
        losses = [log["loss"] for log in trainer.state.log_history if "loss" in log]
        found.append((losses, adapter(trainer.model)))
    assert_same(*found)
