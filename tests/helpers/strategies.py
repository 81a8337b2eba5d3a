"""Odd values for the tests of properties, and what has to hold for every one."""

from __future__ import annotations

import torch
from hypothesis import HealthCheck, reject, settings
from hypothesis import strategies as st

from diffora_trainer import Selection
from diffora_trainer.config import SELECTION_SCOPES
from diffora_trainer.core.budget import Budget
from diffora_trainer.core.costs import Ceiling


# The same examples on every run and machine, and no example is too slow: the machine may be.
settings.register_profile(
    "fixed", derandomize=True, database=None, deadline=None, max_examples=150, suppress_health_check=list(HealthCheck)
)
settings.load_profile("fixed")


def fits(budget: Budget) -> torch.Tensor:
    """Which modules fit into the budget of their group."""
    return budget.weights <= budget.targets[budget.group]


@st.composite
def budget_arguments(draw: st.DrawFn) -> tuple[dict, list[Ceiling]]:
    """Arguments of a budget, and ceilings that leave it one affordable module at least; often none."""
    rows = draw(st.lists(st.integers(0, 5), min_size=1, max_size=24))
    sizes = draw(st.lists(st.sampled_from([1, 8, 16, 24, 100, 10**9]), min_size=len(rows), max_size=len(rows)))
    cap = draw(st.none() | st.integers(min(sizes), sum(sizes) + 9) | st.just(10**400))
    # Beside a cap a share is another limit, and then more may fit under the cap than is kept.
    ratio = None if cap is not None else draw(st.floats(0, 1, exclude_min=True) | st.sampled_from([1, 0.5, 1e-9]))
    kinds = draw(st.none() | st.lists(st.integers(0, 2), min_size=len(rows), max_size=len(rows)))
    scope = draw(st.sampled_from(SELECTION_SCOPES))
    arguments = {"rows": rows, "parameters": sizes, "ratio": ratio, "scope": scope, "cap": cap, "kinds": kinds}
    try:
        budget = Budget(**arguments)
    except ValueError as error:
        assert kinds is not None and "divided among" in str(error)
        reject()
    under = draw(st.frozensets(st.sampled_from(rows)))
    allowed = torch.tensor([row in under for row in rows])
    ceilings = [Ceiling(under, len(rows))] if (allowed & fits(budget)).any() else []
    return arguments, ceilings


def make_budget(arguments: dict, ceilings: list[Ceiling]) -> Budget:
    budget = Budget(**arguments)
    if ceilings:
        budget.limit(ceilings)
    return budget


@st.composite
def budgets(draw: st.DrawFn) -> Budget:
    return make_budget(*draw(budget_arguments()))


FINITE = st.floats(width=32, allow_nan=False, allow_infinity=False) | st.sampled_from([0.0, -0.0, 1e-45, 3e38, -3e38])


def vectors(draw: st.DrawFn, count: int, numbers: st.SearchStrategy[float] = FINITE) -> torch.Tensor:
    return torch.tensor(draw(st.lists(numbers, min_size=count, max_size=count)), dtype=torch.float32)


def assert_exact(budget: Budget, kept: torch.Tensor) -> None:
    """The counts of each group, or all that fits under the cap; only of what is allowed."""
    assert kept.dtype == torch.bool and not (kept & ~budget.allowed).any() and kept.any()
    if budget.cap is None:
        for group, count in enumerate(budget.targets.int().tolist()):
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
