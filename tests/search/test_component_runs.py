"""Runs that choose among the single components of LoRA modules."""

from __future__ import annotations

import copy
import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

from diffora_trainer import DiffoRAConfig, Selection, SelectionRun
from diffora_trainer.adapters.base import find_sites
from diffora_trainer.adapters.grid import AdapterGrid
from diffora_trainer.adapters.pruning import apply_selection
from diffora_trainer.core.ranks import RankBudget
from diffora_trainer.methods.frank_wolfe import FrankWolfe
from diffora_trainer.search.rank_plan import ComponentPlan
from diffora_trainer.search.search import ArchitectureSearch
from helpers.adapted import logits, randomize
from helpers.models import llama
from helpers.searches import gradients_of, pairs


STEPS, CHOICE, PRUNE, RANK = 32, 14, 16, 8


def loss_of(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    return model(**batch).loss


def config(growth: float = 0.25, margin: float = 1.5, **options: Any) -> DiffoRAConfig:
    return DiffoRAConfig(
        **{
            "selection_granularity": "component",
            "max_trainable_parameters": 2700,
            "arch_warmup": 4,
            "discretize_at": PRUNE,
            "fade_out": PRUNE - CHOICE,
            "method_options": {"arch_every": 1, "rank_growth": growth, "rank_margin": margin},
            **options,
        }
    )


class Loop:
    """A tiny Llama, its optimizer and its run, trained step by step."""

    def __init__(self, options: DiffoRAConfig, **lora: Any) -> None:
        self.tiny = llama()
        torch.manual_seed(1)
        settings = {"r": RANK, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **lora}
        self.model: Any = get_peft_model(self.tiny.model, LoraConfig(**settings))
        self.optimizer = torch.optim.AdamW([p for p in self.model.parameters() if p.requires_grad], lr=0.01)
        batches = [{key: value[[i, i + 1]] for key, value in self.tiny.batch.items()} for i in range(3)]
        self.run = SelectionRun(self.model, self.optimizer, options, loss_of, batches, total_steps=STEPS)

    def step(self) -> float:
        self.run.before_step()
        loss = loss_of(self.model, self.tiny.batch)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.run.after_step()
        return loss.item()

    def train(self, until: int) -> Loop:
        while self.run.step < until:
            self.step()
        return self

    @property
    def logits(self) -> Tensor:
        training = self.model.training
        found = logits(self.model.eval(), self.tiny)
        self.model.train(training)
        return found

    @property
    def pairs(self) -> dict[str, tuple[nn.Parameter, nn.Parameter]]:
        found = AdapterGrid.from_model(self.model).sites
        return {site.name: (site.parameters[0], site.parameters[1]) for site in found}


def test_each_component_has_the_gradient_of_its_gate_in_the_loss() -> None:
    loop = Loop(config())
    search = loop.run.search
    loop.train(8)
    expected: list[Tensor] = []
    seen, step = gradients_of(search), search.step
    batch: Any = next(iter(loop.run.held_out.sample(1)))

    def checked(held_out: Any, *arguments: Any) -> Any:
        """`lora_B` times the gates, column by column, in a copy without gates."""
        model = copy.deepcopy(loop.model).eval()
        for site in AdapterGrid.from_model(model).sites:
            site.gated._forward_hooks.clear()
        gates = [
            nn.functional.pad(own, (0, RANK - len(own)))  # what takes no part
            for own in search.method.search_gates().split(list(search.ranks))
        ]
        gates = [own.detach().requires_grad_() for own in gates]
        weights = {
            f"base_model.model.{name}.lora_B.default.weight": b.detach() * gate
            for (name, (_, b)), gate in zip(loop.pairs.items(), gates, strict=True)
        }
        loss = torch.func.functional_call(model, weights, kwargs=dict(held_out)).loss
        found = torch.autograd.grad(loss, gates)
        expected.append(torch.cat([own[:rank] for own, rank in zip(found, search.ranks, strict=True)]))
        return step(held_out, *arguments)

    checked(batch)
    assert len(set(search.ranks)) > 1 and len(seen[0]) == sum(search.ranks) == len(search.method.budget)
    torch.testing.assert_close(seen[0], expected[0], rtol=1e-4, atol=1e-7)
    assert len(set(seen[0].tolist())) == len(seen[0])  # components of one module have gradients of their own


@pytest.mark.parametrize(("growth", "margin", "use_rslora"), [(0.0, 1.5, False), (0.25, 1.0, True), (0.3, 1.5, False)])
def test_what_stays_keeps_weights_and_moments_and_is_a_plain_adapter(
    growth: float, margin: float, use_rslora: bool, tmp_path: Path
) -> None:
    loop = Loop(config(growth, margin), use_rslora=use_rslora).train(PRUNE - 1)
    search = loop.run.search
    loop.step()  # a last one under gates that have almost faded out
    selection = loop.run.selection
    assert selection is not None
    again = Loop(config(growth, margin), use_rslora=use_rslora).train(PRUNE - 1)
    again.run.before_step()
    loss_of(again.model, again.tiny.batch).backward()
    again.optimizer.step()
    again.optimizer.zero_grad()
    again.run.search.fade_out(1.0)  # the model as it is faded, before anything is pruned
    torch.testing.assert_close(loop.logits, again.logits, rtol=1e-5, atol=1e-5)
    whole = again.pairs
    assert selection.components and selection.components == selection.kept_components
    for name, rank, kept in zip(selection.modules, selection.ranks, selection.components, strict=True):
        if not rank:
            assert name not in loop.pairs
            continue
        for own, before, dim in zip(loop.pairs[name], whole[name], (0, 1), strict=True):
            assert own.shape[dim] == rank
            assert own.equal(before.index_select(dim, torch.tensor(kept)))
            for moment in ("exp_avg", "exp_avg_sq"):
                expected = again.optimizer.state[before][moment].index_select(dim, torch.tensor(kept))
                assert loop.optimizer.state[own][moment].equal(expected)
    left = [p for p in loop.model.parameters() if p.requires_grad]
    assert sum(p.numel() for p in left) == selection.trainable_parameters <= 2700
    assert [id(p) for group in loop.optimizer.param_groups for p in group["params"]] == list(map(id, left))
    costs = [site.cost for site in selection.grid.sites]
    fresh = [rank for rank, start in zip(selection.ranks, search.rank_plan.start, strict=True) if start < RANK]
    assert 2700 - selection.trainable_parameters < min(costs) and fresh
    assert bool(growth) == any(
        max(kept, default=0) >= start for kept, start in zip(selection.components, search.rank_plan.start, strict=True)
    )

    loop.train(STEPS)
    loop.model.save_pretrained(str(tmp_path))
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    assert saved["rank_pattern"] and saved["rank_pattern"].keys() == saved["alpha_pattern"].keys()
    reloaded = PeftModel.from_pretrained(llama().model, str(tmp_path)).eval()
    assert logits(reloaded, loop.tiny).equal(loop.logits)
    layers: Any = list(find_sites(reloaded, "default").values())
    assert {site.name: site.rank for site in layers} == {n: len(a) for n, (a, _) in loop.pairs.items()}
    assert len({round(site.layer.scaling["default"], 9) for site in layers}) == 1


def test_growth_leaves_the_function_as_it_is_and_then_learns() -> None:
    loop = Loop(config(0.3)).train(CHOICE - 1)
    search, plan = loop.run.search, loop.run.search.rank_plan
    assert plan is not None and plan.components is not None
    before = loop.logits
    kept = search.discretize()
    assert loop.logits.equal(before)
    search.fade_out(1.0)
    assert not loop.logits.equal(before)  # those that go are gone, the new ones are there
    ends = dict(zip(loop.pairs, plan.components.indices(kept, search.ranks), strict=True))
    starts = dict(zip(loop.pairs, plan.start, strict=True))
    new = [(name, index) for name, own in ends.items() for index in own if index >= starts[name]]
    assert new and all(not loop.pairs[name][1][:, index].any() for name, index in new)
    weights = {name: b.detach().clone() for name, (_, b) in loop.pairs.items()}
    loss_of(loop.model, loop.tiny.batch).backward()
    for name, (_, b) in loop.pairs.items():
        assert b.grad is not None
        learning = set(b.grad.any(dim=0).nonzero().flatten().tolist())
        assert learning == set(ends[name])  # nothing else takes part
    loop.optimizer.step()
    assert all(not loop.pairs[name][1][:, index].equal(weights[name][:, index]) for name, index in new)


@pytest.mark.parametrize("at", [9, CHOICE + 1, PRUNE + 4], ids=["search", "fade-out", "selected"])
def test_a_resumed_loop_is_the_uninterrupted_one(at: int) -> None:
    whole = Loop(config(0.2)).train(at)
    state = json.loads(json.dumps({"run": whole.run.state().to_dict()}))["run"], whole.run.state_dict()["method"]
    weights, moments = copy.deepcopy(whole.model.state_dict()), copy.deepcopy(whole.optimizer.state_dict())
    again = Loop(config(0.2))
    again.run.load_state_dict({"run": state[0], "method": state[1]})
    again.model.load_state_dict(weights)
    again.optimizer.load_state_dict(moments)
    losses = [[loop.step() for _ in range(at, STEPS)] for loop in (whole, again)]
    assert losses[0] == losses[1] and whole.run.selection == again.run.selection
    assert all(a.equal(b) for a, b in zip(whole.model.parameters(), again.model.parameters(), strict=True))
    other = Loop(config(0.2, method_options={"arch_every": 1, "rank_growth": 0.2, "rank_margin": 2.0}))
    if at < PRUNE:
        with pytest.raises(ValueError, match=r"`method_options\['rank_margin'\]` saved: 1.5, now: 2.0"):
            other.run.load_state_dict({"run": state[0], "method": state[1]})


def test_a_saved_selection_is_carried_out_on_another_model_of_the_same_modules(tmp_path: Path) -> None:
    loop = Loop(config(0.0)).train(PRUNE)
    selection = loop.run.selection
    assert selection is not None
    selection.save(tmp_path)
    read = Selection.load(tmp_path)
    assert read == selection and json.loads(read.to_json())["format"] == 3
    other = Loop(config())
    randomize(other.model)
    whole = {name: a.detach().clone() for name, (a, _) in other.pairs.items()}
    apply_selection(other.model, read)
    kept = dict(zip(read.modules, read.components, strict=True))
    assert all(a.equal(whole[name][list(kept[name])]) for name, (a, _) in other.pairs.items())

    first = dataclasses.replace(selection, components=())
    assert json.loads(first.to_json())["format"] == 2 and Selection.from_json(first.to_json()) == first
    assert first.kept_components == tuple(tuple(range(rank)) for rank in first.ranks)
    for wrong in ((RANK,), (1, 1), (-1,), (1, 0)):
        with pytest.raises(ValueError, match="leaves 'model.layers.0.*the components"):
            dataclasses.replace(selection, components=(wrong, *selection.components[1:]))


def test_without_evidence_each_module_keeps_the_best_of_its_part_of_the_even_spread(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("diffora_trainer.search.confidence.Confidence.beyond_chance", False)
    loop = Loop(config(0.3)).train(PRUNE)
    selection, plan = loop.run.selection, loop.run.search.rank_plan
    assert selection is not None and plan is not None and selection.ranks == plan.even == plan.budget.start()
    assert selection.components  # the best ones, and not the first ones
    assert any("stays spread evenly over all of them" in note for note in selection.notes)


def test_of_equal_worth_the_cheaper_module_grows_first() -> None:
    plan = ComponentPlan(RankBudget((0, 0), (30, 10), (8, 8), (100,)), margin=1.0, growth=0.3)
    assert plan.start == (2, 4)
    method = FrankWolfe(plan.matrix_budget([0, 0]))
    method.step(-torch.ones(6))  # 40 for the four of the cheap module and 30 for one of the other are kept
    kept, ranks = plan.choose(method, True)
    assert plan.components.count(kept) == (1, 4) and ranks == (1, 7)


@st.composite
def plans(draw: st.DrawFn) -> tuple[ComponentPlan, list[float]]:
    count = draw(st.integers(1, 8))
    groups = [0, *draw(st.lists(st.integers(0, 2), min_size=count - 1, max_size=count - 1))]
    present = sorted(set(groups))
    costs = draw(st.lists(st.integers(1, 50), min_size=count, max_size=count))
    ranks = draw(st.lists(st.integers(1, 8), min_size=count, max_size=count))
    limits = draw(st.lists(st.integers(50, 1000), min_size=len(present), max_size=len(present)))
    budget = RankBudget(tuple(map(present.index, groups)), tuple(costs), tuple(ranks), tuple(limits))
    plan = ComponentPlan(budget, draw(st.floats(1, 3)), draw(st.floats(0, 0.9)))
    numbers = st.floats(-1, 1, width=32)
    return plan, draw(st.lists(numbers, min_size=len(plan.components), max_size=len(plan.components)))


@settings(deadline=None)
@given(plans(), st.booleans())
def test_a_budget_is_used_up_and_never_more(made: tuple[ComponentPlan, list[float]], evident: bool) -> None:
    plan, gradient = made
    budget = plan.budget
    method = FrankWolfe(plan.matrix_budget([0] * len(budget.costs)))
    method.step(torch.tensor(gradient))
    kept, ranks = plan.choose(method, evident)
    assert budget.fits(ranks)
    own = plan.components.count(kept)
    for index, (rank, chosen, start) in enumerate(zip(ranks, own, plan.start, strict=True)):
        assert chosen <= rank <= chosen + budget.ranks[index] - start  # those that stay, and those that can be new
        more = [*ranks[:index], rank + 1, *ranks[index + 1 :]]
        assert not evident or rank == budget.ranks[index] or not budget.fits(more)
    kept_again = plan.components.indices(kept, ranks)
    assert [len(indices) for indices in kept_again] == list(ranks)
    assert all(max(found, default=0) < most for found, most in zip(kept_again, budget.ranks, strict=True))


@pytest.mark.parametrize("margin", [1.0, 2.0])
@pytest.mark.parametrize("cap", [4096, 7372])  # a half of all parameters, and nine tenths
def test_what_new_components_cannot_use_of_a_budget_goes_to_those_that_were_there(cap: int, margin: float) -> None:
    search = Loop(config(margin=margin, max_trainable_parameters=cap)).run.search
    plan, method, costs = search.rank_plan, search.method, [site.cost for site in search.grid.sites]
    assert plan is not None and isinstance(method, FrankWolfe)
    method.step(torch.linspace(-1, 1, len(method.budget)))
    _, ranks = plan.choose(method, True)
    assert 0 <= cap - sum(rank * cost for rank, cost in zip(ranks, costs, strict=True)) < min(costs)
    # A quarter of the budget is to grow, or all that is not there yet.
    new = sum((RANK - start) * cost for start, cost in zip(plan.start, costs, strict=True))
    assert method.budget.targets.tolist() == [max(int(0.75 * cap), cap - new)]


def test_where_components_cannot_be_chosen_the_reason_is_told() -> None:
    def search(model: PeftModel, **options: Any) -> ArchitectureSearch:
        return ArchitectureSearch(model, config(**{"method_options": None, **options}), loss_fn=loss_of)

    model = Loop(config()).model
    for options, reason in (
        ({"method": "snip"}, "`method='snip'` scores whole modules"),
        ({"method": "sigmoid"}, "`method='sigmoid'` trains the weights under its gates"),
        ({"max_step_time": 0.9}, "does not combine with `max_step_time=0.9`"),
        ({"selection_unit": "layer"}, "does not combine with `selection_unit='layer'`"),
    ):
        with pytest.raises(ValueError, match=f"'component'`, but.*{reason}.*'module'"):
            search(model, **options)
    for method_options, message in (
        ({"rank_margin": 0.5}, "`rank_margin=0.5`.*1 or more"),
        ({"rank_growth": 1.0}, "`rank_growth=1.0`.*something has to be left"),
        ({"rank_growth": 0}, "`rank_growth=0`.*there is nothing to choose"),
        ({"rank_margin": "2"}, "`rank_margin` must be a number"),
    ):
        with pytest.raises((ValueError, TypeError), match=message):
            search(model, method_options=method_options)
    # Less than rank 1 in every module is no obstacle: some modules go.
    assert len(pairs(model)) == 14 and set(search(model, max_trainable_parameters=500).ranks) == {1}
    trained = Loop(config())
    randomize(trained.model)
    with pytest.raises(ValueError, match="'component'`, but the adapter of 'model.layers.0.*' was trained before"):
        trained.step()
    with pytest.raises(ValueError, match="or its `lora_B` does not start at zero.*`init_lora_weights`"):
        Loop(config(), init_lora_weights="orthogonal").step()
    every = Loop(config(method_options={"arch_every": 1, "rank_margin": 4.0}))
    randomize(every.model)
    selection = every.train(PRUNE).run.selection  # it begins with all of its components
    assert selection is not None and selection.trainable_parameters <= 2700
