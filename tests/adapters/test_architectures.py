"""Grid, gates, cut and reload on every architecture."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from diffora_trainer.adapters.gates import Gates
from diffora_trainer.adapters.grid import AdapterGrid
from diffora_trainer.adapters.pruning import apply_selection
from diffora_trainer.core.grid import OTHER_ROW
from diffora_trainer.core.selection import Selection
from helpers.adapted import adapted_names, logits, random_selection, randomize
from helpers.models import ARCHITECTURES, MOE_PARAMETERS, llama_config, moe
from helpers.tiny_model import TinyModel


# In T5 the feed-forward is sub-layer 1 of an encoder block and sub-layer 2 of a decoder block, so its three modules
# are two kinds each.
COLUMNS = {"t5": 14}


def make(name: str) -> tuple[TinyModel, Any]:
    """A tiny model and the same with LoRA whose weights are all different from zero, in evaluation mode."""
    tiny = ARCHITECTURES[name]()
    targets = ["q_proj", "k_proj", "v_proj", "o_proj"] if name == "moe" else tiny.target_modules
    torch.manual_seed(1)
    model = get_peft_model(tiny.model, LoraConfig(r=4, target_modules=targets, task_type=tiny.task_type))
    randomize(model)
    return tiny, model.eval()


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_grid(name: str) -> None:
    tiny, model = make(name)
    grid = AdapterGrid.from_model(model).grid
    assert set(grid.names) == adapted_names(model)
    assert len(set(grid.positions)) == len(grid) == int(tiny.linear_modules or 0) + len(tiny.outside)
    assert len([row for row in grid.rows if row != OTHER_ROW]) == tiny.rows
    assert (OTHER_ROW in grid.rows) == bool(tiny.outside)
    assert len(grid.columns) == COLUMNS.get(name, tiny.kinds) + len(tiny.outside)
    for module, (row, column) in zip(grid.names, grid.positions, strict=True):
        if module in tiny.outside:
            assert (grid.rows[row], grid.columns[column]) == (OTHER_ROW, module)
        else:
            assert f"{grid.rows[row]}.{grid.columns[column]}" == module
    trainable = sum(p.numel() for n, p in model.named_parameters() if "lora_" in n)
    assert sum(grid.parameters) == trainable
    for module, parameters in zip(grid.names, grid.parameters, strict=True):
        weight = model.get_submodule(f"base_model.model.{module}").weight
        assert parameters == 4 * sum(weight.shape)
    assert f"{len(grid)} LoRA modules in {tiny.rows} layers" in grid.describe()


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_gates_are_exact(name: str) -> None:
    tiny, model = make(name)
    stock = logits(model, tiny)
    base = logits(ARCHITECTURES[name]().model.eval(), tiny)
    adapters = AdapterGrid.from_model(model)
    grid, gates = adapters.grid, Gates(adapters.sites)
    gates.attach()
    assert logits(model, tiny).equal(stock)  # nothing is set
    gates.set_evaluation(torch.ones(len(grid)))
    gates.set_training(torch.zeros(len(grid)))
    assert logits(model, tiny).equal(stock)
    gates.set_evaluation(torch.zeros(len(grid)))
    assert logits(model, tiny).equal(base) and not base.equal(stock)

    index = random.Random(name).randrange(len(grid))
    values = torch.ones(len(grid))
    values[index] = 0.3
    with gates.override(values):
        gated = logits(model, tiny)
    gates.detach()
    assert logits(model, tiny).equal(stock)
    layer: Any = model.get_submodule(f"base_model.model.{grid.names[index]}")
    layer.lora_B["default"].weight.data.mul_(0.3)
    expected = logits(model, tiny)
    assert torch.allclose(gated, expected, atol=1e-5)
    if not expected.equal(stock):  # a module that has no effect on these logits cannot tell
        assert (stock - expected).abs().max() > 10 * (gated - expected).abs().max()


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_gate_gradient_is_a_finite_difference(name: str) -> None:
    tiny, model = make(name)
    if name == "moe":
        model.get_base_model().set_experts_implementation("eager")  # the fused kernel has no float64
    model.double()
    batch: dict[str, Tensor] = {k: v.double() if v.is_floating_point() else v for k, v in tiny.batch.items()}
    adapters = AdapterGrid.from_model(model)
    grid, gates = adapters.grid, Gates(adapters.sites)
    gates.attach()

    def loss(values: Tensor) -> Tensor:
        with gates.override(values):
            found = model(**batch).logits
        return found.double().square().mean()  # the models' own losses are in float32

    values = torch.full((len(grid),), 0.5, requires_grad=True)
    (gradient,) = torch.autograd.grad(loss(values), values)
    largest = float(gradient.abs().max())
    assert gradient.dtype == torch.float32 and largest > 1e-3
    # Exact in float32. A smaller one would drown in what most models round to float32, but where the loss has kinks
    # (ReLU) or jumps (the router's choice) it must be small.
    step = 2**-12 if name in ("opt", "moe") else 2**-6
    tolerance = 0.01 if name == "moe" else 2e-3
    for index in random.Random(name).sample(range(len(grid)), 4):
        moved = torch.zeros(len(grid))
        moved[index] = step
        with torch.no_grad():
            difference = float(loss(0.5 + moved) - loss(0.5 - moved)) / (2 * step)
        assert float(gradient[index]) == pytest.approx(difference, rel=tolerance, abs=tolerance * largest)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_cut_save_and_reload(name: str, tmp_path: Path) -> None:
    tiny, model = make(name)
    adapters = AdapterGrid.from_model(model)
    grid, gates = adapters.grid, Gates(adapters.sites)
    selection = random_selection(grid, seed=len(grid))
    gates.attach()
    gates.set_evaluation(torch.tensor(selection.factors) * torch.tensor(selection.kept))
    gated = logits(model, tiny)
    gates.detach()
    apply_selection(model, selection)
    live = logits(model, tiny)
    assert torch.allclose(live, gated, atol=1e-5)  # the gates are folded: no jump beyond the dropped modules
    assert adapted_names(model) == set(selection.selected)

    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(ARCHITECTURES[name]().model, tmp_path).eval()
    assert adapted_names(loaded) == set(selection.selected)
    assert logits(loaded, tiny).equal(live)
    merged = loaded.merge_and_unload()
    assert not adapted_names(merged)
    assert torch.allclose(logits(merged, tiny), live, atol=1e-4)


def test_gates_do_not_round_a_float64_model() -> None:
    tiny, model = make("gpt2")
    model.double()
    stock = logits(model, tiny)
    adapters = AdapterGrid.from_model(model)
    grid, gates = adapters.grid, Gates(adapters.sites)
    gates.attach()
    with gates.override(torch.ones(len(grid), requires_grad=True)):
        assert logits(model, tiny).equal(stock)


def test_experts_have_sites_and_named_projections_alone_work() -> None:
    for options in ({"target_modules": "all-linear"}, {"target_modules": [], "target_parameters": MOE_PARAMETERS}):
        model = get_peft_model(moe().model, LoraConfig(r=4, **options))
        if not model.peft_config["default"].target_parameters:
            continue  # older PEFT takes no experts for "all-linear"
        columns = AdapterGrid.from_model(model).grid.columns
        assert set(MOE_PARAMETERS) <= set(columns) and ("self_attn.q_proj" in columns) == ("all" in str(options))
    _, model = make("moe")
    assert len(AdapterGrid.from_model(model).grid) == 8


def test_many_selected_modules_in_twelve_layers(tmp_path: Path) -> None:
    """From 20 target names on, PEFT shortens them to suffixes."""

    def base() -> LlamaForCausalLM:
        torch.manual_seed(0)
        sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 12, "num_attention_heads": 2}
        return LlamaForCausalLM(llama_config(**sizes)).eval()

    batch = {"input_ids": torch.arange(12).reshape(2, 6)}
    for count in (19, 20, 45, 83, 84):
        model = get_peft_model(base(), LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM")).eval()
        randomize(model)
        selection = random_selection(AdapterGrid.from_model(model).grid, count)
        apply_selection(model, selection)
        model.save_pretrained(tmp_path / str(count))
        loaded = PeftModel.from_pretrained(base(), tmp_path / str(count)).eval()
        assert adapted_names(loaded) == set(selection.selected) and len(selection.selected) == count
        with torch.no_grad():
            assert loaded(**batch).logits.equal(model(**batch).logits)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.v = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.q(x)) + torch.tanh(self.v(x))


class Tower(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block() for _ in range(11))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


class TwoTowers(Tower):
    """`layers.0.q` is the end of `vision.layers.0.q`, and `layers.1.q` is not that of `layers.10.q`."""

    def __init__(self) -> None:
        super().__init__()
        self.vision = Tower()

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.vision(x))


@pytest.mark.parametrize("chosen", [("layers.0.q",), ("layers.1.v", "vision.layers.0.q"), None], ids=str)
def test_a_selected_name_ends_an_unselected_one(chosen: tuple[str, ...] | None, tmp_path: Path) -> None:
    def base() -> TwoTowers:
        torch.manual_seed(0)
        return TwoTowers()

    model: Any = get_peft_model(base(), LoraConfig(r=2, target_modules=["q", "v"]))
    randomize(model)
    grid = AdapterGrid.from_model(model).grid
    assert len(grid.rows) == 22 and len(grid.columns) == 2
    # All of the text tower and a bit of the other: more than 20 names, each the end of another one.
    wanted = chosen or (*(name for name in grid.names if name.startswith("layers.")), "vision.layers.3.q")
    selection = random_selection(grid)
    ranks = tuple(site.rank if site.name in wanted else 0 for site in grid.sites)
    selection = Selection(grid, ranks, selection.scores, selection.gates)
    apply_selection(model, selection)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(base(), tmp_path)
    assert adapted_names(loaded) == adapted_names(model) == set(wanted)
    x = torch.ones(2, 4)
    assert loaded(x).equal(model(x)) and not model(x).equal(base()(x))
