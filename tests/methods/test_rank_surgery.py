"""What methods that give ranks do to a model: components are gated, replaced, started anew and cut."""

from __future__ import annotations

import copy
import logging
from typing import Any

import pytest
import torch
from peft import get_peft_model

from diffora_trainer import SelectionRun, apply_selection
from diffora_trainer.adapters.grid import AdapterGrid
from helpers.models import llama
from helpers.options import make_config
from helpers.searches import components, half_warm, make_search, make_steps, model_loss, pairs, warm
from helpers.trainers import lora


def test_the_best_components_stay_with_their_weights_and_moments() -> None:
    """And the model computes what it did with the outputs of all others at 0."""
    model, batches = warm(spread=1.0)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    for batch in batches:
        model_loss(model, batch).backward()
        optimizer.step()
        optimizer.zero_grad()
    search = make_search(model, "adalora", selection_ratio=0.5)
    search.score(batches)
    worth, kept = components(search), search.method.split(search.method.components())
    assert max(w[~k].max() for w, k in zip(worth, kept, strict=True) if not k.all()) <= min(
        w[k].min() for w, k in zip(worth, kept, strict=True) if k.any()
    )
    assert any(0 < int(own.sum()) < len(own) and not own[: int(own.sum())].all() for own in kept)  # not the first ones
    names = search.grid.names
    before = {
        name: (a.detach().clone(), b.detach().clone(), optimizer.state[b]["exp_avg"].clone())
        for name, (a, b) in zip(names, pairs(model), strict=True)
    }
    without = copy.deepcopy(model)
    with torch.no_grad():
        for (_, b), own in zip(pairs(without), kept, strict=True):
            b[:, ~own] = 0.0
    selection = search.finish(0)
    assert selection.ranks == tuple(int(own.sum()) for own in kept)
    apply_selection(model, selection, optimizer)
    expected, found = (m.eval()(**batches[0]).logits for m in (without, model))
    torch.testing.assert_close(found, expected)
    stay = dict(zip(names, kept, strict=True))
    left = AdapterGrid.from_model(model).grid.names
    assert set(left) == {name for name in names if stay[name].any()}
    for name, (a, b) in zip(left, pairs(model), strict=True):
        old, own = before[name], stay[name]
        assert a.equal(old[0][own]) and b.equal(old[1][:, own])
        assert optimizer.state[b]["exp_avg"].equal(old[2][:, own])


def test_eva_starts_nothing_anew_that_has_learned() -> None:
    model, batches = warm()
    before = [a.detach().clone() for a, _ in pairs(model)]
    search = make_search(model, "eva")
    search.score(batches)
    search.finish()
    for (a, _), old in zip(pairs(model), before, strict=True):
        assert sorted(a.sum(dim=1).tolist()) == pytest.approx(sorted(old.sum(dim=1).tolist()))


def test_what_cannot_be_spent_in_ranks_keeps_whole_modules() -> None:
    model, batches = warm()
    search = make_search(model, "adalora", selection_granularity="module", selection_ratio=0.5)
    totals = search.score(batches)
    selection = search.select()
    assert not selection.in_ranks and sum(selection.kept) == 7
    assert [bool(keep) for keep in selection.kept] == [bool(score >= totals.sort().values[7]) for score in totals]
    torch.testing.assert_close(totals, torch.stack([own.sum() for own in components(search)]))
    for asked in ("rank", "component"):
        with pytest.raises(
            ValueError, match=f"'{asked}'`, but spending it in ranks does not combine with `selection_unit='layer'`"
        ):
            make_search(model, "adalora", selection_granularity=asked, selection_unit="layer")
    with pytest.raises(ValueError, match="room for 10 parameters"):
        make_search(model, "adalora", max_trainable_parameters=10)


@pytest.mark.parametrize("method", ["adalora", "eva", "prilora"])
def test_a_cap_below_the_smallest_module_at_full_rank_is_kept(method: str) -> None:
    tiny = llama()
    model = get_peft_model(tiny.model, lora(r=64, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))
    batches = [{key: value[[i, i + 1]] for key, value in tiny.batch.items()} for i in range(3)]
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    costs = [site.cost for site in AdapterGrid.from_model(model).sites]
    cap = 8 * sum(costs)
    assert cap < 64 * min(costs)
    config = make_config(method=method, max_trainable_parameters=cap, discretize_at=4)
    run = SelectionRun(model, optimizer, config, model_loss, batches, total_steps=6)
    make_steps(run, model, batches, optimizer, 6)
    assert run.selection is not None and run.selection.notes == ()
    left = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert cap - min(costs) < left == run.selection.trainable_parameters <= cap


ALL = "then all modules go on without gates."
SOME = "then the selected modules go on alone."
BEST = "then the best components go on alone."


@pytest.mark.parametrize(
    ("options", "said", "reason"),
    [
        ({"method": "sora"}, BEST, None),
        ({"method": "sora", "selection_ratio": 1.0}, BEST, None),
        ({"method": "sora", "selection_granularity": "module"}, SOME, None),  # as was asked for
        ({"method": "sora", "selection_unit": "layer"}, SOME, "does not combine with `selection_unit='layer'`"),
        ({"method": "sora", "selection_unit": "layer", "selection_ratio": 1.0}, ALL, "`selection_unit='layer'`"),
        ({"method": "sora", "max_step_time": 0.9, "selection_ratio": None}, SOME, "`max_step_time=0.9`"),
        ({"method": "beamlora"}, ALL, None),
        ({"method": "beamlora", "selection_ratio": 1.0}, ALL, None),
        ({"method": "adalora", "selection_unit": "layer"}, "then scored (adalora)", "`selection_unit='layer'`"),
    ],
)
def test_the_log_says_what_a_share_is_spent_in(
    options: dict[str, Any], said: str, reason: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    model, batches = half_warm()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    config = make_config(**{"selection_ratio": 0.5, "discretize_at": 30, **options})
    run = SelectionRun(model, optimizer, config, model_loss, batches, total_steps=40)
    with caplog.at_level(logging.INFO, logger="diffora_trainer"):
        run.begin()
    assert said in caplog.text
    assert ("The budget keeps or prunes whole modules, not ranks: " in caplog.text) == (reason is not None)
    assert reason is None or reason in caplog.text
