"""What a loop of one's own may do to a `SelectionRun` without harm, and what it is told of."""

from __future__ import annotations

import pytest
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from torch import Tensor, nn
from torch.utils.data import DataLoader

from diffora_trainer import SelectionRun
from helpers.checks import assert_same
from helpers.loops import SOURCES, STEPS, Loop, batches, loss_of, trained, with_defaults
from helpers.trainers import WARMUP


class OfFirst(nn.Module):
    """A norm over the first feature of a batch, whose output is not used."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, inputs: Tensor) -> Tensor:
        self.norm(inputs[:, :1])
        return inputs


def test_a_loss_function_may_empty_the_batches_that_it_is_given() -> None:
    """Held-out batches are read again and again, and one that trains is kept for the second order."""

    def popping(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        labels = batch.pop("labels")
        return nn.functional.cross_entropy(model(**batch).logits, labels)

    def whole(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        return popping(model, dict(batch))

    runs = []
    for loss_fn in (popping, whole):
        loop = Loop(with_defaults(), batches(STEPS), SOURCES["list"]())
        config = with_defaults(method="sigmoid", arch_order=2)
        given = SOURCES["list"]()
        loop.run = SelectionRun(loop.model, loop.optimizer, config, loss_fn, given, STEPS, scheduler=loop.scheduler)
        loop.train()
        assert all("labels" in batch for batch in given)
        runs.append((loop.run.selection, trained(loop.model)))
    assert runs[0][0] == runs[1][0]
    assert_same(runs[0][1], runs[1][1])


def test_held_out_batches_that_accelerate_prepares_are_not_those_of_the_training() -> None:
    """By the end of the loader that is trained on it knows when accumulated gradients are due."""
    rows = [{name: value[i] for name, value in batch.items()} for batch in batches(5) for i in range(4)]
    runs = []
    for prepared in (False, True):
        AcceleratorState._reset_state(True)
        GradientState._reset_state()
        accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
        loop = Loop(with_defaults(), batches(STEPS), [])
        held_out = DataLoader(rows[:12], batch_size=4)
        model, optimizer, loader = accelerator.prepare(loop.model, loop.optimizer, DataLoader(rows, batch_size=4))
        held_out = accelerator.prepare(held_out) if prepared else held_out
        run = SelectionRun(model, optimizer, with_defaults(), loss_of, held_out, 9)
        model.train()
        synced = []
        for _ in range(3):
            for batch in loader:
                with accelerator.accumulate(model):
                    run.before_step(batch)
                    accelerator.backward(loss_of(model, batch))
                    optimizer.step()
                    optimizer.zero_grad()
                    synced.append(accelerator.sync_gradients)
                    if accelerator.sync_gradients:
                        run.after_step()
        assert synced == [False, True, False, True, True] * 3
        runs.append((run.selection, trained(loop.model)))
    assert runs[0][0] is not None and runs[0][0] == runs[1][0]
    assert_same(runs[0][1], runs[1][1])


def test_a_model_left_in_evaluation_mode_is_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    for training in (True, False):
        caplog.clear()
        loop = Loop(with_defaults(), batches(STEPS), SOURCES["list"]())
        loop.model.train(training)
        loop.run.before_step()
        loss_of(loop.model, loop.batches[0]).backward()
        loop.optimizer.step()
        loop.run.after_step()
        assert ("call `model.train()`" in caplog.text) != training


def test_measuring_steps_leaves_the_statistics_of_batch_norms_alone() -> None:
    counts = []
    for limit in ({}, {"max_step_time": 0.9}):
        loop = Loop(with_defaults(**limit), batches(STEPS), SOURCES["list"]())
        norm = nn.BatchNorm1d(1)
        loop.model.get_base_model().dropout = nn.Sequential(loop.model.get_base_model().dropout, OfFirst(norm))
        loop.train(WARMUP + 1)  # the time of a step is measured at the end of the warm-up
        counts.append(int(norm.num_batches_tracked))
    assert counts == [WARMUP + 1] * 2


def test_several_processes_that_would_each_choose_for_themselves_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("diffora_trainer.search.runtime.world_size", lambda: 2)
    with pytest.raises(ValueError, match="2 processes run.*reduce="):
        Loop(with_defaults(), batches(STEPS), SOURCES["list"]())
