"""The progress bar of a Trainer: the phase of the run, and the time that is left."""

from __future__ import annotations

import io
import re
from pathlib import Path
from typing import Any

import pytest
from tqdm import tqdm
from transformers import ProgressCallback, TrainerCallback

from diffora_trainer.trainer.progress import SearchProgressCallback
from helpers.trainers import make_trainer


STEPS, WARMUP, DISCRETIZE, PRUNE, EVERY = 60, 6, 18, 24, 3
LOOKS = range(WARMUP + 1, DISCRETIZE + 1, EVERY)
SEARCH = {"arch_warmup": WARMUP, "discretize_at": PRUNE, "fade_out": PRUNE - DISCRETIZE, "arch_every": EVERY}
FIRST, PLAIN, LOOK, MEASURED, SELECTED = 60.0, 10.0, 30.0, 200.0, 5.0


def cost(step: int) -> float:
    """Seconds of a step, by a clock that no machine can disturb."""
    if step == 1:
        return FIRST
    if step in (DISCRETIZE, PRUNE):
        return MEASURED
    return SELECTED if step > PRUNE else LOOK if step in LOOKS else PLAIN


def seconds(text: str) -> int:
    total = 0
    for part in text.split(":"):
        total = 60 * total + int(part)
    return total


class Bars(TrainerCallback):
    """What the bar says after each step, and what is drawn of it."""

    def __init__(self, trainer: Any) -> None:
        (self.progress,) = [c for c in trainer.callback_handler.callbacks if isinstance(c, ProgressCallback)]
        self.phases: dict[int, str] = {}
        self.notes: dict[int, str] = {}
        self.left: dict[int, int] = {}
        self.formats: list[str | None] = []

    def on_step_end(self, args, state, control, **kwargs) -> None:
        bar = self.progress.training_bar
        self.formats.append(bar.bar_format)
        # The next drawing is that of the next step.
        text = tqdm.format_meter(**{**bar.format_dict, "n": state.global_step + 1, "ncols": None})
        self.phases[state.global_step] = text.split(":")[0]
        self.notes[state.global_step] = bar.postfix or ""
        if found := re.search(r"<([\d:]+),", text):
            self.left[state.global_step + 1] = seconds(found[1])


def trained(folder: Path, **kwargs: Any) -> tuple[Any, Bars]:
    args = {"max_steps": STEPS, "disable_tqdm": False, **kwargs.pop("args", {})}
    trainer = make_trainer(folder, args=args, search={**SEARCH, **kwargs.pop("search", {})}, **kwargs)
    (shown,) = [c for c in trainer.callback_handler.callbacks if isinstance(c, SearchProgressCallback)]
    shown._clock = lambda: sum(cost(step) for step in range(1, trainer.state.global_step + 1))
    bars = Bars(trainer)
    trainer.add_callback(bars)
    trainer.train()
    return trainer, bars


def test_the_phase_and_the_time_that_is_left(tmp_path: Path) -> None:
    _, bars = trained(tmp_path)
    names = {0: "warm-up", WARMUP: "search", DISCRETIZE: "fade-out", PRUNE: "selected"}
    for step, phase in bars.phases.items():
        assert phase == names[max(begin for begin in names if begin <= step)], step
    assert "arch loss" in bars.notes[WARMUP + 1] and "entropy" in bars.notes[1] and not bars.notes[PRUNE]

    def expected(step: int, look: float, selected: float) -> float:
        after = range(step + 1, STEPS + 1)
        kinds = [selected if s > PRUNE else look if s in LOOKS else PLAIN for s in after]
        return sum(kinds)

    for step, left in bars.left.items():
        if step < 3:  # nothing is known but the first step, which tells nothing
            continue
        look = LOOK if step - 1 >= LOOKS[0] else 2 * PLAIN  # until one was seen
        selected = SELECTED if step - 1 > PRUNE else PLAIN
        assert left == pytest.approx(expected(step, look, selected), abs=1), step
    assert bars.left[STEPS] == 0
    # Where the search is dearest, the rate of the latest steps would say half as much again or more.
    step = LOOKS[-1]
    misled = (STEPS - step) * (LOOK + (EVERY - 1) * PLAIN) / EVERY
    assert misled > 1.5 * bars.left[step]


def test_a_search_that_looks_after_each_step(tmp_path: Path) -> None:
    """With a warm-up of one step, which tells nothing, a step of the search is all there is to go by."""
    search = {"arch_warmup": 1, "discretize_at": 13, "fade_out": 3, "arch_every": 1}
    trainer = make_trainer(tmp_path, args={"max_steps": STEPS, "disable_tqdm": False}, search=search)
    (shown,) = [c for c in trainer.callback_handler.callbacks if isinstance(c, SearchProgressCallback)]
    shown._clock = lambda: LOOK * trainer.state.global_step
    bars = Bars(trainer)
    trainer.add_callback(bars)
    trainer.train()
    assert bars.left[5] == 5 * LOOK + 50 * LOOK / 2


def test_a_run_that_is_decided_early_and_one_with_the_chosen_modules(tmp_path: Path) -> None:
    """After the pruning, whenever it was, a step is what one with the selected modules takes."""

    class Clock(TrainerCallback):
        now = 0.0

        def on_step_begin(self, args, state, control, **kwargs) -> None:
            self.now += PLAIN if trainer.selection is None else SELECTED

    clock, search = Clock(), {"discretize_at": 30, "fade_out": 0, "decide_early": True}
    args = {"max_steps": 36, "disable_tqdm": False}
    trainer = make_trainer(tmp_path, "sft", args=args, search=search, callbacks=[clock])
    (shown,) = [c for c in trainer.callback_handler.callbacks if isinstance(c, SearchProgressCallback)]
    shown._clock = lambda: clock.now
    bars = Bars(trainer)
    trainer.add_callback(bars)
    trainer.train()
    made = trainer.selection.step
    assert made < 28 and bars.phases[made - 1] == "search" and bars.phases[made] == "selected"
    for step in range(made + 2, 37):
        assert bars.left[step] == (36 - step) * SELECTED, step

    bars.phases.clear()
    bars.left.clear()
    trainer.train()
    assert set(bars.phases.values()) == {"selected"}
    assert {step: bars.left[step] for step in range(3, 37)} == {step: (36 - step) * SELECTED for step in range(3, 37)}


def test_a_bar_of_somebody_else_is_left_alone(tmp_path: Path) -> None:
    class Own(ProgressCallback):
        def on_train_begin(self, args, state, control, **kwargs) -> None:
            self.training_bar = tqdm(total=state.max_steps, bar_format="{n_fmt} of {total_fmt}", file=io.StringIO())
            self.current_step = 0

    trainer = make_trainer(tmp_path, args={"disable_tqdm": False}, search={})
    trainer.remove_callback(ProgressCallback)
    handler = trainer.callback_handler
    handler.callbacks.insert(0, Own())
    bars = Bars(trainer)
    trainer.add_callback(bars)
    trainer.train()
    assert set(bars.formats) == {"{n_fmt} of {total_fmt}"}


def test_without_a_bar_and_in_a_notebook(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, args={"disable_tqdm": True})
    trainer.train()
    assert trainer.selection is not None
    notebook = pytest.importorskip("transformers.utils.notebook")
    trainer = make_trainer(tmp_path, args={"disable_tqdm": False})
    trainer.remove_callback(ProgressCallback)
    trainer.callback_handler.callbacks.insert(0, notebook.NotebookProgressCallback())
    trainer.train()
    assert trainer.selection is not None
