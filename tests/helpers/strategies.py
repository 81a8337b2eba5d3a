"""Odd values for the tests of properties, and what has to hold for every one."""

from __future__ import annotations

import torch
from hypothesis import HealthCheck, reject, settings
from hypothesis import strategies as st

from diffora_trainer import Selection
from diffora_trainer.config import (
    SELECTION_SCOPES,
)
from diffora_trainer.core.budget import Budget


# The same examples on every run and machine, and no example is too slow: the machine may be.
settings.register_profile(
    "fixed", derandomize=True, database=None, deadline=None, max_examples=150, suppress_health_check=list(HealthCheck)
)
settings.load_profile("fixed")


def fits(budget: Budget) -> torch.Tensor:
    """Which modules fit into the budget of their group."""
    return budget.weights <= budget.targets[budget.group]


@st.composite
def budgets(draw: st.DrawFn) -> Budget:
    rows = draw(st.lists(st.integers(0, 5), min_size=1, max_size=24))
    sizes = draw(st.lists(st.sampled_from([1, 8, 16, 24, 100, 10**9]), min_size=len(rows), max_size=len(rows)))
    cap = draw(st.none() | st.integers(min(sizes), sum(sizes) + 9) | st.just(10**400))
    ratio = draw(st.floats(0, 1, exclude_min=True) | st.sampled_from([1, 0.5, 1 / 3, 1e-9]))
    kinds = draw(st.none() | st.lists(st.integers(0, 2), min_size=len(rows), max_size=len(rows)))
    try:
        budget = Budget(rows, sizes, ratio=ratio, scope=draw(st.sampled_from(SELECTION_SCOPES)), cap=cap, kinds=kinds)
    except ValueError as error:
        assert kinds is not None and "divided among" in str(error)
        reject()
    allowed = torch.tensor(draw(st.lists(st.booleans(), min_size=len(rows), max_size=len(rows))))
    if draw(st.booleans()) and (allowed & fits(budget)).any():
        budget.restrict(allowed)
    return budget


FINITE = st.floats(width=32, allow_nan=False, allow_infinity=False) | st.sampled_from([0.0, -0.0, 1e-45, 3e38, -3e38])


def vectors(draw: st.DrawFn, count: int, numbers: st.SearchStrategy[float] = FINITE) -> torch.Tensor:
    return torch.tensor(draw(st.lists(numbers, min_size=count, max_size=count)), dtype=torch.float32)


def assert_exact(budget: Budget, kept: torch.Tensor) -> None:
    """The counts of each group, or all that fits under the cap; only of what is allowed."""
    assert kept.dtype == torch.bool and not (kept & ~budget.allowed).any() and kept.any()
    if budget.cap is None:
        for group, count in enumerate(budget.counts):
            inside = budget.group == group
            assert int(kept[inside].sum()) == min(count, int(budget.allowed[inside].sum()))
    else:
        assert budget.targets.sum() <= budget.cap
        for group, room in enumerate(budget.targets.tolist()):
            inside = budget.group == group
            spent = budget.parameters[kept & inside].sum()
            assert spent <= room and (spent + budget.parameters[budget.allowed & ~kept & inside] > room).all()


def assert_usable(selection: Selection) -> None:
    """All that is ever asked of a selection can be answered, and it is the same after it was saved."""
    assert Selection.from_json(selection.to_json()) == selection
    assert {*selection.selected} <= {*selection.adapted} and {*selection.dropped}.isdisjoint(selection.adapted)
    assert selection.trainable_parameters >= 1 and selection.lowest_row in selection.rows
    assert selection.summary().isprintable() and "%" in selection.summary()
    assert len(selection.matrix(selection.gates)) == len(selection.rows) and len(selection.unadapted()) == 2
    for markdown in (False, True):
        lines = selection.table(markdown).split("\n")
        assert len(lines) == len(selection.rows) + 2 and all(line.isprintable() for line in lines)
        assert not markdown or {line.count("|") for line in lines} == {len(selection.columns) + 2}
