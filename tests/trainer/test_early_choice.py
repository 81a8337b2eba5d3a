"""With `decide_early` the choice is made when there is evidence, `discretize_at` being the latest moment."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
from transformers import Trainer

from helpers.checks import adapter, assert_continues, step_logs
from helpers.marks import mostly_slow
from helpers.trainers import make_trainer


LATEST, STEPS = 30, 36
MANY = {"max_steps": STEPS, "save_strategy": "steps", "save_steps": 5, "save_total_limit": 99}


def make(folder: Path, args: dict[str, Any] | None = None, **search: Any) -> Trainer:
    search = {"discretize_at": LATEST, "fade_out": 4, "decide_early": True, **search}
    return make_trainer(folder, "sft", args={**MANY, **(args or {})}, search=search)


SEARCHES = [{}, {"fade_out": 0}, {"selection_granularity": "rank"}]


@pytest.mark.parametrize("options", mostly_slow(SEARCHES, {"selection_granularity": "rank"}), ids=str)
def test_the_choice_comes_early_and_a_resumed_run_makes_the_same_one(
    options: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "diffora_trainer"):
        whole = make(tmp_path / "whole", **options)
        whole.train()
    made = whole.selection.step
    fade = {"fade_out": 4, **options}["fade_out"]
    assert made < LATEST and f"so the choice is made now and not at step {LATEST - fade}" in caplog.text
    assert whole.selection.confidence >= 0.8
    # While gates fade out or before the decision, and after the pruning
    for step in ((made - 1) // 5 * 5, made // 5 * 5 + 5):
        resumed = make(tmp_path / "whole", **options)
        resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{step}"))
        assert_continues(resumed, whole, step)
        assert resumed.selection.step == made


def test_without_evidence_it_is_made_at_the_latest_moment(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    runs = []
    for early in (True, False):
        with caplog.at_level(logging.INFO, "diffora_trainer"):
            trainer = make(tmp_path / str(early), {"learning_rate": 1e-9}, decide_early=early)
            trainer.train()
        runs.append(trainer)
    assert "the choice is made now" not in caplog.text
    assert [trainer.selection.step for trainer in runs] == [LATEST, LATEST]
    assert step_logs(runs[0]).keys() == step_logs(runs[1]).keys()
    first, second = (adapter(trainer.model) for trainer in runs)
    assert first.keys() == second.keys() and all((first[name] == second[name]).all() for name in first)
