"""Runs under a budget of time."""

from __future__ import annotations

import json

import pytest
from transformers import DataCollatorForLanguageModeling

from diffora_trainer import Selection
from helpers.checks import step_logs
from helpers.data import tiny_tokenizer, token_rows
from helpers.trainers import CUT, WARMUP, Probe, deep_model, make_trainer


TIMED = {"max_step_time": 0.7, "selection_ratio": 1 / 3}
# What any choice keeps, for tests by the real clock: on models as small as these a limit may be out of reach by noise.
LAX = {**TIMED, "max_step_time": 1.0}


# By the clock below a step takes 7 + 0.42 with all 42 modules, and 1 less for each layer above the lowest one.
@pytest.mark.parametrize(("limit", "lowest"), [(0.7, 2), (0.45, 4)])  # layers 4 and 5 have just room for a third
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
    assert len(selection.selected) <= count
    assert min(grid_rows[name] for name in selection.selected) >= lowest
    assert selection.lowest_row in [f"model.layers.{row}" for row in range(lowest, 6)]
    assert not any(probe.found[WARMUP])
    assert set(selection.times) == {"all_modules", "predicted", "before_pruning", "after_pruning"}
    assert selection.times["predicted"] <= limit * selection.times["all_modules"]
    assert selection.times["after_pruning"] == pytest.approx(selection.times["predicted"], rel=0.1)
    assert Selection.from_json(selection.to_json()) == selection

    plain = make_trainer(
        tmp_path, "sft", model=deep_model, search={**TIMED, "max_step_time": None, "selection_scope": "model"}
    )
    plain.train()
    losses, timed_losses = ({s: log["loss"] for s, log in step_logs(t).items() if s <= CUT} for t in (plain, trainer))
    assert timed_losses == losses  # timing left weights and random streams alone
    assert min(grid_rows[name] for name in plain.selection.selected) < lowest  # and is what moved the choice


def test_alone_a_time_budget_keeps_as_much_as_it_has_room_for(tmp_path, monkeypatch) -> None:
    trainer = make_trainer(tmp_path, "sft", model=deep_model, search={"max_step_time": 0.7})
    monkeypatch.setattr("diffora_trainer.search.timing.timed", lambda step, device: _made_up(trainer, step))
    trainer.train()
    # 0.7 of 7.42 has room for all 21 modules of the upper three layers, or for 19 of the upper four.
    room = {"model.layers.2": 19, "model.layers.3": 21}
    assert len(trainer.selection.selected) == room[trainer.selection.lowest_row]
    assert trainer.selection.times["predicted"] <= 0.7 * trainer.selection.times["all_modules"]


def test_a_limit_that_no_choice_can_keep_is_refused(tmp_path, monkeypatch) -> None:
    trainer = make_trainer(tmp_path, "sft", model=deep_model, search={"max_step_time": 0.1})
    monkeypatch.setattr("diffora_trainer.search.timing.timed", lambda step, device: _made_up(trainer, step))
    with pytest.raises(ValueError, match=r"`max_step_time=0\.1`, and a step with one module takes 0\.27 of.*raise"):
        trainer.train()


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_run_under_a_memory_budget(tmp_path, checkpointing: bool) -> None:
    arguments = {"gradient_checkpointing": checkpointing}
    trainer = make_trainer(
        tmp_path,
        model=deep_model,
        search={"max_step_memory": 0.6},
        args=arguments,
        train_dataset=token_rows(),
        data_collator=DataCollatorForLanguageModeling(tiny_tokenizer(), mlm=False),
    )
    trainer.train()
    memory = trainer.selection.memory
    assert memory["predicted"] <= 0.6 * memory["all_modules"]
    # Counted anew, in the pruned model. With checkpointing the peak is no straight line in the count of modules.
    assert memory["after_pruning"] == pytest.approx(memory["predicted"], rel=0.15 if checkpointing else 0.1)
    assert checkpointing or trainer.selection.lowest_row != "model.layers.0"
    assert Selection.from_json(trainer.selection.to_json()) == trainer.selection


def test_a_limit_is_that_of_a_training_batch(tmp_path) -> None:
    """However large the held-out batches are, and also where fewer rows are held out than such a batch has."""
    found = []
    for search in ({}, {"arch_batch_size": 1}, {"arch_split": 0.1}):
        rows = [{"input_ids": [5, 6, 7, 8, 9, 10]}] * 24
        trainer = make_trainer(
            tmp_path,
            model=deep_model,
            search={"max_step_memory": 0.6, **search},
            train_dataset=rows,
            data_collator=DataCollatorForLanguageModeling(tiny_tokenizer(), mlm=False),
        )
        trainer.train()
        found.append(trainer.selection.memory)
    assert len({memory["all_modules"] for memory in found}) == 1
    for memory in found:
        assert memory["after_pruning"] < 0.65 * memory["all_modules"]


def test_a_step_above_its_limit_is_warned_of(tmp_path, caplog) -> None:
    """The prediction says the same of every module, and which ones are kept decides how far off it is."""
    for limit, over in ((0.5, False), (0.7, True)):
        caplog.clear()
        trainer = make_trainer(tmp_path / str(limit), search={"max_step_memory": limit, "method": "random"})
        trainer.train()
        memory = trainer.selection.memory
        assert memory["predicted"] <= limit * memory["all_modules"]
        assert (memory["after_pruning"] > 1.02 * limit * memory["all_modules"]) == over
        warned = [record for record in caplog.records if f"above `max_step_memory={limit:g}`" in record.message]
        assert [record.levelname for record in warned] == ["WARNING"] * over


def test_a_step_that_takes_longer_than_its_limit_is_warned_of(tmp_path, monkeypatch, caplog) -> None:
    """As with two towers side by side, of which the prediction takes the deeper one."""
    slower = 1.0

    def timed(step, device) -> float:
        pruned = trainer.state.global_step >= CUT
        return _made_up(trainer, step) * (slower if pruned else 1.0)

    monkeypatch.setattr("diffora_trainer.search.timing.timed", timed)
    for slower in (1.0, 1.5):
        caplog.clear()
        trainer = make_trainer(tmp_path, "sft", model=deep_model, search=TIMED)
        trainer.train()
        assert ("of the time of one with all modules, above `max_step_time=0.7`" in caplog.text) == (slower > 1)


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
    whole = make_trainer(tmp_path, "sft", model=deep_model, search=LAX, args=arguments)
    whole.train()
    resumed = make_trainer(tmp_path, "sft", model=deep_model, search=LAX, args=arguments)
    resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{CUT - 2}"))
    assert resumed.selection.selected == whole.selection.selected
    for name in ("all_modules", "predicted"):
        assert resumed.selection.times[name] == whole.selection.times[name]


def test_times_of_an_earlier_meaning_are_not_resumed(tmp_path) -> None:
    arguments = {"save_strategy": "steps", "save_steps": CUT - 2}
    make_trainer(tmp_path, "sft", model=deep_model, search=LAX, args=arguments).train()
    folder = tmp_path / f"checkpoint-{CUT - 2}"
    path = folder / "diffora_state.json"
    state = json.loads(path.read_text())
    assert state["format"] == 8
    path.write_text(json.dumps({**state, "format": 4, "times": state["costs"]["time"]}))
    resumed = make_trainer(tmp_path, "sft", model=deep_model, search=LAX, args=arguments)
    with pytest.raises(ValueError, match="max_step_time.*start it anew"):
        resumed.train(resume_from_checkpoint=str(folder))
