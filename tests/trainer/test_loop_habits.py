"""What a loop of one's own may do to a `SelectionRun` without harm, and what it is told of."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from torch import Tensor, nn
from torch.utils.data import DataLoader

from diffora_trainer import SelectionRun
from diffora_trainer.search.runtime import Runtime
from helpers.checks import assert_same
from helpers.loops import SOURCES, STEPS, Loop, batches, loss_of, trained, with_defaults
from helpers.trainers import CUT, WARMUP, make_trainer


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


def test_the_prefix_cache_which_only_trainers_have_is_warned_of(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    essential = "prefix_cache='memory'` to a loop of your own"
    for kind in ("none", "memory"):
        caplog.clear()
        Loop(with_defaults(prefix_cache=kind), batches(STEPS), SOURCES["list"]()).train()
        assert caplog.text.count(essential) == (kind == "memory")
    caplog.clear()
    make_trainer(tmp_path, search={"prefix_cache": "memory"}).train()
    assert "Prefix cache" in caplog.text or "prefix cache" in caplog.text
    assert essential not in caplog.text


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


@pytest.mark.parametrize("source", [list, lambda found: DataLoader(found, batch_size=None)])
def test_each_process_has_as_many_held_out_batches(source: Any) -> None:
    """Losses are averaged batch by batch. Of more than are compared the numbers may differ."""
    for counts, fits in (((8, 7), False), ((7, 8), False), ((7, 7), True), ((9, 8), True)):
        sent: list[Tensor] = []  # by the first of two processes

        def mean(values: Tensor, sent: list[Tensor] = sent) -> Tensor:
            return (values + sent.pop()) / 2

        first = Runtime(reduce=lambda values, sent=sent: sent.append(values) or values)
        start(source(batches(counts[0])), first)
        with nullcontext() if fits else pytest.raises(ValueError, match="held-out rows or batches.*each as many"):
            start(source(batches(counts[1])), Runtime(reduce=mean))


def start(held_out: Any, runtime: Runtime) -> None:
    loop = Loop(with_defaults(), batches(STEPS), SOURCES["list"]())
    SelectionRun(loop.model, loop.optimizer, with_defaults(), loss_of, held_out, STEPS, runtime=runtime)


def test_early_losses_of_other_processes_are_not_compared_with(monkeypatch: pytest.MonkeyPatch) -> None:
    """Their batches hold other rows. Of a checkpoint from before their number was kept they are taken."""
    config = with_defaults(selection_granularity="rank")
    loop = Loop(config, batches(STEPS), SOURCES["list"]())
    loop.train(CUT - 1)
    checkpoint = loop.checkpoint()
    early = checkpoint["run"]["run"]["early_losses"]
    assert len(early) == 5 and checkpoint["run"]["run"]["processes"] == 1
    old = copy.deepcopy(checkpoint)
    old["run"]["run"].update(format=6)
    del old["run"]["run"]["processes"]
    for state, processes, kept in ((checkpoint, 1, True), (checkpoint, 2, False), (old, 2, True)):
        monkeypatch.setattr("diffora_trainer.search.run_state.world_size", lambda number=processes: number)
        resumed = Loop(config, batches(STEPS), SOURCES["list"]())
        resumed.resume(copy.deepcopy(state))
        assert list(resumed.run.state_dict()["run"]["early_losses"]) == (list(early) if kept else [])
        resumed.train()
        assert (resumed.run.search.progress is not None) == kept


class Failing:
    """A loss function that fails when it is told to, as one that runs out of memory on a long held-out batch."""

    def __init__(self) -> None:
        self.fails = False

    def __call__(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        if self.fails:
            raise RuntimeError("no memory")
        return loss_of(model, batch)


def failing_loop(**options: Any) -> tuple[Loop, Failing]:
    loop, loss_fn = Loop(with_defaults(**options), batches(STEPS), []), Failing()
    held_out = SOURCES["list"]()
    config = with_defaults(**options)
    loop.run = SelectionRun(loop.model, loop.optimizer, config, loss_fn, held_out, STEPS, scheduler=loop.scheduler)
    return loop, loss_fn


def fail_after(loop: Loop, loss_fn: Failing, step: int) -> None:
    """Train, and let what is due after a step fail."""
    loop.train(step - 1)
    loss_fn.fails = True
    with pytest.raises(RuntimeError, match="no memory"):
        loop.train(step)
    loss_fn.fails = False
    with pytest.raises(ValueError, match=f"due after step {step} .*`after_step` again"):
        loop.run.state_dict()


@pytest.mark.parametrize(("method", "step"), [("diffora", WARMUP + 1), ("diffora", CUT), ("snip", CUT)])
def test_an_error_that_is_caught_leaves_nothing_out(method: str, step: int, caplog: pytest.LogCaptureFixture) -> None:
    """
    Called again it does what was left, on the next held-out batch, since one may be too long; after another step that
    is done late, and said.
    """
    loops = []
    for case in ("whole", "again", "late"):
        loop, loss_fn = failing_loop(method=method)
        if case != "whole":
            fail_after(loop, loss_fn, step)
        if case == "again":
            assert loop.run.after_step() == (step == CUT)
            assert loop.run.step == step
        caplog.clear()
        loop.train()
        assert ("an earlier error interrupted" in caplog.text) == (case == "late")
        loops.append(loop)
    whole, again, late = loops
    assert [loop.run.search.method.steps for loop in loops] == [whole.run.search.method.steps] * 3
    assert whole.run.selection.step == again.run.selection.step == CUT
    assert late.run.selection.step == (CUT + 1 if step == CUT else CUT)
    for loop in loops:
        assert not loop.run.gates_active and loop.run.step == STEPS


def test_a_pruning_that_was_interrupted_is_not_repeated() -> None:
    loop, failed = Loop(with_defaults(), batches(STEPS), SOURCES["list"]()), []

    def after_prune() -> None:
        failed.append(1)
        raise RuntimeError("no process group")

    runtime = Runtime(after_prune=after_prune)
    loop.run = SelectionRun(
        loop.model, loop.optimizer, with_defaults(), loss_of, SOURCES["list"](), STEPS, runtime=runtime
    )
    with pytest.raises(RuntimeError, match="no process group"):
        loop.train()
    for _ in range(2):
        with pytest.raises(ValueError, match="interrupted the pruning.*from a checkpoint"):
            loop.run.after_step()
    assert failed == [1]
