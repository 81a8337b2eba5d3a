"""Methods that train gates beside the weights (SoRA, BeamLoRA), and what becomes of the gates at the choice."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from peft import get_peft_model
from torch import Tensor, nn

from diffora_trainer import SelectionRun, apply_selection
from diffora_trainer.adapters.grid import AdapterGrid
from diffora_trainer.search.runtime import Runtime
from helpers.checks import assert_same
from helpers.models import llama
from helpers.options import make_config
from helpers.searches import half_warm, make_search, make_steps, model_loss, pairs, warm
from helpers.trainers import lora


def train_gated(model: Any, batches: list[Any], steps: int, until: int, **options: Any) -> SelectionRun:
    """Some steps of SGD under a method that trains gates."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    ratio = options.pop("selection_ratio", 0.5)
    config = make_config(method=options.pop("method"), discretize_at=until, selection_ratio=ratio,
                         method_options=options)  # fmt: skip
    run = SelectionRun(model, optimizer, config, model_loss, batches, total_steps=until + 1)
    make_steps(run, model, batches, optimizer, steps)
    return run


@pytest.mark.parametrize("scale", [1.0, 64.0])
def test_sora_is_adam_with_a_soft_threshold_on_the_gradient_of_gates(scale: float) -> None:
    """Against gates that are parameters of the layers, in a loop with `torch.optim.Adam`."""
    rate, threshold, steps = 0.05, 0.01, 6
    tiny = llama()
    model, batches = warm(tiny)
    twin = copy.deepcopy(model)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    options = {"gate_learning_rate": rate, "threshold": threshold}
    config = make_config(method="sora", discretize_at=steps, selection_ratio=0.5, method_options=options)
    runtime = Runtime(loss_scale=lambda: scale)
    run = SelectionRun(model, optimizer, config, model_loss, batches, total_steps=steps + 1, runtime=runtime)
    for step in range(steps - 1):
        for part in (0, 1):  # gradients are accumulated
            run.before_step()
            (scale * model_loss(model, batches[(step + part) % 3]) / 2).backward()
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter.grad /= scale
        optimizer.step()
        optimizer.zero_grad()
        run.after_step()
    method = run.search.method

    weights = torch.optim.SGD([p for p in twin.parameters() if p.requires_grad], lr=0.1)
    names = run.search.grid.names
    layers = [twin.base_model.model.get_submodule(name).lora_A["default"] for name in names]
    gates = [nn.Parameter(torch.ones(layer.out_features)) for layer in layers]
    for layer, gate in zip(layers, gates, strict=True):
        layer.register_forward_hook(lambda module, args, output, gate=gate: output * gate)
    adam = torch.optim.Adam(gates, lr=rate)
    for step in range(steps - 1):
        for part in (0, 1):
            (model_loss(twin, batches[(step + part) % 3]) / 2).backward()
        weights.step()
        adam.step()
        weights.zero_grad()
        adam.zero_grad()
        with torch.no_grad():
            for gate in gates:
                gate.copy_(torch.where(gate.abs() < threshold, 0.0, gate - threshold * gate.sign()))
    for found, gate in zip(method.component_gates(), gates, strict=True):
        torch.testing.assert_close(found, gate.detach(), atol=2e-5, rtol=1e-4)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter, twin.get_parameter(name), atol=1e-5, rtol=1e-4)
    with torch.no_grad():
        torch.testing.assert_close(model(**tiny.batch).logits, twin(**tiny.batch).logits, atol=1e-5, rtol=1e-4)

    # A step whose loss was not finite moves no gate.
    run.before_step()
    (model_loss(model, batches[0]) * float("inf")).backward()
    optimizer.zero_grad()
    state = method.state_dict()
    run._trained.step(optimizer)  # type: ignore[union-attr]
    assert_same(method.state_dict(), state)
    assert run.search.skipped_steps == 1 and not any(leaf.grad is not None for leaf in run.search.gates._masks)

    # What they have come to is put into the weights.
    before = [gate.abs().clone() for gate in method.component_gates()]
    assert len({round(float(value), 6) for gate in before for value in gate}) > 20
    model.eval()
    expected = model(**tiny.batch).logits
    run.search.method.before_pruning(run.search.adapters.sites)
    run.search.gates.detach()
    torch.testing.assert_close(model(**tiny.batch).logits, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("sora", {"gate_learning_rate": 0.2, "threshold": 0.05}),
        ("beamlora", {"gate_learning_rate": 0.02, "beam_every": 100}),
    ],
)
def test_moments_follow_gates_into_the_weights(method: str, options: dict[str, Any]) -> None:
    """The steps after the choice are those of moments that are rescaled by hand."""
    model, batches = half_warm()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, amsgrad=True)
    config = make_config(method=method, discretize_at=8, selection_ratio=0.5, method_options=options)
    run = SelectionRun(model, optimizer, config, model_loss, batches, total_steps=9)
    make_steps(run, model, batches, optimizer, 7)
    before_pruning = run.search.method.before_pruning
    expected: dict[str, dict[str, Tensor]] = {}

    def note(sites: Any) -> None:
        gates = run.search.method.component_gates()
        assert min(float((own - 1).abs().max()) for own in gates) > 0.1
        for name, (_, b), own, kept in zip(
            run.search.grid.names, pairs(model), gates, run.search.method.kept_components(), strict=True
        ):
            state, left = optimizer.state[b], list(kept)
            assert own[left].abs().min() > 0 if left else True
            powers = {"exp_avg": 1, "exp_avg_sq": 2, "max_exp_avg_sq": 2}
            expected[name] = {key: (state[key] / own**power)[:, left] for key, power in powers.items()}
            expected[name] |= {"step": state["step"].clone(), "weight": (b.detach() * own)[:, left]}
        before_pruning(sites)

    run.search.method.before_pruning = note  # type: ignore[method-assign]
    make_steps(run, model, batches, optimizer, 1)
    assert run.selection is not None
    left = AdapterGrid.from_model(model).grid.names
    for name, (_, b) in zip(left, pairs(model), strict=True):
        for key, value in expected[name].items():
            torch.testing.assert_close(
                b.detach() if key == "weight" else optimizer.state[b][key], value, atol=0.0, rtol=1e-5
            )

    twins = {name: nn.Parameter(expected[name].pop("weight")) for name in left}
    by_hand = torch.optim.AdamW(twins.values(), lr=1e-2, amsgrad=True)
    for name, twin in twins.items():
        by_hand.state[twin] = expected[name]
    model_loss(model, batches[2]).backward()
    for name, (_, b) in zip(left, pairs(model), strict=True):
        assert b.grad is not None
        twins[name].grad = b.grad.clone()
    optimizer.step()
    by_hand.step()
    for name, (_, b) in zip(left, pairs(model), strict=True):
        torch.testing.assert_close(b.detach(), twins[name].detach(), atol=1e-6, rtol=1e-4)


def test_moments_follow_the_gates_of_a_search_into_the_weights() -> None:
    """In a loop of one's own, by `apply_selection`."""
    for method, fold in (("sigmoid", True), ("sigmoid", False), ("diffora", True)):
        model, batches = warm()
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
        search = make_search(model, method, selection_granularity="module", method_options={"fold_gates": fold})
        search.step(batches[0])
        search.draw_gates()
        model_loss(model, batches[1]).backward()
        optimizer.step()
        before = {b: {key: value.clone() for key, value in optimizer.state[b].items()} for _, b in pairs(model)}
        selection = search.finish()
        gates = dict(zip(search.grid.names, selection.gates, strict=True))
        apply_selection(model, selection, optimizer)
        for name, (_, b) in zip(AdapterGrid.from_model(model).grid.names, pairs(model), strict=True):
            factor = gates[name] if method == "sigmoid" and fold else 1.0
            assert (factor == 1.0) == (method == "diffora" or not fold)
            for key, power in (("exp_avg", 1), ("exp_avg_sq", 2), ("step", 0)):
                torch.testing.assert_close(optimizer.state[b][key], before[b][key] / factor**power)


def test_sora_prunes_what_its_threshold_has_closed() -> None:
    model, batches = warm()
    options = {"gate_learning_rate": 0.1, "threshold": 0.15, "selection_ratio": 0.9}
    run = train_gated(model, batches, 9, 9, method="sora", **options)
    assert run.selection is not None
    closed = int((run.search.method.component_scores() == 0).sum())
    total = sum(site.rank for site in run.search.grid.sites)
    assert 0 < closed and sum(run.selection.ranks) == total - closed < 0.85 * total
    for site in run.search.adapters.named(run.selection.selected):
        assert site.parameters[1].detach().norm(dim=0).min() > 0


def train_until(model: Any, batches: list[Any], steps: int, rate: float = 0.1, **options: Any) -> SelectionRun:
    """A run up to its choice, by SGD."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=rate)
    config = make_config(discretize_at=steps, **options)
    run = SelectionRun(model, optimizer, config, model_loss, batches, total_steps=steps + 1)
    make_steps(run, model, batches, optimizer, steps)
    return run


@pytest.mark.parametrize("room", [{"selection_ratio": 1.0}, {"max_trainable_parameters": 10**9}])
@pytest.mark.parametrize(
    ("method", "steps", "options"),
    [("sora", 9, {"gate_learning_rate": 0.1, "threshold": 0.15}), ("alora", 1, {})],
)
def test_worthless_components_go_where_there_is_room_for_all(
    method: str, steps: int, options: dict[str, Any], room: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    model, batches = warm()
    run = train_until(model, batches, steps, method=method, method_options=options, **room)
    worth = run.search.method.component_scores()
    assert run.selection is not None
    assert 0 < sum(run.selection.ranks) == int((worth > 0).sum()) < len(worth) == sum(run.search.grid.ranks)
    assert "nothing to choose" not in caplog.text and not run.selection.notes


def test_sora_keeps_all_of_equal_gates_where_there_is_room() -> None:
    tiny = llama()
    model = get_peft_model(tiny.model, lora(target_modules=tiny.target_modules, task_type=tiny.task_type))
    options = {"gate_learning_rate": 0.1}  # they get no gradient while `lora_B` is 0
    run = train_until(model, [tiny.batch], 2, 0.0, method="sora", method_options=options, selection_ratio=1.0)
    assert len(run.search.method.component_scores().unique()) == 1
    assert run.selection is not None and run.selection.ranks == run.search.grid.ranks


@pytest.mark.parametrize(
    ("options", "until", "warned"), [({}, 20, True), ({}, 21, False), ({"beam_every": 4}, 5, False)]
)
def test_beamlora_warns_where_the_choice_comes_before_any_replacement(
    options: dict[str, Any], until: int, warned: bool, caplog: pytest.LogCaptureFixture
) -> None:
    run = train_gated(*half_warm(), 1, until, method="beamlora", **options)
    assert ("no component is replaced before the choice at step 20" in caplog.text) == warned
    assert warned == (run.search.method.options.beam_every >= until)


def test_beamlora_trains_a_softmax_and_puts_strong_components_in_the_place_of_weak_ones() -> None:
    """Against scores that are parameters of the layers, with `torch.optim.Adam`, and a replacement by hand."""
    rate, temperature, every, until = 0.02, 0.05, 4, 20
    tiny = llama()
    model, batches = half_warm(tiny)
    twin = copy.deepcopy(model)
    options = {"method": "beamlora", "beam_every": every, "temperature": temperature, "gate_learning_rate": rate,
               "top_p": 0.9}  # fmt: skip
    run = train_gated(model, batches, every, until, **options)

    grid = run.search.grid
    weights = torch.optim.SGD([p for p in twin.parameters() if p.requires_grad], lr=0.1)
    layers = [twin.base_model.model.get_submodule(name).lora_A["default"] for name in grid.names]
    half = [2] * len(layers)  # of rank 4
    scores = [nn.Parameter(torch.zeros(rank)) for rank in half]

    def gate(own: Tensor) -> Tensor:
        return torch.cat([torch.softmax(own / temperature, 0) * len(own), torch.zeros(4 - len(own))])

    for layer, own in zip(layers, scores, strict=True):
        layer.register_forward_hook(lambda module, args, output, own=own: output * gate(own))
    adam = torch.optim.Adam(scores, lr=rate)
    past: list[list[Tensor]] = []

    def train_twin(steps: int) -> None:
        for step in range(steps):
            model_loss(twin, batches[step % 3]).backward()
            weights.step()
            adam.step()
            weights.zero_grad()
            adam.zero_grad()
            if step + 1 == every // 2:
                past[:] = [[x.detach().clone() for x in pair] for pair in pairs(twin)]

    def assert_equal() -> None:
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(parameter, twin.get_parameter(name), atol=1e-5, rtol=1e-4)
        for found, own in zip(run.search.method.component_gates(), scores, strict=True):
            torch.testing.assert_close(found, gate(own).detach(), atol=1e-4, rtol=1e-3)

    train_twin(every)
    importance = torch.cat([gate(own).detach() for own in scores])
    share = 1 - 0.1 * (1 + np.cos(np.pi * every / until)) / 2
    falling = importance.sort(descending=True)
    weak = set(falling.indices[falling.values.cumsum(0) > share * importance.sum()].tolist())
    replaced = 0
    with torch.no_grad():
        for index, ((a, b), own) in enumerate(zip(pairs(twin), scores, strict=True)):
            worst, best = int(own.argmin()), int(own.argmax())
            if not {4 * index, 4 * index + 1} & weak:
                continue
            replaced += 1
            a[worst], b[:, worst] = past[index][0][best], past[index][1][:, best]
            own.fill_(float(own.mean()))
            del adam.state[own]  # it begins anew
    assert 0 < replaced < len(layers)
    assert_equal()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)  # has no state
    make_steps(run, model, batches, optimizer, 2)
    train_twin(2)
    assert_equal()

    run = train_gated(half_warm()[0], batches, 6, 6, **options)
    assert run.selection is not None and set(run.selection.ranks) == {2}
    assert run.selection.trainable_parameters * 2 == sum(run.search.grid.parameters)


def test_beamlora_keeps_every_module() -> None:
    model, _ = warm()
    for options in ({"selection_granularity": "module"}, {"selection_ratio": 0.1}, {"selection_unit": "layer"}):
        with pytest.raises(ValueError, match="'beamlora'`, which keeps every module"):
            make_search(model, "beamlora", **options)


def test_trained_gates_are_not_seen_by_a_compiled_model() -> None:
    model, batches = warm()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for method in ("sora", "beamlora"):
        config = make_config(method=method, discretize_at=4, selection_ratio=0.5)
        with pytest.raises(ValueError, match=f"'{method}'`, which trains gates.*torch_compile"):
            SelectionRun(model, optimizer, config, model_loss, batches, total_steps=8, runtime=Runtime(compiled=True))
