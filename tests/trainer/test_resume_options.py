"""A run that is resumed with other options: which of them are refused, by name, and which are not compared."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Trainer

from diffora_trainer import register_method
from diffora_trainer.methods.base import ScoreMethod
from diffora_trainer.methods.options import ScoreOptions
from diffora_trainer.methods.registry import unregister_method
from helpers.checks import adapter, assert_same, step_logs
from helpers.data import classification_dataset
from helpers.depth import trainer_of
from helpers.marks import mostly_slow
from helpers.trainers import CUT, MOMENTS, Probe, deep_model, lora, out_of_memory, running, saving_trainer


SEARCH = MOMENTS["search"]
LORA = {"target_modules": ["query", "key", "value"]}


def make(folder: Path, search: dict[str, Any], **kwargs: Any) -> Trainer:
    return saving_trainer(folder, "cls", peft_config=lora(**LORA), search=search, **kwargs)


def message(trainer: Trainer, checkpoint: Path) -> str:
    with pytest.raises(ValueError) as error:
        trainer.train(resume_from_checkpoint=str(checkpoint))
    return str(error.value)


def test_each_option_that_differs_is_named_with_both_values(tmp_path: Path) -> None:
    groups = {"selection_unit": "group", "selection_groups": {"both": ("query", "key"), "one": ["value"]}}
    stopped = make(tmp_path, groups, args={"max_steps": CUT})
    stopped.train()
    checkpoint = tmp_path / f"checkpoint-{SEARCH}"
    other = {"both": ["query", "value"], "other": ["key"]}
    changed = {"selection_groups": other, "arch_split": 0.2, "arch_every": 3, "arch_seed": 4}
    found = message(make(tmp_path / "again", {**groups, **changed}), checkpoint)
    named = {
        "arch_seed": ("0", "4"),
        "arch_split": ("0.1", "0.2"),
        "method_options['arch_every']": ("1", "3"),
        "selection_groups['both']": ("['query', 'key']", "['query', 'value']"),
        "selection_groups['one']": ("['value']", "nothing"),
        "selection_groups['other']": ("nothing", "['key']"),
    }
    for name, (saved, present) in named.items():
        assert f"`{name}` saved: {saved}, now: {present}" in found
    assert re.findall("`([^`]+)` saved", found) == list(named)
    assert re.search("Please pass the saved values .* or begin a new run", found)
    # What a checkpoint holds is JSON, which knows no tuples.
    make(tmp_path / "same", groups, args={"max_steps": CUT}).train(resume_from_checkpoint=str(checkpoint))


@dataclass(frozen=True)
class NotedOptions(ScoreOptions):
    """Options of a method of a user's own."""

    notes: tuple[str, ...] = ()


def test_a_long_value_is_shown_where_it_differs(tmp_path: Path) -> None:
    @register_method("noted")
    class Noted(ScoreMethod):
        """Scores that are all different."""

        Options = NotedOptions

        def score(self, context: Any) -> torch.Tensor:
            return torch.arange(len(context.sites)).float()

    notes = tuple(f"note{number}" for number in range(100))
    try:
        make(tmp_path, {"method": "noted", "method_options": {"notes": notes}}).train()
        changed = {"method": "noted", "method_options": {"notes": (*notes[:-1], "another")}}
        shown = message(make(tmp_path / "again", changed), tmp_path / f"checkpoint-{SEARCH}")
    finally:
        unregister_method("noted")
    assert "'note99']" in shown and "'another']" in shown and "note10'" not in shown and len(shown) < 700


def test_the_options_of_another_method_are_not_told_one_by_one(tmp_path: Path) -> None:
    make(tmp_path, {}).train()
    found = message(make(tmp_path / "again", {"method": "snip"}), tmp_path / f"checkpoint-{SEARCH}")
    assert re.findall("`([^`]+)` saved", found) == ["method"]


@pytest.mark.parametrize(
    ("share", "moved"),
    [
        ({"discretize_at": 0.75, "arch_warmup": 0.25}, "the end of the warm-up differ(s) (saved: 3, now: 4)"),
        (
            {"method": "snip", "method_options": {"reallocate_every": 0.25}},
            "the steps between two choices (`reallocate_every`) differ(s) (saved: 3, now: 4)",
        ),
    ],
)
def test_a_schedule_that_other_steps_move_is_refused(share: dict[str, Any], moved: str, tmp_path: Path) -> None:
    make(tmp_path, share).train()
    found = message(make(tmp_path / "again", share, args={"max_steps": 16}), tmp_path / f"checkpoint-{SEARCH}")
    assert moved in found and "fractions depend on `max_steps`" in found


@pytest.mark.parametrize(
    ("changed", "kept"),
    [
        ({}, True),
        ({"args": {"per_device_train_batch_size": 2}}, False),
        ({"args": {"per_device_train_batch_size": 2}, "search": {"arch_batch_size": 4}}, True),
        ({"args": {"auto_find_batch_size": True}, "memory ends": (6,)}, False),
    ],
)
def test_losses_of_other_held_out_rows_are_not_compared_with(
    changed: dict[str, Any], kept: bool, tmp_path: Path
) -> None:
    """Where `arch_batch_size` is not set, a held-out batch has as many rows as a training batch."""
    options = {"selection_granularity": "rank", **changed.get("search", {})}
    rows = classification_dataset(100)
    make(tmp_path, options, train_dataset=rows).train()
    checkpoint = tmp_path / f"checkpoint-{SEARCH}"
    saved = json.loads((checkpoint / "diffora_state.json").read_text())["early_losses"]
    resumed = make(tmp_path / "again", options, train_dataset=rows, args=changed.get("args", {}))
    out_of_memory(resumed, *changed.get("memory ends", ()))
    resumed.add_callback(Probe(lambda **kwargs: running(resumed).state().early_losses, SEARCH + 1))
    probe = resumed.callback_handler.callbacks[-1]
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert len(saved) == 2 and list(probe.found[SEARCH + 1]) == (saved if kept else [])


def test_options_that_touch_no_search_may_change(tmp_path: Path) -> None:
    whole = make(tmp_path, {"base_model_id": "org/one"})
    whole.train()
    changed = {"log_gates_by_kind": True, "base_model_id": "org/two", "prefix_cache_gib": 1.0}
    resumed = make(tmp_path / "again", changed)
    resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{SEARCH}"))
    assert (resumed.selection.fate, resumed.selection.scores) == (whole.selection.fate, whole.selection.scores)
    assert_same(adapter(resumed.model), adapter(whole.model))
    logs = step_logs(resumed)[SEARCH + 1]
    assert {f"diffora/gate/{kind}" for kind in LORA["target_modules"]} <= set(logs)


@pytest.mark.parametrize("at", [SEARCH, CUT])
@pytest.mark.parametrize(
    ("saved", "present"), mostly_slow([("none", "memory"), ("memory", "none"), ("none", "disk")], ("none", "memory"))
)
def test_a_prefix_cache_may_come_and_go(at: int, saved: str, present: str, tmp_path: Path, caplog: Any) -> None:
    def run(folder: Path, where: str) -> Trainer:
        args = {"max_steps": CUT + 10, "save_strategy": "steps", "save_steps": at}
        return trainer_of(folder, "sft", deep_model(), args, search={"prefix_cache": where})

    whole = run(tmp_path, saved)
    whole.train()
    caplog.clear()
    resumed = run(tmp_path / "again", present)
    with caplog.at_level("INFO", "diffora_trainer"):
        resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{at}"))
    assert (resumed.selection.fate, resumed.selection.scores) == (whole.selection.fate, whole.selection.scores)
    assert ("of the rows were found" in caplog.text) == (present != "none")
    losses = [[log["loss"] for step, log in step_logs(trainer).items() if step > at] for trainer in (whole, resumed)]
    assert len(losses[0]) == CUT + 10 - at
    assert losses[1] == pytest.approx(losses[0], rel=2e-4)
