"""Runs under a budget of time."""

from __future__ import annotations

import pytest

from diffora_trainer import Selection
from helpers.checks import step_logs
from helpers.trainers import CUT, WARMUP, Probe, deep_model, make_trainer


TIMED = {"max_step_time": 0.7, "selection_scope": "model", "selection_ratio": 1 / 3}


@pytest.mark.parametrize(("limit", "lowest"), [(0.75, 2), (0.4, 4)])  # layers 4 and 5 have just room for a third
def test_a_run_under_a_time_budget(tmp_path, monkeypatch, limit: float, lowest: int) -> None:
    trainer = make_trainer(tmp_path, "sft", model=deep_model, search={**TIMED, "max_step_time": limit})
    # Real steps are made and timed; what decides is a clock that this machine's noise cannot reach.
    monkeypatch.setattr("diffora_trainer.search.timing.timed", lambda step, device: _made_up(trainer, step))
    probe = Probe(lambda model, **kw: [p.grad is not None for p in model.parameters()], WARMUP)
    trainer.add_callback(probe)
    trainer.train()
    selection = trainer.selection
    grid_rows = {name: row for name, (row, _) in zip(selection.modules, selection.positions, strict=True)}
    count = round(len(selection.modules) / 3)
    assert len(selection.selected) == count
    assert min(grid_rows[name] for name in selection.selected) >= lowest
    assert selection.lowest_row in [f"model.layers.{row}" for row in range(lowest, 6)]
    assert not any(probe.found[WARMUP])
    assert selection.times["spread_over_all_layers"] / selection.times["predicted"] > 1.2
    assert set(selection.times) >= {"all_modules", "predicted", "before_cut", "after_cut"}
    assert Selection.from_json(selection.to_json()) == selection

    plain = make_trainer(tmp_path, "sft", model=deep_model, search={**TIMED, "max_step_time": None})
    plain.train()
    losses, timed_losses = ({s: log["loss"] for s, log in step_logs(t).items() if s <= CUT} for t in (plain, trainer))
    assert timed_losses == losses  # timing left weights and random streams alone
    assert min(grid_rows[name] for name in plain.selection.selected) < lowest  # and is what moved the choice


def _made_up(trainer, step) -> float:
    step()
    live = [
        int(name.split(".layers.")[1].split(".")[0])
        for name, parameter in trainer.model.named_parameters()
        if "lora_A" in name and parameter.requires_grad
    ]
    return 1.0 + (6 - min(live)) + 0.01 * len(live)


def test_a_resumed_search_stays_within_the_times_that_were_measured(tmp_path) -> None:
    arguments = {"save_strategy": "steps", "save_steps": CUT - 2}
    whole = make_trainer(tmp_path, "sft", model=deep_model, search=TIMED, args=arguments)
    whole.train()
    resumed = make_trainer(tmp_path, "sft", model=deep_model, search=TIMED, args=arguments)
    resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{CUT - 2}"))
    assert resumed.selection.selected == whole.selection.selected
    for name in ("all_modules", "predicted"):
        assert resumed.selection.times[name] == whole.selection.times[name]
