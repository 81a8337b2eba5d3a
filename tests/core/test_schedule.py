"""When things happen in a run."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from diffora_trainer.core.schedule import Event, Moments, Schedule


W, U, D, P = Event.END_WARMUP, Event.UPDATE, Event.DISCRETIZE, Event.PRUNE


def happenings(schedule: Schedule) -> dict[int, list[Event]]:
    found = {step: schedule.events(step) for step in range(schedule.total_steps + 1)}
    return {step: events for step, events in found.items() if events}


def test_defaults_of_300_steps() -> None:
    """As the documentation has it."""
    schedule = Moments(0.25, 0.05, fade_out=0.05, every=4.0).resolve(300)
    assert (schedule.warmup, schedule.discretize, schedule.prune, schedule.fades) == (15, 60, 75, True)
    found = happenings(schedule)
    assert found.pop(15) == [W] and found.pop(60) == [U, D] and found.pop(75) == [P]
    assert found == {step: [U] for step in range(16, 60, 4)}
    assert schedule.fade_progress(59) is None and schedule.fade_progress(75) is None
    faded = [schedule.fade_progress(step) for step in range(60, 75)]
    assert faded == pytest.approx([(index + 1) / 15 for index in range(15)]) and faded[-1] == 1.0


@pytest.mark.parametrize(
    ("moments", "total", "expected"),
    [
        (Moments(8, 3, every=1.0), 12, {3: [W], 4: [U], 5: [U], 6: [U], 7: [U], 8: [U, P]}),
        (Moments(8, 3, fade_out=2, every=2.0), 12, {3: [W], 4: [U], 6: [U, D], 8: [P]}),
        (Moments(8, 3), 12, {8: [W, U, P]}),  # scored once, right before the pruning
        (Moments(0, 0), 12, {0: [W, U, P]}),  # before the first step
        (Moments(8, 3, every=2.0, decides=False), 12, {3: [W, U], 5: [U], 7: [U], 8: [P]}),  # chosen anew
        (Moments(0.25, 0.05, fade_out=0.05, every=4.0), 3, {1: [W], 2: [U, P]}),  # a first try with three steps
        (Moments(0.999, 0.05, every=4.0), 12, {1: [W], 2: [U], 6: [U], 10: [U], 12: [P]}),
    ],
)
def test_events(moments: Moments, total: int, expected: dict[int, list[Event]]) -> None:
    assert happenings(moments.resolve(total)) == expected


@pytest.mark.parametrize("total", [3, 300, 852, 1000, 100_000])
def test_a_long_search_looks_at_most_so_often(total: int) -> None:
    """A short one looks as often as it would anyway, a long one as often as it may, to its end."""
    limited = Moments(0.25, 0.05, fade_out=0.05, every=4.0, most_updates=32).resolve(total)
    free = Moments(0.25, 0.05, fade_out=0.05, every=4.0).resolve(total)
    assert 1 <= len(limited.updates) <= 32
    if len(free.updates) <= 32:
        assert limited == free
    else:
        assert len(limited.updates) > 24 and limited.updates[-1] + limited.updates.step > limited.discretize
    assert dataclasses.replace(limited, updates=free.updates) == free


moments_strategy = st.builds(
    dict,
    discretize_at=st.one_of(st.integers(2, 60).map(float), st.floats(0.01, 0.99)),
    warmup=st.one_of(st.integers(1, 60).map(float), st.floats(0, 0.99)),
    fade_out=st.one_of(st.integers(0, 60).map(float), st.floats(0, 0.99)),
    every=st.one_of(st.none(), st.integers(1, 20).map(float)),
    decides=st.booleans(),
    most_updates=st.one_of(st.none(), st.integers(1, 40)),
)


@given(moments_strategy, st.integers(2, 400))
def test_every_run_that_is_not_refused_is_in_order(options: dict[str, Any], total: int) -> None:
    """Warm-up, at least one look, the decision, the pruning; each once, and the fading in between."""
    if options["fade_out"] and not options["decides"]:
        options["fade_out"] = 0.0
    try:
        schedule = Moments(**options).resolve(total)
    except ValueError as error:
        assert "lease" in str(error) or "Use a" in str(error)
        return
    found = happenings(schedule)
    when = {event: [step for step, events in found.items() if event in events] for event in Event}
    assert when[W] == [schedule.warmup] and when[P] == [schedule.prune]
    assert when[U] and schedule.warmup <= when[U][0] and when[U][-1] <= schedule.discretize
    assert when[D] == ([schedule.discretize] if schedule.fades else [])
    assert 1 <= schedule.warmup <= schedule.discretize <= schedule.prune <= total
    fading = [step for step in range(total + 1) if schedule.fade_progress(step) is not None]
    assert fading == list(range(schedule.discretize, schedule.prune))


@pytest.mark.parametrize("moments", [(5, 30, 20), (5, 40, 400), (20, 10, 40), (-1, 10, 40)])
def test_what_cannot_happen_in_this_order(moments: tuple[int, int, int]) -> None:
    warmup, discretize, prune = moments
    with pytest.raises(ValueError, match=f"100 steps cannot warm up until step {warmup}.*prune it after step {prune}"):
        Schedule(100, warmup, range(6, 20), discretize, prune)


@pytest.mark.parametrize(
    ("moments", "total", "message"),
    [
        (Moments(20, 3, every=1.0), 12, "discretize_at=20.*only 12 optimizer steps.*fraction"),
        (Moments(0.25, 6, every=1.0), 12, "pruned at step 3.*warm-up lasts until step 6.*larger"),
        (Moments(0.25, 0.05, fade_out=60, every=4.0), 300, "fade_out=60.*step 15.*step 75.*no step is left.*fraction"),
        (Moments(0.25, 0.05, every=1.0), 1, "1 optimizer step.*at least 2.*max_steps"),
        (Moments(0.25, 0.05, every=1.0), 10**30, "no run is that long"),
    ],
)
def test_runs_that_are_too_short(moments: Moments, total: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        moments.resolve(total)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"discretize_at": 1.5, "warmup": 0}, "discretize_at=1.5.*neither"),
        ({"discretize_at": -1, "warmup": 0}, "discretize_at=-1"),
        ({"discretize_at": 3, "warmup": 5, "every": 1.0}, "pruned before the search starts"),
        ({"discretize_at": 5, "warmup": 3, "every": 2.0, "decides": False}, "once and never anew"),
    ],
)
def test_moments_that_leave_nothing_to_decide_by(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Moments(**options)
