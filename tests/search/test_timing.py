"""A choice under a budget of measured step time."""

from __future__ import annotations

import random

import pytest
import torch
from peft import get_peft_model

from diffora_trainer import ArchitectureSearch, DiffoRAConfig, apply_selection
from diffora_trainer.adapters.gates import pruned_view
from diffora_trainer.core.budget import Budget
from diffora_trainer.search.timing import StepTimes, measure_step_times
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

    times = measure_step_times(seconds_of, row_of, [True] * 12 + [False])
    for kept in ([0], [35], [36], [4, 20, 36], [18, 19, 20, 30], list(range(37))):
        assert times.predict([row_of[module] for module in kept]) == pytest.approx(seconds_of(kept), abs=2e-3)
    assert StepTimes.from_dict(times.to_dict()) == times


def test_disturbed_measurements_still_say_that_deeper_is_not_faster() -> None:
    row_of = list(range(8))
    noise = random.Random(0)
    times = measure_step_times(lambda kept: noise.uniform(1.0, 2.0), row_of, [True] * 8)
    measured = [times.depth[row] for row in (0, 2, 5, 7)]
    assert measured == sorted(measured, reverse=True)
    assert times.per_module >= 0


def test_the_allowed_modules_are_as_many_as_time_permits_and_as_the_budget_needs() -> None:
    rows, depth = [0, 0, 1, 1, 2, 2, 3, 3], [4.0, 4.0, 3.0, 3.0, 2.0, 2.0, 1.0, 1.0]
    budget = Budget(rows, [10] * 8, ratio=0.25, scope="model")
    assert budget.max_depth_mask(depth, 3.5).tolist() == [False] * 2 + [True] * 6
    assert budget.max_depth_mask(depth, 0.1).tolist() == [False] * 6 + [True] * 2  # the fastest that has room for two
    capped = Budget(rows, [10] * 8, cap=45)
    assert capped.max_depth_mask(depth, 0.1).tolist() == [False] * 2 + [True] * 6  # 45 need five modules
    scores = torch.arange(8.0).flip(0)  # the best ones are not allowed
    for one in (budget, capped):
        one.restrict(one.max_depth_mask(depth, 2.5))
        kept = one.discretize(scores)
        assert not (kept & ~one.allowed).any()
        assert one.linear_oracle(torch.ones(8)).sum() == kept.sum() == (2 if one is budget else 4)
        assert torch.all(one.share[~one.allowed] == 0)
        assert float((one.share * one.weights).sum()) == pytest.approx(float(one.targets))
        assert torch.all(one.calibrate(torch.randn(8))[~one.allowed] == 0)
    with pytest.raises(ValueError, match="Not one"):
        budget.restrict(torch.zeros(8, dtype=torch.bool))


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


def test_a_layer_wise_choice_cannot_save_time() -> None:
    with pytest.raises(ValueError, match="selection_scope='model'"):
        DiffoRAConfig(max_step_time=0.7)
    with pytest.raises(ValueError, match="max_step_time=0"):
        DiffoRAConfig(max_step_time=0)
    assert DiffoRAConfig(max_step_time=0.7, max_trainable_parameters=100).max_step_time == 0.7
