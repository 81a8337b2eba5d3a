"""A checkpoint that a callback saves at the end of a step by itself holds what the search does at that step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import TrainerCallback

from helpers.checks import adapter, assert_same, step_logs
from helpers.marks import mostly_slow
from helpers.resumed_runs import RUNS
from helpers.trainers import CUT, MOMENTS, SAVES, SaveAt, make_trainer, saving_trainer, task_rows


class Preempted(TrainerCallback):
    """Asks for a checkpoint in the middle of a step, as the signal of a cluster does with `enable_jit_checkpoint`."""

    def __init__(self, step: int) -> None:
        self.step, self.trainer = step, None

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step - 1:
            handlers = self.trainer.callback_handler.callbacks
            managers = [found for call in handlers if (found := getattr(call, "jit_manager", None)) is not None]
            managers[0].is_checkpoint_requested = True


@pytest.mark.parametrize("moment", ["warm-up", "search", "cut", "selected"])
def test_a_preempted_run_resumes_from_the_checkpoint_of_its_last_step(moment: str, tmp_path: Path) -> None:
    whole = saving_trainer(tmp_path / "whole", "cls")
    whole.train()
    args, preempted = {"enable_jit_checkpoint": True}, Preempted(MOMENTS[moment])
    stopped = saving_trainer(tmp_path / "stopped", "cls", args=args)
    stopped.remove_callback(SaveAt)
    preempted.trainer = stopped
    stopped.add_callback(preempted)
    stopped.train()
    assert stopped.state.global_step == MOMENTS[moment]
    resumed = saving_trainer(tmp_path / "stopped", "cls", args=args)
    resumed.train(resume_from_checkpoint=str(tmp_path / "stopped" / f"checkpoint-{MOMENTS[moment]}"))
    assert_same(adapter(resumed.model), adapter(whole.model))
    assert resumed.selection == whole.selection


class SavesByItself(TrainerCallback):
    """Saves a checkpoint at the end of some steps, before or after the search has done its part of them."""

    def __init__(self) -> None:
        self.trainer: Any = None

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step in (*SAVES, CUT - 1, CUT + 1):
            self.trainer._save_checkpoint(self.trainer.model, None)


@pytest.mark.parametrize(
    ("first", "name"),
    mostly_slow(
        (
            (first, name)
            for first in (True, False)
            for name in ("classifier", "closing", "components", "sft, accumulated")
        ),
        (True, "sft, accumulated"),
        (True, "components"),
        (False, "closing"),
    ),
)
def test_a_callback_saves_by_itself(first: bool, name: str, tmp_path: Path) -> None:
    task, accumulation, options = RUNS[name]
    args = {"gradient_accumulation_steps": accumulation, "per_device_train_batch_size": 4 // accumulation}
    options = {"train_dataset": task_rows(task, 24 // accumulation), "args": args, **options}
    saves = SavesByItself()
    whole = make_trainer(tmp_path, task, callbacks=[saves] if first else [], **dict(options))
    saves.trainer = whole
    if not first:
        whole.add_callback(saves)
    whole.train()
    plain = make_trainer(tmp_path / "plain", task, **dict(options))
    plain.train()
    assert_same(step_logs(whole), step_logs(plain))
    assert_same(adapter(whole.model), adapter(plain.model))
    for step in (*SAVES, CUT - 1, CUT + 1):
        resumed = make_trainer(tmp_path / "resumed", task, **dict(options))
        resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
        assert resumed.selection == plain.selection
        assert_same(adapter(resumed.model), adapter(plain.model))
        # The first log of the resumed run makes up for the one of the step of the checkpoint, which came after it.
        found, expected = (step_logs(trainer, ("num_tokens", "diffora/arch_loss")) for trainer in (resumed, plain))
        assert_same(
            {at: log for at, log in found.items() if at > step}, {at: expected[at] for at in range(step + 1, 13)}
        )
