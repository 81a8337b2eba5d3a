"""What holds for every input: options, budgets, relaxations, selections and grids, tried with odd values."""

from __future__ import annotations

import dataclasses
import json
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from diffora_trainer import DiffoRAConfig, Selection
from diffora_trainer.config import (
    SELECTION_GRANULARITIES,
    SELECTION_SCOPES,
    SELECTION_UNITS,
    UNSELECTED,
    WEIGHT_SHARING,
)
from diffora_trainer.config_checks import PREFIX_CACHES
from diffora_trainer.core.budget import Budget
from diffora_trainer.core.grid import Grid, SiteInfo
from diffora_trainer.methods.build import make_schedule, method_of
from diffora_trainer.methods.registry import method_names
from diffora_trainer.renamed import OLD_NAMES
from helpers.adapted import make_selection
from helpers.strategies import assert_exact, assert_usable, budget_arguments, budgets, fits, make_budget, vectors


NAMES = [field.name for field in dataclasses.fields(DiffoRAConfig) if field.name not in OLD_NAMES]


# Options

HOSTILE = st.one_of(
    st.none(),
    st.booleans(),
    st.floats(),
    st.integers(),
    st.sampled_from([0, -1, 10**400, -(10**400), 1e308, 5e-324, 2**63, 0.5, 1, 2]),
    st.text(max_size=8),
    st.sampled_from(["0.5", "layer", "nan", "\x00", "../..", "{{ 1 }}"]),
    st.lists(st.integers(), max_size=2),
    st.sampled_from([np.float32(0.5), np.float64(0.5), np.int64(3), np.bool_(True), np.zeros(2), np.str_("model")]),
    st.sampled_from([torch.tensor(0.5), {}, set(), object(), 1j, b"layer", float, DiffoRAConfig()]),
)
MOMENTS = st.one_of(st.floats(0, 1), st.integers(0, 40), st.integers(0, 40).map(float))
PLAUSIBLE: dict[str, st.SearchStrategy[Any]] = {
    "selection_ratio": st.floats(0, 1),
    "selection_scope": st.sampled_from(SELECTION_SCOPES),
    "max_trainable_parameters": st.none() | st.integers(1, 10**6),
    "selection_granularity": st.sampled_from(SELECTION_GRANULARITIES),
    "discretize_at": MOMENTS,
    "arch_warmup": MOMENTS,
    "fade_out": MOMENTS,
    "arch_split": st.floats(0, 1),
    "arch_batch_size": st.none() | st.integers(1, 99),
    "arch_seed": st.integers(0, 2**32 - 1),
    "weight_sharing": st.sampled_from(WEIGHT_SHARING),
    "log_gates_by_kind": st.booleans(),
    "base_model_id": st.none() | st.sampled_from(["org/name", "gpt2"]),
    "max_step_time": st.none() | st.floats(0, 1),
    "max_step_memory": st.none() | st.floats(0, 1),
    "selection_unit": st.sampled_from(SELECTION_UNITS),
    "selection_groups": st.none() | st.just({"attention": ["q_proj", "v_proj"]}),
    "decide_early": st.booleans(),
    "search_only": st.booleans(),
    "prefix_cache": st.sampled_from(PREFIX_CACHES),
    "prefix_cache_gib": st.floats(0, 99),
    "unselected": st.sampled_from(UNSELECTED),
    "search_micro_batches": st.none() | st.integers(0, 9),
    "method": st.sampled_from(method_names()),
    "method_options": st.none() | st.deferred(lambda: METHOD_OPTIONS),
    "extra_sites": st.none() | st.just({"shortcuts": {"kinds": ["residual1"]}}),
}
OF_METHODS: dict[str, st.SearchStrategy[Any]] = {
    "arch_every": st.none() | st.integers(1, 9),
    "arch_learning_rate": st.none() | st.floats(0, 1),
    "arch_order": st.sampled_from([1, 2]),
    "fold_gates": st.booleans(),
    "score_batches": st.integers(1, 99),
    "normalize_scores": st.booleans(),
    "reallocate_every": st.none() | MOMENTS,
    "beta1": st.floats(0, 1),
    "beta2": st.floats(0, 1),
    "first_to_last": st.floats(0, 2),
    "position": st.sampled_from(["auto", "mean", "middle"]),
    "layers_at_once": st.integers(0, 9),
    "gate_learning_rate": st.none() | st.floats(0, 1),
    "threshold": st.floats(-1, 1),
}
METHOD_OPTIONS = st.fixed_dictionaries({}, optional=OF_METHODS) | st.dictionaries(
    st.sampled_from([*OF_METHODS, "arch_evry"]), HOSTILE, max_size=2
)
TOTALS = st.one_of(st.integers(-2, 60), st.sampled_from([10**6, 2**53 + 1, 2**63 - 1, 2**63, 10**400, -(10**400)]))


def test_every_option_is_tried() -> None:
    assert set(PLAUSIBLE) == set(NAMES)


@settings(max_examples=250)
@given(
    options=st.fixed_dictionaries({}, optional={**PLAUSIBLE, "arch_seed": st.integers(-1, 2**33)}),
    hostile=st.dictionaries(st.sampled_from(NAMES), HOSTILE, max_size=2),
    totals=st.lists(TOTALS, min_size=1, max_size=5),
)
def test_options_are_refused_by_name_or_hold_together(
    options: dict[str, Any], hostile: dict[str, Any], totals: list[int]
) -> None:
    options = {**options, **hostile}
    try:
        config = DiffoRAConfig(**options)
        method, of_method = method_of(config)
    except (ValueError, TypeError) as error:
        assert any(f"`{name}" in str(error) for name in (*options, *OF_METHODS, "arch_evry")), error
        return
    stored = json.loads(json.dumps(config.to_dict(), allow_nan=False))
    assert DiffoRAConfig(**stored) == config and DiffoRAConfig(**stored).to_dict() == stored
    for total in totals:
        try:
            schedule = make_schedule(config, total)
        except ValueError:
            continue
        warmup, decision, prune = schedule.warmup, schedule.discretize, schedule.prune
        if method.searches:
            assert 1 <= warmup < decision <= prune <= total and schedule.updates[0] == warmup + 1
            assert schedule.updates[-1] <= decision
            if of_method.arch_every is None:
                assert schedule.updates.step >= 4 and len(schedule.updates) <= 32
            else:
                assert schedule.updates.step == of_method.arch_every
        elif method.trains_gates:
            assert 1 == warmup < decision == prune <= total and schedule.updates == range(2, prune + 1)
        elif of_method.reallocate_every is not None:
            assert 1 <= warmup < decision == prune <= total
            assert schedule.updates[0] == warmup and schedule.updates[-1] < prune
        else:
            assert (config.discretize_at > 0) <= warmup == decision == prune <= total
            assert list(schedule.updates) == [prune]


def test_the_length_of_a_run_is_a_number_of_steps() -> None:
    for total in (None, True, 10.0, "10", float("nan")):
        with pytest.raises(TypeError, match="total_steps"):
            make_schedule(DiffoRAConfig(), total)  # type: ignore[arg-type]


# Budgets


@given(data=st.data())
def test_a_choice_is_exact_deterministic_and_in_the_order_of_the_grid(data: st.DataObject) -> None:
    arguments, ceilings = data.draw(budget_arguments())
    budget = make_budget(arguments, ceilings)
    count = len(budget)
    scores = vectors(data.draw, count)
    kept = budget.discretize(scores)
    assert_exact(budget, kept)
    assert budget.discretize(torch.zeros(count)).equal(budget.discretize(torch.full((count,), 3.0)))
    assert budget.discretize(scores).equal(kept)  # nothing was left behind by the calls in between
    if budget.cap is None:
        for group in set(budget.group.tolist()):
            members = [i for i in range(count) if budget.group[i] == group and budget.allowed[i]]
            number = min(int(budget.targets[group]), len(members))
            # Python's sort is stable: of equal scores those first in the grid are taken.
            best = sorted(members, key=lambda i: -float(scores[i]))[:number]
            assert [i for i in members if kept[i]] == sorted(best)
            ties = budget.discretize(torch.zeros(count))
            assert [i for i in members if ties[i]] == members[:number]
    # A choice does not depend on how the grid is numbered, as long as no two scores are equal.
    if len(set(scores.tolist())) == count:
        order = data.draw(st.permutations(range(count)))
        lists = ("rows", "parameters", "kinds")
        moved = {name: arguments[name] and [arguments[name][i] for i in order] for name in lists}
        other = make_budget({**arguments, **moved}, ceilings)
        assert other.discretize(scores[torch.tensor(order)]).equal(kept[torch.tensor(order)])
    for bad in (math.nan, math.inf, -math.inf):
        broken = scores.clone()
        broken[data.draw(st.integers(0, count - 1))] = bad
        with pytest.raises(ValueError, match="finite"):
            budget.discretize(broken)


@given(data=st.data())
def test_one_of_those_that_are_required_is_kept(data: st.DataObject) -> None:
    budget = data.draw(budgets())
    count = len(budget)
    scores = vectors(data.draw, count)
    before = budget.discretize(scores)
    required = torch.tensor(data.draw(st.lists(st.booleans(), min_size=count, max_size=count)))
    budget.required = required
    kept = budget.discretize(scores)
    assert_exact(budget, kept)
    possible = required & budget.allowed & fits(budget)
    if (before & required).any() or not possible.any():
        assert kept.equal(before)
    else:
        assert int((kept & required).sum()) >= 1 and kept[possible & (scores == scores[possible].max())].any()
        changed = (kept != before).nonzero().flatten()
        if budget.cap is None:  # it has taken the place of the last one
            assert len(changed) == 2 and len({int(budget.group[i]) for i in changed}) == 1


@given(data=st.data())
def test_whole_units_are_kept_where_one_fits_the_cap(data: st.DataObject) -> None:
    sizes = data.draw(st.lists(st.integers(1, 5), min_size=1, max_size=6))
    units = [unit for unit, size in enumerate(sizes) for _ in range(size)]
    parameters = data.draw(st.lists(st.sampled_from([1, 8, 24]), min_size=len(units), max_size=len(units)))
    costs = [sum(p for p, own in zip(parameters, units, strict=True) if own == unit) for unit in range(len(sizes))]
    cap = data.draw(st.integers(min(costs), sum(costs)))
    budget = Budget(units, parameters, ratio=data.draw(st.floats(0, 1, exclude_min=True)), cap=cap, units=units)
    kept = budget.discretize(vectors(data.draw, len(units)))
    assert kept.any() and budget.parameters[kept].sum() <= cap
    assert all(len({bool(k) for k, own in zip(kept, units, strict=True) if own == unit}) == 1 for unit in set(units))


@given(data=st.data())
def test_a_relaxed_budget_is_kept(data: st.DataObject) -> None:
    budget = data.draw(budgets())
    numbers = vectors(data.draw, len(budget))

    def weight(gates: torch.Tensor) -> torch.Tensor:
        used = torch.zeros_like(budget.targets)
        return used.index_add_(0, budget.group, budget.weights * gates.double())

    vertex = budget.linear_oracle(numbers)
    assert set(vertex.tolist()) <= {0.0, 1.0} and (weight(vertex) <= budget.targets).all()
    assert not vertex[(numbers <= 0) | ~budget.allowed].any()
    gates = budget.calibrate(numbers.clamp(-1e9, 1e9))
    room = weight(budget.allowed)
    assert ((gates >= 0) & (gates <= 1)).all() and not gates[~budget.allowed].any()
    assert (weight(gates) <= torch.minimum(budget.targets, room) * (1 + 1e-4)).all()
    share = budget.share
    assert ((share >= 0) & (share <= 1)).all() and (weight(share) <= budget.targets * (1 + 1e-9)).all()


@given(
    rows=st.lists(st.integers(-3, 3), max_size=3),
    sizes=st.lists(st.integers(-3, 9), max_size=3),
    ratio=st.floats(),
    scope=st.sampled_from(["layer", "model", "row", "", None]),
    cap=st.none() | st.integers(-5, 5),
)
def test_budgets_are_refused_with_a_reason(rows: Any, sizes: Any, ratio: Any, scope: Any, cap: Any) -> None:
    try:
        budget = Budget(rows, sizes, ratio, scope, cap)
    except ValueError as error:
        assert len(str(error)) > 20
        return
    assert_exact(budget, budget.discretize(torch.zeros(len(rows))))


# Selections

WORDS = st.one_of(
    st.text(min_size=1, max_size=12),
    st.sampled_from(
        ["../../etc/passwd", "{{ 1 }}", "a|b\nc", "<b>", "\x1b[2J", "layers.0.q_proj", "\ud800", "é.ü", "."]
    ),
)
SCALARS = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False, allow_infinity=False), WORDS)


@st.composite
def selections(draw: st.DrawFn) -> Selection:
    rows = draw(st.lists(WORDS, min_size=1, max_size=4))
    columns = draw(st.lists(WORDS, min_size=1, max_size=4))
    cells = [(row, column) for row in range(len(rows)) for column in range(len(columns))]
    positions = draw(st.lists(st.sampled_from(cells), min_size=1, max_size=8, unique=True))
    count = len(positions)
    modules = draw(st.lists(WORDS, min_size=count, max_size=count, unique=True))
    kept = [draw(st.booleans()) for _ in range(count - 1)]
    kept.insert(draw(st.integers(0, count - 1)), True)
    rest = [name for name, keep in zip(modules, kept, strict=True) if not keep]
    numbers = st.tuples(*[st.floats(allow_nan=False, allow_infinity=False)] * count)
    sites = [
        SiteInfo(name, row, column, draw(st.integers(1, 99)), draw(st.integers(1, 10**30)))
        for name, (row, column) in zip(modules, positions, strict=True)
    ]
    return Selection(
        grid=Grid(tuple(rows), tuple(columns), tuple(sites)),
        ranks=tuple(draw(st.integers(1, s.rank)) if keep else 0 for s, keep in zip(sites, kept, strict=True)),
        scores=draw(numbers),
        gates=draw(numbers),
        factors=draw(numbers),
        shared=(tuple(rest),) if len(rest) > 1 and draw(st.booleans()) else (),
        step=draw(st.none() | st.integers(0, 10**9)),
        times=draw(st.dictionaries(WORDS, st.floats(0, 1e6), max_size=2)),
        config=draw(st.dictionaries(WORDS, SCALARS | st.lists(SCALARS, max_size=2), max_size=3)),
        versions=draw(st.dictionaries(WORDS, WORDS, max_size=2)),
    )


@given(selections())
def test_a_selection_is_the_same_after_it_was_saved(selection: Selection) -> None:
    assert_usable(selection)


ANYTHING: st.SearchStrategy[Any] = st.recursive(
    SCALARS | st.sampled_from([math.nan, math.inf, 10**400, -1, 2**63, "1e999", True, [], {}]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(WORDS, inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=500)
@given(data=st.data())
def test_a_foreign_selection_is_refused_or_usable(data: st.DataObject) -> None:
    record = json.loads(make_selection().to_json())
    for _ in range(data.draw(st.integers(1, 3))):
        inside: Any = record
        while isinstance(inside, (dict, list)) and inside:
            keys: Any = list(inside) if isinstance(inside, dict) else range(len(inside))
            key = data.draw(st.sampled_from(keys))
            if isinstance(inside[key], (dict, list)) and inside[key] and data.draw(st.booleans()):
                inside = inside[key]
                continue
            change = data.draw(st.sampled_from(["drop", "replace", "repeat", "nest"]))
            if change == "drop":
                del inside[key]
            elif change == "replace":
                inside[key] = data.draw(ANYTHING)
            elif change == "repeat" and isinstance(inside, list):
                inside.append(inside[key])
            else:
                inside[key] = [inside[key]]
            break
    text = json.dumps(record)
    if data.draw(st.integers(0, 9)) == 0:
        text = text.replace("}", '}, "kept": [true]}', 1)  # a key that comes twice, or a brace too many
    try:
        selection = Selection.from_json(text)
    except ValueError as error:
        assert "not a selection saved by diffora-trainer" in str(error) and "Please" in str(error)
        return
    assert_usable(selection)


@given(st.text() | ANYTHING.map(lambda value: json.dumps(value)))
def test_any_text_is_refused_as_a_selection(text: str) -> None:
    with pytest.raises(ValueError, match="Please pass"):
        Selection.from_json(text)


@pytest.mark.parametrize("depth", [10, 900, 100_000])
def test_deep_nesting_is_refused_or_usable(depth: int) -> None:
    text = make_selection().to_json().replace('"torch": "2.11"', '"torch": ' + "[" * depth + "]" * depth)
    try:
        selection = Selection.from_json(text)
    except ValueError:
        assert depth > 10
        return
    assert_usable(selection)
