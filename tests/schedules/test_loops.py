"""Schedules of the factors in a training loop of one's own, with a search and without, also resumed."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from peft import get_peft_model

from diffora_trainer import AlternateFactors, ArchitectureSearch, ChainedLoRA, DiffoRAConfig, SelectionRun
from helpers.adapted import lora_layers
from helpers.checks import adapter, assert_same
from helpers.models import llama
from helpers.trainers import lora


CHOICE = 4


class Loop:
    """A loop with a schedule, that is asked before the run of the search or after it, whichever was written first."""

    def __init__(self, schedule: Any, searches: bool = True, schedule_first: bool = False, **options: Any) -> None:
        self.tiny, self.schedule, self.schedule_first, self.step, self.run = llama(), schedule, schedule_first, 0, None
        torch.manual_seed(7)
        self.model = get_peft_model(self.tiny.model, lora(r=2))
        self.optimizer = self._optimizer()
        if searches:
            config = DiffoRAConfig(**{"selection_ratio": 0.5, "discretize_at": CHOICE, **options})
            loss = lambda model, batch: model(**batch).loss  # noqa: E731
            self.run = SelectionRun(self.model, self.optimizer, config, loss, [self.tiny.batch], total_steps=12)

    def _optimizer(self) -> Any:
        return torch.optim.AdamW([p for p in self.model.parameters() if p.requires_grad], lr=0.02, weight_decay=0.0)

    def train(self, until: int) -> None:
        self.model.train()
        while self.step < until:
            if self.schedule_first:
                self.schedule.before_step(self.model, self.optimizer, self.step)
            if self.run is not None:
                self.run.before_step(self.tiny.batch)
            if not self.schedule_first:
                self.schedule.before_step(self.model, self.optimizer, self.step)
            self.model(**self.tiny.batch).loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            if self.run is not None:
                self.run.after_step()
            self.step += 1

    def checkpoint(self) -> Any:
        run = None if self.run is None else self.run.state_dict()
        return copy.deepcopy((run, self.model.state_dict(), self.optimizer.state_dict(), self.step))

    def resume(self, checkpoint: Any, optimizer_last: bool = False) -> None:
        run, weights, optimizer, self.step = checkpoint
        if self.run is not None:
            self.run.load_state_dict(run)
        self.schedule.attach(self.model)
        self.model.load_state_dict(weights)
        if optimizer_last:
            self.optimizer = self._optimizer()
        self.optimizer.load_state_dict(optimizer)


@pytest.mark.parametrize(("searches", "optimizer_last"), [(False, False), (False, True), (True, False)])
def test_a_chain_goes_on_where_its_checkpoint_was_taken(searches: bool, optimizer_last: bool) -> None:
    """Also with an optimizer that was made before the weights of more rounds were loaded."""
    whole = Loop(ChainedLoRA(every=3), searches)
    whole.train(8)
    checkpoint = whole.checkpoint()
    whole.train(12)
    resumed = Loop(ChainedLoRA(every=3), searches)
    resumed.resume(checkpoint, optimizer_last)
    resumed.train(12)
    assert_same(adapter(resumed.model), adapter(whole.model))
    ranks = [layer.r["default"] for layer in lora_layers(whole.model, "default").values()]
    assert min(ranks) > 2 and len(ranks) == (8 if searches else 14)


def test_a_chain_leaves_alone_what_a_choice_has_frozen() -> None:
    options = {"unselected": "freeze", "fade_out": 0}
    whole = Loop(ChainedLoRA(every=3), **options)
    whole.train(CHOICE)
    frozen, start = whole.run.selection.frozen, adapter(whole.model)
    whole.train(8)
    checkpoint = whole.checkpoint()
    whole.train(12)
    ranks = {name: layer.r["default"] for name, layer in lora_layers(whole.model, "default").items()}
    assert frozen and {name for name, rank in ranks.items() if rank == 2} == set(frozen)
    assert set(ranks.values()) == {2, 6}  # rounds begin at steps 6 and 9
    kept = {name: value for name, value in adapter(whole.model).items() if any(f".{one}." in name for one in frozen)}
    assert_same(kept, {name: start[name] for name in kept})
    resumed = Loop(ChainedLoRA(every=3), **options)
    resumed.resume(checkpoint)
    resumed.train(12)
    assert_same(adapter(resumed.model), adapter(whole.model))


def test_an_optimizer_without_the_rounds_is_refused() -> None:
    loop = Loop(ChainedLoRA(every=3), searches=False)
    name, layer = next(iter(lora_layers(loop.model, "default").items()))
    weight = layer.lora_B["default"].weight
    for group in loop.optimizer.param_groups:
        group["params"] = [parameter for parameter in group["params"] if parameter is not weight]
    with pytest.raises(ValueError, match="does not hold 1 of the 28 matrices of the rounds"):
        loop.train(1)


@pytest.mark.parametrize("method", ["diffora", "adalora"])
@pytest.mark.parametrize("schedule_first", [True, False])
@pytest.mark.parametrize("make", [lambda: AlternateFactors(every=3), lambda: ChainedLoRA(every=100, train_a=False)])
def test_a_schedule_waits_for_the_choice_in_any_order(make: Any, schedule_first: bool, method: str) -> None:
    loop = Loop(make(), schedule_first=schedule_first, method=method)
    start = adapter(loop.model)
    loop.train(CHOICE - 1)
    moved = {name for name, tensor in adapter(loop.model).items() if not torch.equal(tensor, start[name])}
    assert moved == set(start)  # both factors of all modules
    loop.train(CHOICE)
    chosen = adapter(loop.model)
    assert 0 < len(chosen) < len(start)
    loop.train(CHOICE + 1)  # step 4 is one of `lora_A` for the one, and of `lora_B` for the other
    moved = {name for name, tensor in adapter(loop.model).items() if not torch.equal(tensor, chosen[name])}
    wanted = "lora_A" if isinstance(loop.schedule, AlternateFactors) else "lora_B"
    assert moved == {name for name in chosen if wanted in name}


def test_modules_that_share_a_weight_are_not_searched_again() -> None:
    loop = Loop(AlternateFactors(every=100), weight_sharing="model")
    loop.train(CHOICE + 1)
    assert any(loop.run.selection.shared)
    loop.schedule.finish(loop.model)
    with pytest.raises(ValueError, match="share one weight, as after a search with `weight_sharing`"):
        ArchitectureSearch(loop.model, DiffoRAConfig(), loss_fn=lambda model, batch: model(**batch).loss)


def test_nothing_is_measured_under_gates_that_are_not_there() -> None:
    tiny = llama()
    model = get_peft_model(tiny.model, lora(r=2))
    search = ArchitectureSearch(model, DiffoRAConfig(), loss_fn=lambda model, batch: model(**batch).loss)
    with pytest.raises(ValueError, match=r"not on the model.*call its `begin\(\)` first"):
        search.measure_effect([tiny.batch])
    search.begin()
    search.measure_effect([tiny.batch])
    assert search.effect is not None
