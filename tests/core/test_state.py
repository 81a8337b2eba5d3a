"""The state of a run, and what earlier versions wrote."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from diffora_trainer.core.allocation import Allocation
from diffora_trainer.core.costs import StepCost, StepCosts
from diffora_trainer.core.schedule import Schedule
from diffora_trainer.core.selection import Selection
from diffora_trainer.core.state import RunState, check_same
from helpers.adapted import format_1, make_selection


NAMES = ("a", "b", "c")
SEARCHING = RunState(
    5, {"method": "diffora"}, {"size": 3}, modules=NAMES, warmup=2, discretize=6, prune=8, held_out_position=3,
    held_out_rows=10, skipped_steps=1, losses=(0.5, 0.25), reached=(True, False, True), effect=(1.0, 0.5, 0.125),
    ranks=(2, 2, 1), halves=((0.5, 0.0, -1.0), (0.25, 0.0, 1.0)), half_steps=3,
    early_losses=(1.0, None), progress=(1.5, 1.0, 0.25), costs=StepCosts(time=StepCost(1.0, (0.5, 0.25), 0.1)),
    history=(Allocation(2, (1.0, 2.0, 3.0), (True, True, False)), Allocation(4, (1.0, 2.0, 4.0), (True, False, True))),
    processes=2, batch_rows=4, reallocate_every=2,
)  # fmt: skip
STATES = {
    "warm-up": RunState(1, {}, {}, modules=NAMES, warmup=2, discretize=6, prune=8, held_out_rows=10),
    "search": SEARCHING,
    "fade-out": replace(SEARCHING, step=6, kept=(True, False, True)),
    "selected": RunState(
        9, {"method": "snip"}, {"size": 3}, ("shortcuts",), selection=make_selection(), given_back=(4, 6)
    ),
}


@pytest.mark.parametrize("phase", STATES)
def test_a_state_survives_json(phase: str) -> None:
    state = STATES[phase]
    assert state.phase == phase
    record = state.to_dict()
    assert RunState.from_dict(json.loads(json.dumps(record, allow_nan=False))) == state
    assert record["phase"] == phase and record["format"] == 8
    if phase == "selected":
        assert "modules" not in record


@pytest.mark.parametrize("phase", STATES)
def test_each_missing_or_foreign_value_is_named(phase: str) -> None:
    record = json.loads(json.dumps(STATES[phase].to_dict()))
    for name in record:
        damaged = {key: value for key, value in record.items() if key != name}
        with pytest.raises(ValueError, match=name):
            RunState.from_dict(damaged)
        foreign: Any
        for foreign in ("x", -1, [None], {"no": "value"}, 1e300):
            if name in ("config", "base_model") and isinstance(foreign, dict):
                continue  # any object can be one
            with pytest.raises(ValueError):
                RunState.from_dict({**record, name: foreign})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"step": -1}, "its `step` is wrong: -1 should be 0 or more"),
        ({"warmup": True}, "its `warmup` is wrong: True should be a whole number"),
        ({"losses": [float("inf")]}, "its `losses` is wrong: inf should be a finite number"),
        ({"effect": [1.0]}, "its `effect` is wrong: it has 1 entries instead of 3 or 4"),
        ({"early_losses": [None]}, "its `early_losses` is wrong: it has no number"),
        ({"history": [{"step": 2, "scores": ["1"], "on": [True]}]}, "its `history` is wrong: '1' should be a finite"),
        ({"history": [{"step": 2, "scores": [1.0]}]}, "its `history` is wrong: there is no 'on'"),
        ({"costs": {"time": None}}, "its `costs` is wrong: it should have the entries `time` and `memory`"),
        ({"costs": {"time": {"depth": []}, "memory": None}}, "its `costs` is wrong: its `depth` has no entry"),
        ({"selection": "[]"}, "its `selection` is wrong: This is not a selection"),
    ],
)
def test_what_is_wrong_with_a_value_is_said(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RunState.from_dict({**SEARCHING.to_dict(), **change})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"step": 8}, "steps 2, 6, 8 disagree"),
        ({"warmup": 7}, "disagree"),
        ({"modules": (), "reached": (), "history": ()}, "among no `modules`"),
        ({"kept": (True, True, True)}, "at step 5 its `kept`"),
        ({"step": 6}, "at step 6 its `kept` cannot be None"),
        ({"step": 7, "kept": (True,)}, "`kept` has 1 entries for 3"),
        ({"reached": (True,)}, "`reached` has 1 entries for 3"),
        ({"ranks": (2, 2)}, "`ranks` has 2 entries for 3"),
        ({"halves": ((0.5,), (0.5, 0.5, 0.5))}, "`halves` has 1 entries for 3"),
        ({"halves": ((0.5, 0.5, 0.5),)}, "`halves` are two"),
        ({"history": (Allocation(2, (1.0,), (True,)),)}, "`history` is not one of 3 modules"),
        ({"history": (Allocation(6, (1.0, 2.0, 3.0), (True, True, True)),)}, "`history` cannot be one of"),
        ({"step": 1, "history": ()}, "in phase 'warm-up' its `costs`"),
    ],
)
def test_what_cannot_be_together(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(SEARCHING, **change)


@pytest.mark.parametrize("phase", STATES)
def test_states_of_formats_6_and_7_are_read(phase: str) -> None:
    """They did not say how many rows a batch has, when modules are chosen anew, nor what a pruned run held out."""
    expected = replace(STATES[phase], batch_rows=None, given_back=None, reallocate_every=None)
    old = {**STATES[phase].to_dict(), "format": 7}
    del old["given_back"]
    for name in ("batch_rows", "reallocate_every"):
        old.pop(name, None)
    assert RunState.from_dict(json.loads(json.dumps(old))) == expected
    old["format"] = 6  # which did not say how many processes the run had
    old.pop("processes", None)
    assert RunState.from_dict(json.loads(json.dumps(old))) == replace(expected, processes=None)


def test_states_of_format_4_are_read() -> None:
    """It kept times alone, read no share of the modules beside a cap, and `max_step_time` was another one."""
    capped = {**SEARCHING.config, "max_trainable_parameters": 99, "selection_ratio": 0.5, "max_step_time": None}
    old = {**SEARCHING.to_dict(), "format": 4, "config": capped, "times": None}
    for name in ("costs", "processes", "batch_rows", "reallocate_every"):
        del old[name]
    found = RunState.from_dict(json.loads(json.dumps(old)))
    unknown = replace(SEARCHING, costs=None, processes=None, batch_rows=None, reallocate_every=None)
    assert found == replace(unknown, config={**capped, "selection_ratio": None})
    with pytest.raises(ValueError, match="max_step_time"):
        RunState.from_dict({**old, "config": {**capped, "max_step_time": 0.7}})
    selected = STATES["selected"]
    assert RunState.from_dict({**selected.to_dict(), "format": 4}) == replace(selected, given_back=None)


def test_states_of_format_3_are_read() -> None:
    """It knew no ranks, no halves of a search, and no error of its effect."""
    old = {**SEARCHING.to_dict(), "format": 3, "effect": [1.0, 0.5]}
    for name in ("ranks", "halves", "half_steps", "early_losses", "progress", "costs"):
        del old[name]
    nothing = {"ranks": (), "halves": (), "half_steps": 0, "early_losses": (), "progress": None, "costs": None}
    expected = replace(
        SEARCHING, **nothing, effect=(1.0, 0.5, 0.0), processes=None, batch_rows=None, reallocate_every=None
    )
    assert RunState.from_dict(json.loads(json.dumps(old))) == expected
    selected = STATES["selected"]
    assert RunState.from_dict({**selected.to_dict(), "format": 3}) == replace(selected, given_back=None)


def test_states_of_format_2_are_read() -> None:
    """Other names, one other kind of site, and fields that were not kept yet."""
    state = STATES["fade-out"]
    record = state.to_dict()
    for new, old in (("discretize", "decision"), ("prune", "cut"), ("kept", "decided"), ("began_pruned", "began_cut")):
        record[old] = record.pop(new)
    for name in ("extra_kinds", "ranks", "halves", "half_steps", "early_losses", "progress", "costs"):
        del record[name]
    record["effect"] = record["effect"][:2]
    state = replace(state, ranks=(), halves=(), half_steps=0, early_losses=(), progress=None, effect=(1.0, 0.5, 0.0))
    state = replace(state, costs=None, processes=None, batch_rows=None, reallocate_every=None)
    old = {**record, "format": 2, "phase": "search"}  # it knew no phase of its own for the fade-out
    assert RunState.from_dict({**old, "shortcuts": True}) == replace(state, extra_kinds=("shortcuts",))
    assert RunState.from_dict({**old, "shortcuts": False}) == state
    for name in ("history", "reached", "effect"):
        del old[name]
    assert RunState.from_dict(old) == replace(state, history=(), reached=None, effect=None)
    with pytest.raises(ValueError, match="discretize"):
        RunState.from_dict({name: value for name, value in old.items() if name != "decision"})
    with pytest.raises(ValueError, match="`format` is not 8"):
        RunState.from_dict({**old, "format": 1})


def test_selections_of_format_1_are_read() -> None:
    new = make_selection(shared=())
    old = Selection.from_json(json.dumps(format_1(new)))
    for name in ("kept", "selected", "dropped", "modules", "rows", "columns", "positions", "parameters", "scores"):
        assert getattr(old, name) == getattr(new, name), name
    assert old.table() == new.table() and old.summary() == new.summary() and old.gains == new.scores
    assert Selection.from_json(old.to_json()) == old
    mixed = Selection.from_json(json.dumps(format_1(new, shortcuts=(new.modules[-1],))))
    assert mixed.of_kind("shortcuts") == tuple(name for name in new.selected if name == new.modules[-1])
    assert "shortcuts" in mixed.summary()
    with pytest.raises(ValueError, match="shortcut 'nobody' that is not one of its modules"):
        Selection.from_json(json.dumps(format_1(new, shortcuts=("nobody",))))


def test_what_differs_is_said() -> None:
    schedule = Schedule(12, 2, range(2, 6, 2), 6, 8)
    check_same("there", SEARCHING.check_schedule(schedule))
    architecture_steps = replace(SEARCHING, reallocate_every=None)  # of an older version there were more of them
    check_same("there", architecture_steps.check_schedule(Schedule(12, 2, range(3, 7), 6, 8)))
    later = Schedule(12, 3, range(4, 7), 6, 9)
    with pytest.raises(ValueError, match="'there' does not fit.*end of the warm-up.*saved: 2, now: 3.*Please"):
        check_same("there", SEARCHING.check_schedule(later))
    with pytest.raises(ValueError) as error:
        check_same("there", {"the modules": (["x"] * 1000, ["y"] * 1000)})
    assert len(str(error.value)) < 700
