"""The search over a model and a loss function, without any Trainer."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import asdict
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from diffora_trainer import ArchitectureSearch, DiffoRAConfig
from diffora_trainer.adapters.grid import AdapterGrid
from diffora_trainer.methods.base import GradientMethod
from diffora_trainer.methods.build import make_method, module_budget
from diffora_trainer.search.runtime import Runtime
from helpers.models import llama
from helpers.options import make_config
from helpers.searches import by_hand as scores_by_hand
from helpers.searches import gradients_of, make_search, pairs, warm


class Toy(nn.Module):
    """Two layers of one module each."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.ModuleDict({"fc": nn.Linear(5, 6)}), nn.ModuleDict({"fc": nn.Linear(6, 3)})])
        self.dropout = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.layers[1]["fc"](self.dropout(torch.tanh(self.layers[0]["fc"](x))))


def toy(dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(0)
    model = get_peft_model(Toy(), LoraConfig(r=2, lora_alpha=4, target_modules=["fc"]))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.3)
    return model.to(dtype)


def batch(seed: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(16, 5, generator=generator).to(dtype), torch.randn(16, 3, generator=generator).to(dtype)


def squared_error(model: nn.Module, data: tuple[Tensor, Tensor]) -> Tensor:
    return (model(data[0]) - data[1]).square().mean()


def by_hand(model: Any, gates: Tensor, weights: list[Tensor], data: tuple[Tensor, Tensor]) -> Tensor:
    """The toy's loss as a function of its gates and LoRA weights, without PEFT and without this package."""
    base = model.get_base_model()
    a1, b1, a2, b2 = weights
    one, two = (base.layers[i]["fc"].base_layer for i in (0, 1))
    x = data[0]
    h = torch.tanh(x @ one.weight.T + one.bias + 2 * gates[0] * (x @ a1.T @ b1.T))
    return (h @ two.weight.T + two.bias + 2 * gates[1] * (h @ a2.T @ b2.T) - data[1]).square().mean()


@pytest.mark.parametrize("relaxation", ["diffora", "sigmoid"])
def test_second_order_is_the_unrolled_gradient(relaxation: str) -> None:
    rate = 0.5
    train, held_out = batch(1, torch.float64), batch(2, torch.float64)
    found = []
    for order in (1, 2):
        model = toy(torch.float64)
        search = ArchitectureSearch(
            model,
            make_config(arch_order=order, method=relaxation, selection_scope="model"),
            loss_fn=squared_error,
        )
        search.begin()
        seen = gradients_of(search)
        weights = [p for n, p in model.named_parameters() if "lora_" in n]
        before = [weight.detach().clone() for weight in weights]
        search.step(held_out, train, rate)
        assert all(a.equal(b) for a, b in zip(weights, before, strict=True))
        found.append(seen[0].double())

    gates = torch.full((2,), 0.5, dtype=torch.float64, requires_grad=True)
    leaves = [weight.requires_grad_() for weight in before]
    (first,) = torch.autograd.grad(by_hand(model, gates, leaves, held_out), gates)
    descent = torch.autograd.grad(by_hand(model, gates, leaves, train), leaves, create_graph=True)
    ahead = [weight - rate * step for weight, step in zip(leaves, descent, strict=True)]
    (exact,) = torch.autograd.grad(by_hand(model, gates, ahead, held_out), gates)
    assert (found[0] - first).norm() < 1e-5 * first.norm()
    assert (found[1] - exact).norm() < 1e-2 * exact.norm()
    assert (found[1] - found[0]).norm() > 0.1 * exact.norm()
    # Neither is it the first-order gradient at the weights looked ahead to, without the mixed derivative.
    (half,) = torch.autograd.grad(by_hand(model, gates, [w.detach() for w in ahead], held_out), gates)
    assert (half - exact).norm() > 0.05 * exact.norm()


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("training", [True, False])
def test_a_step_leaves_no_trace(order: int, training: bool) -> None:
    def noisy(model: nn.Module, data: Any) -> Tensor:
        noise = torch.rand(()) + random.random() + float(np.random.rand())
        return squared_error(model, data) + noise

    model = toy()
    search = ArchitectureSearch(model, make_config(arch_order=order), loss_fn=noisy)
    search.begin()
    squared_error(model.train(), batch(3)).backward()
    model.train(training)
    weights = [p for p in model.parameters() if p.requires_grad]
    before = [(p.detach().clone(), p.grad, p.grad.clone() if p.grad is not None else None) for p in weights]
    streams = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()  # type: ignore[union-attr]
    values = search.method.values()
    assert search.step(batch(1), batch(2), 0.1) is not None
    search.held_out_loss([batch(1)])
    assert not search.method.values().equal(values)
    assert torch.get_rng_state().equal(streams[0]) and random.getstate() == streams[1]
    assert (np.random.get_state()[1] == streams[2]).all()  # type: ignore[index]
    for parameter, (value, grad, copy) in zip(weights, before, strict=True):
        assert parameter.equal(value) and parameter.grad is grad
        assert grad is None or grad.equal(copy)
    assert {module.training for module in model.modules()} == {training}


def test_hooks_are_called_where_a_pass_comes_by_and_never_for_a_grad() -> None:
    """As docs/limits.md says; a score is that of the gradient that a hook leaves."""
    model, batches = warm()
    expected = scores_by_hand("snip", model, batches)
    calls: Counter[str] = Counter()
    (_, up), *others = pairs(model)
    for parameter in (up, *(weight for pair in others for weight in pair)):
        parameter.register_hook(lambda gradient: calls.update(["weight"]))
        parameter.register_post_accumulate_grad_hook(lambda parameter: calls.update(["grad"]))
    up.register_hook(torch.zeros_like)
    model.get_base_model().lm_head.register_full_backward_hook(lambda *args: calls.update(["module"]))
    search = make_search(model, "diffora")
    search.step(batches[0])
    search.gates.detach()
    assert calls == {"module": 1}
    calls.clear()
    scores = make_search(model, "snip").score(batches)
    assert calls == {"module": len(batches), "weight": len(batches) * (1 + 2 * len(others))}
    assert 0 < float(scores[0]) < expected[0] and scores[1:].tolist() == pytest.approx(expected[1:], rel=1e-4)
    calls.clear()
    make_search(model, "diffora", method_options={"arch_order": 2}).step(batches[0], batches[1], learning_rate=0.01)
    assert calls["weight"] > 0 == calls["grad"]
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_step_keeps_the_mode_of_each_part() -> None:
    """Parts kept in evaluation mode by the user, such as a frozen batch norm, stay in it."""
    model = toy().train()
    model.get_base_model().dropout.eval()
    search = ArchitectureSearch(model, loss_fn=squared_error)
    search.begin()
    search.step(batch(1))
    assert model.training and not model.get_base_model().dropout.training


def test_dropout_is_off_in_a_step() -> None:
    model = toy().train()
    search = ArchitectureSearch(model, loss_fn=squared_error)
    search.begin()
    seen = gradients_of(search)
    search.method.search_gates = lambda: torch.full((2,), 0.5)  # type: ignore[method-assign]
    search.step(batch(1))
    search.step(batch(1))
    assert seen[0].equal(seen[1]) and seen[0].abs().min() > 0


@pytest.mark.parametrize("order", [1, 2])
def test_what_is_not_finite_is_skipped(order: int) -> None:
    model = toy()
    bad: list[Any] = [float("nan"), float("inf")]

    def sometimes(model: nn.Module, data: Any) -> Tensor:
        loss = squared_error(model, data)
        return loss * bad[0] if bad and model(data[0]).requires_grad and data[0].sum() != 0 else loss

    search = ArchitectureSearch(model, make_config(arch_order=order), loss_fn=sometimes)
    search.begin()
    weights = [p.detach().clone() for p in model.parameters()]
    state = search.method.state_dict()
    while bad:
        assert search.step(batch(1), batch(2), 0.1) is None
        bad.pop(0)
    # A finite loss with a gradient that is not: sqrt at zero.
    search._loss_fn = lambda model, data: squared_error(model, data) + (0 * model(data[0]).sum()).sqrt()
    assert search.step(batch(1), batch(2), 0.1) is None
    assert search.skipped_steps == 3 and search.metrics()["diffora/skipped_steps"] == 3.0
    assert "diffora/arch_loss" not in search.metrics()
    assert all(a.equal(b) for a, b in zip(model.parameters(), weights, strict=True))
    assert all(search.method.state_dict()[name].equal(value) for name, value in state.items())
    search._loss_fn = squared_error
    assert search.step(batch(1), batch(2), 0.1) == pytest.approx(search.metrics()["diffora/arch_loss"])
    assert search.skipped_steps == 3 and search.method.steps == 1


def test_scaled_and_reduced_gradients() -> None:
    found = []
    for scale in (1.0, 4096.0):
        reduced: list[Tensor] = []

        def halve(values: Tensor, seen: list[Tensor] = reduced) -> Tensor:
            seen.append(values)
            return values / 2

        runtime = Runtime(reduce=halve, loss_scale=lambda s=scale: s)
        search = ArchitectureSearch(toy(), loss_fn=squared_error, runtime=runtime)
        search.begin()
        seen = gradients_of(search)
        loss = search.step(batch(1))
        assert reduced[0].shape == (3,) and reduced[0].dtype == torch.float32 and reduced[0].device.type == "cpu"
        assert (seen[0] * 2).equal(reduced[0][:2]) and loss == float(reduced[0][2]) / 2
        found.append(seen[0])
    assert torch.allclose(found[0], found[1], rtol=1e-5)


def test_bf16_model_moves_the_matrix_in_float32() -> None:
    tiny = llama()
    torch.manual_seed(0)
    model = get_peft_model(tiny.model, LoraConfig(r=4, target_modules="all-linear")).to(torch.bfloat16)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.2)
    for relaxation in ("diffora", "sampled", "sigmoid", "softmax"):
        search = ArchitectureSearch(
            model, DiffoRAConfig(method=relaxation), loss_fn=lambda model, data: model(**data).loss
        )
        search.begin()
        seen = gradients_of(search)
        assert search.step(tiny.batch) is not None
        assert seen[0].dtype == torch.float32 and not seen[0].equal(seen[0].bfloat16().float())
        assert all(t.dtype == torch.float32 for name, t in search.method._tensors().items())
        search.finish()


def test_errors() -> None:
    model = toy()
    with pytest.raises(ValueError, match="arch_order=2.*`train_batch` and `learning_rate`"):
        ArchitectureSearch(model, make_config(arch_order=2), loss_fn=squared_error).step(batch(1))
    with pytest.raises(ValueError, match="max_trainable_parameters=3.*none fits"):
        ArchitectureSearch(model, DiffoRAConfig(max_trainable_parameters=3), loss_fn=squared_error)
    with pytest.raises(TypeError, match="got Toy"):
        ArchitectureSearch(Toy(), loss_fn=squared_error)
    head = nn.Parameter(torch.ones(3))
    search = ArchitectureSearch(model, loss_fn=lambda model, data: (head - data[1]).square().mean())
    search.begin()
    with pytest.raises(ValueError, match="does not depend on any gate"):
        search.step(batch(1))


def test_a_loss_without_gradients_is_explained() -> None:
    search = ArchitectureSearch(toy(), loss_fn=torch.no_grad()(squared_error))
    search.begin()
    with pytest.raises(ValueError, match="does not depend on any gate.*no_grad"):
        search.step(batch(1))


class Slices(nn.Module):
    """Eight layers, each with a slice of the output to itself; `p` and `q` read different inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.ModuleDict({"p": nn.Linear(4, 4), "q": nn.Linear(4, 4)}) for _ in range(8))

    def forward(self, x: Tensor) -> Tensor:
        parts = [layer["p"](x[:, 0, i]) + layer["q"](x[:, 1, i]) for i, layer in enumerate(self.layers)]
        return torch.cat(parts, dim=1)


@pytest.mark.parametrize("scope", ["layer", "model"])
@pytest.mark.parametrize("relaxation", ["diffora", "sampled", "softmax"])
def test_planted_modules_are_chosen(relaxation: str, scope: str) -> None:
    """The target differs from the base model in half of the modules; the others have nothing to learn but noise."""
    torch.manual_seed(0)
    base, target = Slices(), Slices()
    target.load_state_dict(base.state_dict())
    rng = random.Random(1)
    every = [f"layers.{row}.{kind}" for row in range(8) for kind in "pq"]
    useful = (
        {f"layers.{row}.{rng.choice('pq')}" for row in range(8)} if scope == "layer" else set(rng.sample(every, 8))
    )
    for name in sorted(useful):
        target.get_submodule(name).weight.data += torch.randn(4, 1) @ torch.randn(1, 4)  # type: ignore[operator]

    def draw() -> tuple[Tensor, Tensor]:
        x = torch.randn(32, 2, 8, 4)
        with torch.no_grad():
            y = target(x)
        return x, y + torch.randn_like(y)

    model = get_peft_model(base, LoraConfig(r=2, target_modules=["p", "q"]))
    config = DiffoRAConfig(method=relaxation, selection_scope=scope)
    search = ArchitectureSearch(model, config, loss_fn=squared_error)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.03)
    search.begin()
    for step in range(1, 71):
        search.draw_gates()
        squared_error(model.train(), draw()).backward()
        optimizer.step()
        optimizer.zero_grad()
        if step > 10:
            search.step(draw())
    selection = search.finish(70)
    assert selection.step == 70 and len(selection.selected) == 8
    assert len(useful & set(selection.selected)) >= 7  # four by chance
    # Their weights have trained with the gate open.
    assert {factor for factor, keep in zip(selection.factors, selection.kept, strict=True) if keep} == {1.0}
    options = {**config.to_dict(), "method_options": asdict(search.method.options)}
    assert selection.config == options and {"torch", "peft"} <= set(selection.versions)


def test_gates_of_the_training_step_are_drawn_anew() -> None:
    model = toy().train()
    config = DiffoRAConfig(selection_scope="model", method="sampled")
    search = ArchitectureSearch(model, config, loss_fn=squared_error)
    stock = model.eval()(batch(1)[0])
    search.begin()
    model.get_base_model().dropout.p = 0.0
    outputs = set()
    for _ in range(20):
        search.draw_gates()
        outputs.add(float(model.train()(batch(1)[0]).sum().detach()))
    assert len(outputs) == 2  # one of two modules is in, the other out
    search.finish()
    assert model.eval()(batch(1)[0]).equal(stock) and not search.gates.attached


def test_select_decides_nothing_and_shares_by_shape() -> None:
    tiny = llama()
    model = get_peft_model(tiny.model, LoraConfig(r=4, target_modules="all-linear"))
    for sharing in ("layer", "model"):
        config = DiffoRAConfig(0.25, weight_sharing=sharing)
        search = ArchitectureSearch(model, config, loss_fn=lambda model, data: model(**data).loss)
        search.begin()
        generator = torch.Generator().manual_seed(0)
        for _ in range(3):
            search.method.step(torch.randn(14, generator=generator))
        state = search.method.state_dict()
        selection = search.select()
        assert search.gates.attached and search.select() == selection
        assert all(search.method.state_dict()[name].equal(value) for name, value in state.items())
        assert len(selection.selected) == 4  # two of the seven in each layer
        scores = dict(zip(selection.modules, selection.scores, strict=True))
        shapes = dict(zip(selection.modules, [site.shape for site in search.adapters.sites], strict=True))
        sharers = [name for group in selection.shared for name in group]
        assert len(sharers) == len(set(sharers)) and not set(sharers) & set(selection.selected)
        for group in selection.shared:
            assert len(group) > 1 and scores[group[0]] == max(scores[name] for name in group)
            assert len({shapes[name] for name in group}) == 1
            assert sharing == "model" or len({name.split(".")[2] for name in group}) == 1
        for name in selection.dropped:  # nobody of the same shape was left to share with
            others = [other for other in {*selection.dropped, *sharers} - {name} if shapes[other] == shapes[name]]
            assert not [o for o in others if sharing == "model" or o.split(".")[2] == name.split(".")[2]]
        search.finish()


def test_metrics_and_the_matrix_of_a_config() -> None:
    model = toy()
    search = ArchitectureSearch(model, DiffoRAConfig(log_gates_by_kind=True), loss_fn=squared_error)
    search.begin()
    losses = [search.step(batch(seed)) for seed in (1, 2)]
    metrics = search.metrics()
    assert metrics["diffora/arch_loss"] == pytest.approx(sum(losses) / 2)  # type: ignore[arg-type]
    values = search.method.values()
    assert metrics["diffora/gate/fc"] == pytest.approx(float(values.mean()))
    assert metrics["diffora/gate_max"] == float(values.max())
    assert "diffora/arch_loss" not in search.metrics()  # told once

    grid = AdapterGrid.from_model(model).grid
    plain, whole = [True, True], DiffoRAConfig(0.5, "model")
    assert make_method(DiffoRAConfig(0.5), module_budget(DiffoRAConfig(0.5), grid, plain)).discretize().tolist() == [
        True,
        True,
    ]  # one a layer at least
    assert make_method(whole, module_budget(whole, grid, plain)).discretize().sum() == 1
    config = make_config(max_trainable_parameters=20, method="sampled", arch_learning_rate=0.3)
    capped = make_method(config, module_budget(config, grid, plain))
    assert isinstance(capped, GradientMethod)
    assert capped.discretize().tolist() == [False, True] and capped.learning_rate == 0.3  # 22 and 18 parameters
