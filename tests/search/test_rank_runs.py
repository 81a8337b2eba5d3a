"""Runs whose budget is spent in ranks."""

from __future__ import annotations

import copy
import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

from diffora_trainer import DiffoRAConfig, SelectionRun
from diffora_trainer.adapters.base import find_sites
from diffora_trainer.adapters.grid import AdapterGrid
from diffora_trainer.core.ranks import RankBudget
from diffora_trainer.methods.frank_wolfe import FrankWolfe
from diffora_trainer.search import rank_rules
from diffora_trainer.search.rank_plan import ModulePlan
from diffora_trainer.search.search import ArchitectureSearch
from helpers.adapted import base_weights, logits, randomize
from helpers.models import llama
from helpers.searches import gain_relaxation
from helpers.tiny_model import TinyModel


STEPS, CHOICE, PRUNE = 40, 18, 20
CONFIG: dict[str, Any] = {
    "selection_granularity": "rank", "arch_warmup": 4, "discretize_at": PRUNE, "fade_out": PRUNE - CHOICE,
    "method_options": {"arch_every": 1},
}  # fmt: skip


def loss_of(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    return model(**batch).loss


def make(rank: int = 8, **options: Any) -> tuple[TinyModel, PeftModel, torch.optim.AdamW]:
    tiny = llama()
    torch.manual_seed(1)
    config = LoraConfig(**{"r": rank, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **options})
    model: Any = get_peft_model(tiny.model, config)
    return tiny, model, torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)


def pairs(model: nn.Module) -> dict[str, tuple[Tensor, Tensor]]:
    found = {}
    for site in AdapterGrid.from_model(model).sites:
        a, b = site.parameters
        found[site.name] = (a, b)
    return found


def train(made: Any, config: DiffoRAConfig, steps: int = STEPS) -> tuple[SelectionRun, list[float]]:
    tiny, model, optimizer = made
    run = SelectionRun(model, optimizer, config, loss_of, [tiny.batch] * 4, total_steps=STEPS)
    losses = []
    for _ in range(steps):
        run.before_step()
        loss = loss_of(model, tiny.batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        run.after_step()
        losses.append(loss.item())
    return run, losses


def test_until_the_choice_a_run_is_one_of_plain_lora_of_the_budgets_rank() -> None:
    made = make()
    small = make(rank=4, lora_alpha=4)  # of scale 1, as rank 8 with PEFT's alpha of 8
    with torch.no_grad():
        for name, (a, _) in pairs(made[1]).items():
            pairs(small[1])[name][0].copy_(a[:4])
    run, losses = train(made, DiffoRAConfig(selection_ratio=0.5, **CONFIG), CHOICE)
    tiny, model, optimizer = small
    for expected in losses:
        loss = loss_of(model, tiny.batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        assert loss.item() == pytest.approx(expected, abs=2e-5)
    for name, (a, b) in pairs(made[1]).items():
        fewer = pairs(model)[name]
        torch.testing.assert_close(a[:4], fewer[0], atol=1e-3, rtol=1e-3)
        torch.testing.assert_close(b[:, :4], fewer[1], atol=1e-3, rtol=1e-3)
        assert not b[:, 4:].any()  # what takes no part has not moved
    assert run.selection is None and set(run.search.ranks) != {4}  # the choice is made and has begun to act


def test_half_of_the_ranks_can_be_favoured() -> None:
    """In each layer, or of the model: what earns its place when half of the others are missing."""
    rows, costs = [0, 0, 0, 0, 1, 1, 1, 1], (10, 10, 10, 10, 30, 30, 10, 10)
    scores = torch.randn(8, generator=torch.Generator().manual_seed(0))
    for groups, limits in (((0, 0, 0, 0, 1, 1, 1, 1), (160, 320)), ((0,) * 8, (480,))):
        plan = ModulePlan(RankBudget(groups, costs, (8,) * 8, limits))
        assert plan.start == (4,) * 8
        favoured = plan.matrix_budget(rows).discretize(scores)
        if len(limits) == 2:
            assert favoured.view(2, 4).sum(dim=1).tolist() == [2, 2]
            continue
        used = torch.tensor(costs) * 4
        left = 240 - int(used[favoured].sum())
        assert 0 <= left < int(used[~favoured].min())  # none of the others fits


@pytest.mark.parametrize("cap", [3000, 600])  # in ranks, and in whole modules, for want of room for rank 1 in each
def test_a_budget_is_made_once(cap: int, monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    monkeypatch.setattr(rank_rules, "RankBudget", lambda *args: made.append(RankBudget(*args)) or made[-1])
    run, _ = train(make(), DiffoRAConfig(max_trainable_parameters=cap, arch_warmup=4, discretize_at=PRUNE), steps=1)
    assert (run.search.rank_plan is None) == (cap == 600)
    assert len(made) == 1


@pytest.mark.parametrize("use_rslora", [False, True])
def test_the_budget_is_used_up_and_the_saved_adapter_is_a_plain_one(use_rslora: bool, tmp_path: Path) -> None:
    made = make(use_rslora=use_rslora)
    tiny, model, optimizer = made
    every = sum(p.numel() for p in model.parameters() if p.requires_grad)
    before = base_weights(model)
    run, losses = train(
        made, DiffoRAConfig(max_trainable_parameters=every // 3, **{**CONFIG, "selection_granularity": "auto"})
    )
    selection = run.selection
    assert selection is not None and selection.in_ranks and losses[-1] < losses[0]
    left = [p for p in model.parameters() if p.requires_grad]
    assert sum(p.numel() for p in left) == selection.trainable_parameters <= every // 3
    assert every // 3 - selection.trainable_parameters < max(site.cost for site in selection.grid.sites)
    assert len(set(selection.ranks)) > 1 and "of rank 1 to" in selection.summary()
    assert run.metrics()["diffora/gap"] == pytest.approx(0, abs=1e-5)  # what goes has faded out
    assert "number: rank that is kept" in selection.table()
    assert [p.shape for group in optimizer.param_groups for p in group["params"]] == [p.shape for p in left]
    assert all(optimizer.state[p]["exp_avg"].shape == p.shape for p in left)
    assert all(value.equal(before[name]) for name, value in base_weights(model).items())

    model.eval()
    expected = logits(model, tiny)
    model.save_pretrained(str(tmp_path))
    reloaded = PeftModel.from_pretrained(llama().model, str(tmp_path)).eval()
    torch.testing.assert_close(logits(reloaded, tiny), expected, atol=1e-6, rtol=1e-6)
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    assert saved["rank_pattern"].keys() == saved["alpha_pattern"].keys()
    layers: Any = list(find_sites(reloaded, "default").values())
    assert {site.name: site.rank for site in layers} == dict(zip(selection.modules, selection.ranks, strict=True))
    assert len({round(site.layer.scaling["default"], 9) for site in layers}) == 1
    merged = reloaded.merge_and_unload()
    torch.testing.assert_close(merged(**tiny.batch).logits, expected, atol=1e-4, rtol=1e-4)


def test_ranks_that_move_without_fading_out_are_measured() -> None:
    options = {**CONFIG, "selection_granularity": "auto", "fade_out": 0}
    run, _ = train(make(), DiffoRAConfig(max_trainable_parameters=3000, **options))
    assert run.selection is not None and len(set(run.selection.ranks)) > 2
    assert abs(run.metrics()["diffora/gap"]) > 1e-6


def test_components_keep_weights_and_moments() -> None:
    made = make()
    run, _ = train(made, DiffoRAConfig(selection_ratio=0.5, **CONFIG), PRUNE - 1)
    tiny, model, optimizer = made
    before = {name: [p.detach().clone() for p in pair] for name, pair in pairs(model).items()}
    moments = {name: optimizer.state[pair[0]]["exp_avg_sq"].clone() for name, pair in pairs(model).items()}
    full = logits(model.eval(), tiny)
    run.after_step()  # prunes, without a step of the optimizer
    assert run.selection is not None
    for (name, (a, b)), rank in zip(pairs(model).items(), run.selection.ranks, strict=True):
        assert a.equal(before[name][0][:rank]) and b.equal(before[name][1][:, :rank])
        assert optimizer.state[a]["exp_avg_sq"].equal(moments[name][:rank])
    torch.testing.assert_close(logits(model, tiny), full, atol=1e-5, rtol=1e-5)


LATE, LAST = 20, 26
OPENING: dict[str, Any] = {"arch_warmup": 4, "discretize_at": LATE, "method_options": {"arch_every": 1}}


def before_a_late_choice(evident: bool = True, amsgrad: bool = False, **options: Any) -> Any:
    """A run one step before its choice, whose optimizer remembers no gradient, only their squares."""
    tiny, model, _ = make()
    weights = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=1e-3, betas=(0.0, 0.9999), weight_decay=0.0, amsgrad=amsgrad)
    config = DiffoRAConfig(max_trainable_parameters=3000, **{**OPENING, **options})
    run = SelectionRun(model, optimizer, config, loss_of, [tiny.batch] * 4, total_steps=LAST)
    advance(tiny, run, run.schedule.discretize - 1)
    if not evident:
        run.search.halves.sums.zero_()
    return tiny, run


def advance(tiny: TinyModel, run: SelectionRun, until: int) -> None:
    while run.step < until:
        run.before_step()
        loss_of(run.model, tiny.batch).backward()
        run.optimizer.step()
        run.optimizer.zero_grad()
        run.after_step()


@pytest.mark.parametrize("granularity", ["rank", "component"])
@pytest.mark.parametrize("fade_out", [3, 0])
def test_components_that_begin_at_the_choice_train_at_the_learning_rate(granularity: str, fade_out: int) -> None:
    tiny, run = before_a_late_choice(selection_granularity=granularity, fade_out=fade_out, amsgrad=fade_out == 0)
    search = run.search
    start = search.rank_plan.start
    advance(tiny, run, run.schedule.discretize)
    ends = run.selection.kept_components if fade_out == 0 else [range(rank) for rank in search.ranks]
    if granularity == "component" and fade_out:
        ends = search.components.indices(search.kept, search.ranks)
    begun = {site.name: [p.detach().clone() for p in site.parameters] for site in search.adapters.sites}
    advance(tiny, run, run.step + 1)
    new, old = [], []
    for site, own, first in zip(search.adapters.sites, ends, start, strict=True):
        places = range(len(own)) if fade_out == 0 else own  # what is pruned has moved up
        moves = (site.parameters[1].detach() - begun[site.name][1]).abs().mean(dim=0) / 1e-3
        for place, index in zip(places, own, strict=True):
            (new if index >= first else old).append(float(moves[place]))
    assert len(new) > 3 and max(old) < 2
    assert 0.01 < sum(new) / len(new) < 2


@pytest.mark.parametrize("fade_out", [3, 0])
def test_where_no_rank_moves_no_moment_is_touched(fade_out: int) -> None:
    tiny, run = before_a_late_choice(evident=False, selection_granularity="rank", fade_out=fade_out)
    names = {parameter: name for name, parameter in run.model.named_parameters()}
    run.before_step()
    before = {names[p]: {n: v.clone() for n, v in state.items()} for p, state in run.optimizer.state.items()}
    ranks = run.search.ranks
    run.after_step()
    assert run.step == run.schedule.discretize and run.search.ranks == ranks
    after = {name: run.optimizer.state[p] for name, p in run.model.named_parameters() if p.requires_grad}
    assert after.keys() == before.keys()
    rank_of = dict(zip(run.search.grid.names, ranks, strict=True))
    for name, state in after.items():
        rank = rank_of[name.removeprefix("base_model.model.").partition(".lora_")[0]]
        for key, value in state.items():
            whole = before[name][key]
            if value.ndim and fade_out == 0:
                whole = whole[:rank] if "lora_A" in name else whole[:, :rank]
            assert value.equal(whole)


def test_without_evidence_no_module_is_favoured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gains are noise: the run is one of all linear layers at the rank that fits, and says so."""
    generator = torch.Generator().manual_seed(3)
    step = ArchitectureSearch.step

    def noisy(self: ArchitectureSearch, *args: Any) -> float | None:
        found = step(self, *args)
        self.halves.add(100 * torch.randn(len(self.grid), generator=generator))
        self.halves.add(100 * torch.randn(len(self.grid), generator=generator))
        return found

    monkeypatch.setattr(ArchitectureSearch, "step", noisy)
    run, _ = train(make(), DiffoRAConfig(selection_ratio=0.5, selection_scope="model", **CONFIG))
    assert run.selection is not None and max(run.selection.ranks) - min(run.selection.ranks) <= 1
    assert any("stays spread evenly over all of them" in note for note in run.selection.notes)
    assert run.selection.confidence is not None and run.selection.confidence < 0.5
    # Nothing has changed that a loss before and after could be compared for.
    metrics = run.metrics()
    assert "diffora/confidence" in metrics and "diffora/gap" not in metrics


def test_the_best_of_the_favoured_modules_gets_the_rank_that_is_left_over() -> None:
    plan = ModulePlan(RankBudget((0,) * 5, (10,) * 5, (8,) * 5, (150,)))
    assert plan.start == (3,) * 5
    method = FrankWolfe(plan.matrix_budget([0] * 5))
    method.step(-torch.tensor([1.0, 2.0, 0.0, 3.0, 0.0]))
    kept, ranks = plan.choose(method, True)
    assert kept.all() and ranks == (2, 4, 2, 5, 2)  # three units for two


def test_where_ranks_cannot_be_given_modules_are_chosen_or_the_reason_is_told() -> None:
    def search(model: PeftModel, **options: Any) -> ArchitectureSearch:
        return ArchitectureSearch(model, DiffoRAConfig(**options), loss_fn=loss_of)

    cap: dict[str, Any] = {"max_trainable_parameters": 2000}
    for model, options, reason in (
        (make()[1], {"method": "snip"}, "`method='snip'` keeps or prunes whole modules"),
        (make()[1], {"max_step_time": 0.9}, "does not combine with `max_step_time=0.9`"),
    ):
        assert search(model, **cap, **options).rank_plan is None
        with pytest.raises(ValueError, match=f"'rank'`, but.*{reason}.*'module'"):
            search(model, **cap, **options, selection_granularity="rank")
    model = make()[1]
    assert search(model, **cap).rank_plan is not None
    assert search(model, **cap, selection_granularity="module").rank_plan is None
    assert search(model).rank_plan is None  # a share of the modules
    assert search(model, max_trainable_parameters=10**9).rank_plan is None  # nothing to choose
    assert search(model, max_trainable_parameters=500).rank_plan is None  # not even rank 1 in every module
    with pytest.raises(ValueError, match="no room for rank 1 in every module"):
        search(model, max_trainable_parameters=500, selection_granularity="rank")


@pytest.mark.parametrize(
    ("made_with", "options", "reason"),
    [
        ({}, {"max_trainable_parameters": 500}, "the budget has no room for rank 1 in every module"),
        ({}, {"max_trainable_parameters": 2000, "method": "snip"}, "`method='snip'` keeps or prunes whole modules"),
        ({"use_dora": True}, {"max_trainable_parameters": 4000}, "cannot be given another rank"),
        ({}, {"max_trainable_parameters": 9000, "method": "adalora", "selection_unit": "layer"}, "selection_unit"),
        ({}, {"max_trainable_parameters": 2000}, None),
        ({}, {"max_trainable_parameters": 2000, "method": "adalora"}, None),
        ({}, {"max_trainable_parameters": 2000, "selection_granularity": "module"}, None),  # as was asked for
        ({}, {"selection_ratio": 0.5}, None),
    ],
)
def test_the_log_says_why_a_cap_drops_modules(
    made_with: dict[str, Any], options: dict[str, Any], reason: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, logger="diffora_trainer"):
        train(make(**made_with), DiffoRAConfig(discretize_at=20, **options), steps=1)
    assert ("The cap keeps or prunes whole modules" in caplog.text) == (reason is not None)
    assert reason is None or reason in caplog.text


def test_an_adapter_that_was_trained_before_keeps_its_ranks(caplog: pytest.LogCaptureFixture) -> None:
    config = DiffoRAConfig(max_trainable_parameters=4000, **{**CONFIG, "selection_granularity": "auto"})
    made = make()
    randomize(made[1])
    with caplog.at_level(logging.INFO, logger="diffora_trainer"):
        begun, _ = train(made, config, steps=CHOICE)
    assert "whole modules, not ranks: the adapter of 'model.layers.0" in caplog.text
    resumed = copy.deepcopy(made)
    run, _ = train(resumed, config, steps=0)
    run.load_state_dict(begun.state_dict())
    for continued in (begun, run):
        for _ in range(PRUNE - CHOICE):
            continued.before_step()
            continued.after_step()
        selection = continued.selection
        assert selection is not None and not selection.in_ranks and selection.dropped
        assert [note for note in selection.notes if "trained before" in note and "whole modules" in note]
    again = make()
    randomize(again[1])
    with pytest.raises(ValueError, match="'rank'`, but the adapter of 'model.layers.0.*' was trained before"):
        train(again, DiffoRAConfig(max_trainable_parameters=4000, **CONFIG))


@pytest.mark.parametrize("granularity", ["rank", "component"])
def test_a_method_that_compares_layers_has_one_budget_for_all_of_them(granularity: str) -> None:
    _, model, _ = make()
    options: dict[str, Any] = {"method": "gain", "selection_granularity": granularity, "selection_ratio": 0.5}
    for compares, groups in ((False, {0, 1}), (True, {0})):
        with gain_relaxation(trains_open=True, spends_ranks=True, compares_layers=compares):
            plan = ArchitectureSearch(model, DiffoRAConfig(**options), loss_fn=loss_of).rank_plan
            assert plan is not None and set(plan.budget.groups) == groups and len(plan.budget.limits) == len(groups)
