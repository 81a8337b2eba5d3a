"""What an optimizer holds of weights follows gates that are folded into them, and components that begin."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from diffora_trainer import DiffoRAConfig, SelectionRun
from diffora_trainer.adapters.grid import AdapterGrid
from diffora_trainer.adapters.moments import rescale_moments, start_moments
from helpers.models import llama
from helpers.searches import model_loss
from helpers.tiny_model import TinyModel


def test_moments_in_a_form_of_their_own_are_left_alone() -> None:
    weight = nn.Parameter(torch.zeros(3, 4))

    def begun(**state: Any) -> dict[str, Any]:
        optimizer = torch.optim.SGD([weight], lr=0.1)
        optimizer.state[weight] = state
        start_moments(weight, 1, [2, 3], [0, 1], optimizer)
        return optimizer.state[weight]

    squares = torch.tensor([[1.0, 3.0, 0.0, 0.0], [2.0, 2.0, 0.0, 0.5], [0.0, 4.0, 0.0, 0.0]])
    expected = squares.clone()
    expected[:, 2] = torch.tensor([2.0, 2.0, 2.0])  # what has a moment keeps it
    for dtype in (torch.float32, torch.bfloat16):
        state = begun(exp_avg=torch.zeros(3, 4), exp_avg_sq=squares.to(dtype), step=torch.tensor(9.0))
        assert state["exp_avg_sq"].equal(expected.to(dtype)) and not state["exp_avg"].any()
    assert begun(square_avg=squares.clone())["square_avg"].equal(squares)
    assert begun(exp_avg_sq=squares.char())["exp_avg_sq"].equal(squares.char())
    assert begun(exp_avg_sq=squares[0].clone())["exp_avg_sq"].equal(squares[0])
    assert begun(exp_avg_sq=nn.Parameter(squares.clone()))["exp_avg_sq"].equal(squares)
    assert begun() == {}
    # bitsandbytes: where its state is quantized, it begins anew.
    assert begun(state1=torch.zeros(3, 4), state2=squares.clone(), step=9)["state2"].equal(expected)
    assert begun(state1=squares.byte(), state2=squares.byte(), qmap2=torch.zeros(256), step=9) == {}
    assert begun(state1=squares.clone(), step=9)["state1"].equal(squares)


def test_moments_behind_gates_that_are_folded() -> None:
    weight = nn.Parameter(torch.zeros(2, 3))

    def rescaled(factors: Any, **state: Any) -> dict[str, Any]:
        optimizer = torch.optim.SGD([weight], lr=0.1)
        optimizer.state[weight] = state
        rescale_moments(weight, torch.as_tensor(factors), optimizer)
        return optimizer.state[weight]

    means, squares = torch.tensor([[1.0, 2.0, 3.0], [0.0, 1.0, 1.0]]), torch.full((2, 3), 4.0)
    for dtype in (torch.float32, torch.bfloat16):
        state = rescaled(
            [[0.5, -2.0, 0.0]], exp_avg=means.to(dtype, copy=True), exp_avg_sq=squares.to(dtype, copy=True), step=9
        )
        assert state["exp_avg"].equal(torch.tensor([[2.0, -1.0, 0.0], [0.0, -0.5, 0.0]], dtype=dtype))
        # Behind a gate of 0 nothing was learned: what is there begins with steps of the usual size.
        assert state["exp_avg_sq"].equal(torch.tensor([[16.0, 1.0, 8.5]] * 2, dtype=dtype)) and state["step"] == 9
    assert rescaled(0.5, exp_avg=means.clone(), exp_avg_sq=squares.clone())["exp_avg"].equal(2 * means)
    assert rescaled(1e-30, exp_avg=means.clone(), exp_avg_sq=squares.clone()) == {}
    assert rescaled(0.5, exp_avg=means.clone())["exp_avg"].equal(means)
    assert rescaled(0.5, momentum_buffer=means.clone())["momentum_buffer"].equal(means)
    assert rescaled(0.5, exp_avg=means.clone(), exp_avg_sq=squares[0])["exp_avg"].equal(means)
    assert rescaled(0.5, exp_avg=means.char(), exp_avg_sq=squares.char())["exp_avg"].equal(means.char())
    assert rescaled(0.5) == {}
    state = rescaled(0.5, state1=means.clone(), state2=squares.clone(), step=9)  # bitsandbytes
    assert state["state1"].equal(2 * means) and state["state2"].equal(4 * squares) and state["step"] == 9
    assert rescaled(0.5, state1=means.byte(), state2=squares.byte(), qmap2=torch.zeros(256), step=9) == {}
    assert rescaled(0.5, state1=means.clone(), step=9)["state1"].equal(means)


def test_copies_of_a_weight_behind_gates_that_are_folded() -> None:
    weight = nn.Parameter(torch.ones(2, 3))

    def state_of(**state: Any) -> tuple[torch.optim.Optimizer, dict[str, Any]]:
        optimizer = torch.optim.SGD([weight], lr=0.1)
        optimizer.state[weight] = state
        return optimizer, state

    factors, squares = torch.tensor([[0.5, -2.0, 0.0]]), torch.full((2, 3), 4.0)
    optimizer, state = state_of(z=torch.full((2, 3), 3.0), exp_avg_sq=squares.clone())
    with torch.no_grad():
        weight.mul_(factors)
    rescale_moments(weight, factors, optimizer)
    # Behind the gate of 0 the copy begins with the weight.
    assert state["z"].equal(torch.tensor([[1.5, -6.0, 0.0]] * 2))
    assert state["exp_avg_sq"].equal(torch.tensor([[16.0, 1.0, 8.5]] * 2))
    optimizer, state = state_of(slow_buffer=torch.ones(2, 3))
    rescale_moments(weight, torch.tensor(0.5), optimizer)
    assert state["slow_buffer"].eq(0.5).all()
    # One of another form would bring the old values back.
    optimizer, _ = state_of(z=torch.ones(6), exp_avg_sq=squares.clone())
    rescale_moments(weight, torch.tensor(0.5), optimizer)
    assert not optimizer.state[weight]
    # Entries that begin behind a mask do so with a copy of what the weight is now.
    optimizer, state = state_of(z=torch.full((2, 3), 3.0), exp_avg_sq=torch.tensor([[4.0, 0.0, 2.0]] * 2))
    start_moments(weight, 1, [1, 2], [0], optimizer)
    assert state["z"].equal(torch.tensor([[3.0, -2.0, 3.0]] * 2))


def with_lora() -> tuple[TinyModel, Any]:
    tiny = llama()
    torch.manual_seed(1)
    return tiny, get_peft_model(tiny.model, LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM"))


def ups(model: nn.Module) -> dict[str, nn.Parameter]:
    """`lora_B` of each module."""
    return {site.name: site.parameters[1] for site in AdapterGrid.from_model(model).sites}


class ScheduleFree(torch.optim.Optimizer):
    """Schedule-free AdamW (https://huggingface.co/papers/2405.15682) at a constant rate: what is trained is `y`."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            group["k"] += 1
            for y in group["params"]:
                if y.grad is None:
                    continue
                state = self.state[y]
                if not state:
                    state.update(z=y.clone(), exp_avg_sq=torch.zeros_like(y))
                state["exp_avg_sq"].lerp_(y.grad.square(), 0.001)
                step = y.grad / ((state["exp_avg_sq"] / (1 - 0.999 ** group["k"])).sqrt() + 1e-8)
                y.lerp_(state["z"], 1 / group["k"]).sub_(step, alpha=group["lr"] * (1 - 0.9 * (1 - 1 / group["k"])))
                state["z"].sub_(step, alpha=group["lr"])


@pytest.mark.parametrize("method", ["sigmoid", "sora"])
def test_folded_gates_reach_both_iterates_of_a_schedule_free_optimizer(method: str) -> None:
    tiny, model = with_lora()
    optimizer = ScheduleFree([p for p in model.parameters() if p.requires_grad], {"lr": 0.01, "k": 0})
    config = DiffoRAConfig(method=method, selection_granularity="module", arch_warmup=1, discretize_at=6, fade_out=0)
    run = SelectionRun(model, optimizer, config, model_loss, [tiny.batch] * 4, total_steps=12)
    before: dict[str, tuple[Tensor, ...]] = {}
    while run.selection is None:
        run.before_step()
        model_loss(model, tiny.batch).backward()
        optimizer.step()
        optimizer.zero_grad()
        before = {
            name: (b.detach().clone(), *(optimizer.state[b][key].clone() for key in ("z", "exp_avg_sq")))
            for name, b in ups(model).items()
        }
        run.after_step()
    folded = 0
    for name in run.selection.selected:
        b, (weight, z, squares) = ups(model)[name], before[name]
        if b.shape != weight.shape:  # components of it were closed
            continue
        gates = (b * weight).sum(0) / weight.square().sum(0)
        torch.testing.assert_close(b.detach(), weight * gates)
        torch.testing.assert_close(optimizer.state[b]["z"], z * gates)
        torch.testing.assert_close(optimizer.state[b]["exp_avg_sq"], squares / gates.square())
        folded += bool((gates - 1).abs().max() > 0.01)
    assert folded


def test_components_that_are_replaced_are_so_in_both_iterates() -> None:
    tiny, model = with_lora()
    optimizer = ScheduleFree([p for p in model.parameters() if p.requires_grad], {"lr": 0.01, "k": 0})
    config = DiffoRAConfig(method="beamlora", discretize_at=9, fade_out=0, method_options={"beam_every": 2})
    run = SelectionRun(model, optimizer, config, model_loss, [tiny.batch] * 4, total_steps=12)
    replaced = 0
    for _ in range(8):
        run.before_step()
        model_loss(model, tiny.batch).backward()
        optimizer.step()
        optimizer.zero_grad()
        before = {p: (p.detach().clone(), state["z"].clone()) for p, state in optimizer.state.items()}
        run.after_step()
        for parameter, (weight, z) in before.items():
            written = parameter.detach() != weight
            assert optimizer.state[parameter]["z"].equal(torch.where(written, parameter.detach(), z))
            replaced += int(written.sum())
    assert replaced
