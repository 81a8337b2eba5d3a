"""A choice under a budget of measured step time."""

from __future__ import annotations

import random
from dataclasses import asdict
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from diffora_trainer import ArchitectureSearch, DiffoRAConfig, apply_selection
from diffora_trainer.adapters.gates import pruned_view
from diffora_trainer.core.budget import Budget
from diffora_trainer.core.costs import Ceiling, StepCost, ceilings
from diffora_trainer.methods.build import scope_of
from diffora_trainer.search.timing import measure_step_cost
from helpers.checks import assert_same, snapshot
from helpers.trainers import deep_model, lora


def ids(rows: int = 4):
    found = torch.randint(3, 30, (rows, 12), generator=torch.Generator().manual_seed(1))
    return {"input_ids": found, "labels": found}


def test_measured_times_predict_steps_that_were_not_measured() -> None:
    # 12 layers of 3 modules, and a row outside the layers that is reached after all of them.
    row_of = [row for row in range(12) for _ in range(3)] + [12]
    noise = random.Random(0)

    def seconds_of(kept):
        lowest = min(row_of[module] for module in kept)
        return 1.0 + 0.1 * (12 - lowest) + 0.01 * len(kept) + noise.uniform(-1e-4, 1e-4)

    times = measure_step_cost(seconds_of, row_of, ["layers."] * 12 + [None])
    for kept in ([0], [35], [36], [4, 20, 36], [18, 19, 20, 30], list(range(37))):
        assert times.predict([row_of[module] for module in kept]) == pytest.approx(seconds_of(kept), abs=2e-3)
    assert StepCost.from_dict(asdict(times)) == times


def test_disturbed_measurements_still_say_that_deeper_is_not_faster() -> None:
    row_of = list(range(8))
    noise = random.Random(0)
    times = measure_step_cost(lambda kept: noise.uniform(1.0, 2.0), row_of, ["layers."] * 8)
    measured = [times.depth[row] for row in (0, 2, 5, 7)]
    assert measured == sorted(measured, reverse=True)
    assert times.per_module >= 0


def test_stacks_are_interpolated_apart_and_others_measured_one_by_one() -> None:
    """An encoder whose layers cost ten times those of the decoder above it, and modules around both."""
    names = [*(f"encoder.{i}" for i in range(8)), *(f"decoder.{i}" for i in range(6)), "other"]
    stacks = [name.rstrip("0123456789") if name != "other" else None for name in names]
    row_of = [*range(14), 14, 14]  # the head comes first, then what projects the input

    def cost_of(kept: list[int]) -> float:
        deepest = {**{i: 6 + 10 * (8 - i) for i in range(8)}, **{8 + i: 6 - i for i in range(6)}, 14: 0.5, 15: 90}
        return max(deepest[module] for module in kept) + 0.1 * len(kept)

    cost = measure_step_cost(cost_of, row_of, stacks, repeats=1)
    assert [cost.predict([row]) for row in range(14)] == pytest.approx([cost_of([row]) for row in range(14)])
    assert cost.predict([14]) == cost_of([15])


def test_what_takes_no_part_in_the_loss_does_not_make_its_row_look_cheap() -> None:
    """The first module of each layer is never called, and neither is the last layer."""
    row_of, used = [row for row in range(8) for _ in range(2)], [False, True] * 7 + [False] * 2

    def cost_of(kept: list[int]) -> float:
        return 1.0 + max((8 - row_of[module] for module in kept if used[module]), default=0)

    cost = measure_step_cost(cost_of, row_of, ["layers."] * 8, 1, used)
    assert [cost.depth[row] for row in range(7)] == [1.0 + 8 - row for row in range(7)]


class Unused(nn.Module):
    """Two layers, of which one module each is called, and modules of which one never is, around them."""

    def __init__(self) -> None:
        super().__init__()
        self.before, self.unused, self.after = (nn.Linear(16, 16) for _ in range(3))
        self.layers = nn.ModuleList(nn.ModuleDict({"a": nn.Linear(16, 16), "b": nn.Linear(16, 16)}) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = self.before(x)
        for layer in self.layers:
            x = torch.tanh(layer["b"](x))
        return self.after(x)


@pytest.mark.parametrize("limit", ["max_step_time", "max_step_memory"])
def test_a_module_that_is_never_called_is_measured_as_a_forward_pass(limit: str) -> None:
    model: Any = get_peft_model(Unused(), LoraConfig(r=2, target_modules="all-linear"))  # type: ignore[arg-type]
    search = ArchitectureSearch(model, DiffoRAConfig(**{limit: 1.0}), loss_fn=lambda m, batch: m(batch).sum())
    search.begin()
    costs = search.measure_costs(torch.ones(512, 16))
    if limit == "max_step_memory":
        # What the backward pass needs grows with the depth, and the module at the input is below all layers.
        first, second, other = (costs.memory.depth[search.grid.rows.index(row)] for row in search.grid.rows)
        assert first > second and other >= second
    assert search.ceilings[-1].count == len(search.grid)


# 4 layers of 2 modules, the deepest one first: a step takes 1 with a module in the last layer, 1 more for each layer
# below it, and 0.25 for each further module; so 4 + 7 * 0.25 = 5.75 with all of them.
ROWS, DEPTHS = [0, 0, 1, 1, 2, 2, 3, 3], StepCost(5.75, (4.0, 3.0, 2.0, 1.0), 0.25)


def under(limit: float, *others: tuple[StepCost, float]) -> list[tuple[list[int], int]]:
    return [(sorted(ceiling.rows), ceiling.count) for ceiling in ceilings([(DEPTHS, limit), *others], ROWS)]


def test_limits_leave_many_modules_in_few_layers_or_few_in_many() -> None:
    assert under(1.0) == [([0, 1, 2, 3], 8)]
    assert under(4.3 / 5.75) == [([0, 1, 2, 3], 2), ([1, 2, 3], 6)]
    assert under(3.3 / 5.75) == [([1, 2, 3], 2), ([2, 3], 4)]
    memory = StepCost(100.0, (60.0, 60.0, 20.0, 20.0), 5.0)  # all of it is in the lower half
    assert under(4.3 / 5.75, (memory, 0.5)) == [([2, 3], 4)]
    assert under(4.3 / 5.75, (memory, 0.66)) == [([0, 1, 2, 3], 2), ([2, 3], 4)]
    assert under(0.1) == []  # not even one module of the last layer


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_all_modules_are_within_a_limit_of_what_all_of_them_cost(rank: int) -> None:
    """Though costs are rounded to float32."""
    search = ArchitectureSearch(
        get_peft_model(deep_model(), lora(r=rank)),
        DiffoRAConfig(max_step_memory=1.0),
        loss_fn=lambda m, b: m(**b).loss,
    )
    search.begin()
    for rows in (2, 3, 5):
        search.measure_costs(ids(rows))
        assert [ceiling.count for ceiling in search.ceilings] == [len(search.grid)]
    assert bool(search.method.discretize().all())


def test_depth_and_modules_are_chosen_at_once() -> None:
    def kept(gains: list[float], limit: float, **budget) -> list[int]:
        limited = Budget(ROWS, [10] * 8, scope="model", **budget)
        limited.limit(ceilings([(DEPTHS, limit)], ROWS))
        vertex, chosen = (
            limited.linear_oracle(torch.tensor(gains)),
            limited.discretize(torch.tensor(gains), worth=torch.tensor(gains)),
        )
        assert torch.equal(vertex.bool(), chosen)
        assert DEPTHS.predict([ROWS[i] for i in chosen.nonzero().flatten()]) <= limit * 5.75
        share = limited.share
        assert ((share >= 0) & (share <= 1)).all() and not share[~limited.allowed].any()
        return chosen.nonzero().flatten().tolist()

    # Two modules down to the first layer, or six without it: what the two of it are worth decides.
    assert kept([9.0, 1, 1, 1, 1, 1, 1, 1], 4.3 / 5.75) == [0, 1]
    assert kept([3.0, 1, 1, 1, 1, 1, 1, 1], 4.3 / 5.75) == [2, 3, 4, 5, 6, 7]
    assert kept([1.0, 1, 9, 1, 1, 1, 1, 9], 4.3 / 5.75, ratio=0.25) == [2, 7]  # a count holds as well
    assert kept([1.0, 1, 9, 1, 1, 1, 2, 9], 4.3 / 5.75, cap=39) == [2, 6, 7]  # and parameters
    assert kept([1.0, 1, 8, 1, 1, 1, 2, 9], 4.3 / 5.75, cap=39, ratio=0.125) == [7]  # and both


def test_all_limits_hold_together() -> None:
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        gains = torch.rand(8, generator=generator) + 0.01
        limit = float(torch.rand((), generator=generator)) * 0.6 + 0.4
        budget = Budget(ROWS, [10, 20, 30, 40] * 2, ratio=0.5, scope="model", cap=90)
        budget.limit(ceilings([(DEPTHS, limit)], ROWS))
        kept = budget.discretize(gains).nonzero().flatten().tolist()
        assert 1 <= len(kept) <= 4
        assert sum([10, 20, 30, 40, 10, 20, 30, 40][i] for i in kept) <= 90
        assert DEPTHS.predict([ROWS[i] for i in kept]) <= limit * 5.75 + 1e-6


def test_sets_that_no_limit_allows_are_refused() -> None:
    budget = Budget(ROWS, [10] * 6 + [99] * 2, scope="model", cap=50)
    with pytest.raises(ValueError, match="No module or unit"):
        budget.limit([Ceiling(frozenset([3]), 2)])


def test_as_if_cut_computes_what_a_cut_would_and_leaves_no_trace() -> None:
    model = get_peft_model(deep_model(), lora())
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    model.eval()
    before, trainable = snapshot(model), [p.requires_grad for p in model.parameters()]
    search = ArchitectureSearch(model, DiffoRAConfig(selection_scope="model"), loss_fn=lambda m, b: m(**b).loss)
    selection = search.select()
    kept = [index for index, keep in enumerate(selection.kept) if keep]
    with pruned_view(model, search.adapters.sites, kept):
        pretended = model(**ids()).logits
        parameters = {p for index in kept for p in search.adapters.sites[index].parameters}
        assert {p for p in model.parameters() if p.requires_grad} == parameters
    assert [p.requires_grad for p in model.parameters()] == trainable
    assert_same(snapshot(model), before)
    full = model(**ids()).logits
    apply_selection(model, selection)
    assert torch.equal(model(**ids()).logits, pretended)
    assert not torch.equal(full, pretended)


def test_a_limit_is_one_of_the_whole_model() -> None:
    for options in ({"max_step_time": 0.7}, {"max_step_memory": 0.7}, {"max_trainable_parameters": 100}):
        config = DiffoRAConfig(**options)
        assert scope_of(config) == "model" and config.ratio == 1.0
        assert DiffoRAConfig(**options, selection_ratio=0.25).ratio == 0.25
    assert scope_of(DiffoRAConfig()) == "layer" and DiffoRAConfig().ratio == 0.5
    for name in ("max_step_time", "max_step_memory"):
        with pytest.raises(ValueError, match=f"{name}=0"):
            DiffoRAConfig(**{name: 0})
        with pytest.raises(ValueError, match=f"{name}=0.5.*weight_sharing='model'"):
            DiffoRAConfig(**{name: 0.5}, weight_sharing="model")
