"""A search among LoRA modules and shortcuts: what is scored, how they are compared, and what a cut leaves."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import (
    assert_same,
    causal_model,
    classifier,
    lora,
    make_trainer,
    optimizer_state,
    search_config,
    snapshot,
)
from matplotlib.image import imread
from models import bert, llama, opt
from peft import PeftModel, get_peft_model
from test_proxies import by_hand, make_search, model_loss, warm
from test_shortcuts import hooks
from torch import Tensor, nn
from transformers import HfArgumentParser

from diffora_trainer import (
    ArchitectureSearch,
    DiffoRAConfig,
    Selection,
    ShortcutConfig,
    ShortcutModel,
    add_shortcuts,
    apply_selection,
)
from diffora_trainer.adapters.grid import ModuleGrid, parameters_of, searched_modules
from diffora_trainer.experimental.shortcuts.hooks import ATTRIBUTE
from diffora_trainer.experimental.shortcuts.shortcuts import KINDS, keep_shortcuts, shortcuts
from diffora_trainer.hub.plots import plot_selection
from diffora_trainer.search.reallocation import Reallocation


def ready(tiny: Any = None, **options: Any) -> tuple[Any, list[dict[str, Tensor]]]:
    """A model whose LoRA modules and shortcuts all do something, and three batches."""
    model, batches = warm(tiny)
    torch.manual_seed(5)
    for shortcut in add_shortcuts(model, ShortcutConfig(**{"r": 3, **options})).values():
        nn.init.normal_(shortcut.B, std=0.1 * float(torch.rand(())))
    return model, batches


def pairs(model: nn.Module) -> dict[str, list[nn.Parameter]]:
    """The two matrices of each LoRA module and shortcut, by the module's name, read from the parameters' names."""
    found: dict[str, list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        name = name.removeprefix("base_model.model.")
        if ".lora_" in name:
            found.setdefault(name.partition(".lora_")[0], []).append(parameter)
        elif ATTRIBUTE in name:
            found.setdefault(name.replace(f"{ATTRIBUTE}.", "").rpartition(".")[0], []).append(parameter)
    return found


def test_shortcuts_stand_in_the_grid() -> None:
    model, _ = ready()
    plain = ModuleGrid.from_model(warm()[0])
    grid = ModuleGrid.from_model(model)
    assert grid.rows == plain.rows and grid.columns == (*plain.columns, *KINDS)
    assert set(grid.names) == {*plain.names, *shortcuts(model)} == set(pairs(model))
    assert grid.shortcuts == tuple(n for n in grid.names if n in shortcuts(model))
    assert [n for n, is_one in zip(grid.names, grid.is_shortcut, strict=True) if is_one] == list(grid.shortcuts)
    sizes = {name: sum(p.numel() for p in found) for name, found in pairs(model).items()}
    assert grid.parameters == tuple(sizes[name] for name in grid.names)
    for name, (row, column) in zip(grid.names, grid.positions, strict=True):
        assert f"{grid.rows[row]}.{grid.columns[column]}" == name
    assert grid.describe().startswith("14 LoRA modules and 7 shortcuts in 2 layers x 11 kinds")
    # Layers without LoRA keep their place.
    model = get_peft_model(llama().model, lora(target_modules=["layers.1.self_attn.q_proj"]))
    add_shortcuts(model)
    assert ModuleGrid.from_model(model).rows == plain.rows


@pytest.mark.parametrize("kind", [llama, bert, opt])
@pytest.mark.parametrize("method", ["grad_norm", "snip", "synflow"])
def test_formulas_hold_for_shortcuts(method: str, kind: Any) -> None:
    model, batches = ready(kind())
    raw = make_search(model, method, shortcut_ranking="separated", loss_scale=lambda: 64.0)
    found = raw.score(batches)
    direct = by_hand(method, model, batches, lambda twin: [pairs(twin)[name] for name in raw.grid.names])
    expected = torch.tensor(direct, dtype=torch.float64)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=float(expected.max()) * 1e-6)
    ours = torch.tensor(raw.grid.is_shortcut)
    assert (expected[ours] > 0).all() and len(expected[ours].unique()) > 4

    # In units of their own kind: multiplying all scores of one kind by a number changes nothing.
    scaled = make_search(model, method, shortcut_ranking="combined").score(batches)
    for group in (ours, ~ours):
        torch.testing.assert_close(scaled[group], expected[group] / expected[group].mean(), rtol=1e-4, atol=1e-6)


def test_alpha_test_takes_a_shortcut_away() -> None:
    model, batches = ready()
    search = make_search(model, "alpha_test", selection_scope="model")
    search.score(batches)
    twin = copy.deepcopy(model).eval()
    with torch.no_grad():
        whole = float(sum(model_loss(twin, batch) for batch in batches) / len(batches))
        for name, rise in zip(search.grid.names, search.matrix._tie_breaker.tolist(), strict=True):
            second = pairs(twin)[name][1]
            kept = second.clone()
            second.zero_()
            assert rise == pytest.approx(
                float(sum(model_loss(twin, batch) for batch in batches) / len(batches)) - whole, abs=1e-5
            )
            second.copy_(kept)


def test_the_gradient_of_a_gate() -> None:
    # The loss depends on the gate g of a module through g * B, so at g = 1 the gradient is the sum of B * dL/dB.
    model, batches = ready(bert())
    model.eval()
    search = ArchitectureSearch(model, DiffoRAConfig(), loss_fn=model_loss)  # all gates open
    search.begin()
    _, (gates,) = search._gradients(batches[0], torch.ones(len(search.grid)), [])
    model_loss(model, batches[0]).backward()
    expected = torch.stack([(pairs(model)[name][1] * pairs(model)[name][1].grad).sum() for name in search.grid.names])
    torch.testing.assert_close(gates, expected, rtol=1e-3, atol=1e-6)
    assert (expected[torch.tensor(search.grid.is_shortcut)] != 0).all()


def planted(good: set[str], unit: float) -> Any:
    """A score function that gives every name of `good` more than any other of its kind; shortcuts in another unit."""

    def scores(model: nn.Module, batches: list[Any]) -> dict[str, float]:
        grid = ModuleGrid.from_model(model)
        return {
            name: (1.0 + 0.01 * index + 5.0 * (name in good)) * (unit if shortcut else 1.0)
            for index, (name, shortcut) in enumerate(zip(grid.names, grid.is_shortcut, strict=True))
        }

    return scores


@pytest.mark.parametrize("unit", [1e-6, 1.0, 1e6])
def test_combined_is_free_of_scale(unit: float) -> None:
    model, batches = ready()
    good = {"model.layers.0.self_attn.q_proj", "model.layers.1.mlp.up_proj", "model.layers.1.residual1"}
    options = {"selection_scope": "model", "selection_ratio": 3 / 21, "score_function": planted(good, unit)}
    search = make_search(model, "custom", **options)
    search.score(batches)
    assert set(search.select().selected) == good


@pytest.mark.parametrize("scope", ["layer", "model"])
def test_separated_keeps_the_same_part_of_each(scope: str) -> None:
    model, batches = ready()
    good = {name for name in shortcuts(model)}  # by scores alone nothing else would be kept

    def chosen(**options: Any) -> Selection:
        options |= {"shortcut_ranking": "separated", "score_function": planted(good, 1e6)}
        search = make_search(model, "custom", **options)
        search.score(batches)
        return search.select()

    selection = chosen(selection_scope=scope)
    assert len(selection.lora_modules) == 7 + (scope == "layer") and len(selection.selected_shortcuts) == 4
    assert set(selection.selected) == {*selection.lora_modules, *selection.selected_shortcuts}
    # Under a cap each has its part of it.
    cap = sum(selection.parameters) // 3
    selection = chosen(max_trainable_parameters=cap)
    size = dict(zip(selection.modules, selection.parameters, strict=True))
    part = sum(size[name] for name in selection.shortcuts) / sum(selection.parameters)
    kept = sum(size[name] for name in selection.selected_shortcuts)
    largest = max(size.values())
    assert cap * part - largest < kept <= cap * part
    assert cap * (1 - part) - largest < selection.trainable_parameters - kept <= cap * (1 - part)


def test_one_lora_module_stays() -> None:
    model, batches = ready()
    good = set(shortcuts(model))

    def scores(model: nn.Module, batches: list[Any]) -> dict[str, float]:
        return {name: 10.0 if name in good else -1.0 - 0.1 * i for i, name in enumerate(pairs(model))}

    for options in ({"selection_ratio": 5 / 21, "selection_scope": "model"}, {"max_trainable_parameters": 900}):
        search = make_search(model, "custom", score_function=scores, **options)
        search.score(batches)
        selection = search.select()
        best = next(name for name in pairs(model) if name not in good)
        assert selection.lora_modules == (best,) and selection.selected_shortcuts
        if "selection_ratio" in options:
            assert len(selection.selected) == 5
        else:
            assert selection.trainable_parameters <= 900


@pytest.mark.parametrize("method", ["diffora", "snip"])
def test_what_is_cut_is_gone_and_what_stays_goes_on(method: str) -> None:
    """After the cut, outputs and gradients are those of a model that was made with the chosen ones alone."""
    tiny = llama()
    model, batches = ready(tiny)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    search = ArchitectureSearch(model, search_config(method=method, selection_scope="model"), loss_fn=model_loss)
    search.begin()
    for _ in range(3):
        search.draw_gates()
        model_loss(model, batches[0]).backward()
        optimizer.step()
        optimizer.zero_grad()
        if method == "diffora":
            assert search.step(batches[1]) is not None
    if method == "snip":
        search.score(batches)
    selection = search.finish(3)
    assert 0 < len(selection.selected_shortcuts) < len(selection.shortcuts)
    assert 0 < len(selection.lora_modules) < len(selection.modules) - len(selection.shortcuts)
    weights, moments = snapshot(model), optimizer_state(model, optimizer)
    apply_selection(model, selection, optimizer)

    names = [name for name, _ in model.named_parameters() if "lora_" in name or ATTRIBUTE in name]
    assert set(pairs(model)) == set(selection.selected) == set(searched_modules(model, "default"))
    assert_same({n: t for n, t in snapshot(model).items() if n in names}, {n: weights[n] for n in names})
    assert_same(
        optimizer_state(model, optimizer), {n: moments[n] for n, _ in model.named_parameters() if n in moments}
    )
    assert {id(p) for group in optimizer.param_groups for p in group["params"]} == {
        id(p) for name, p in model.named_parameters() if name in names
    }

    stock = get_peft_model(llama().model, lora(target_modules=list(selection.lora_modules), task_type=tiny.task_type))
    add_shortcuts(stock, ShortcutConfig(r=3, names=selection.selected_shortcuts))
    stock.load_state_dict(model.state_dict())
    losses = [model_loss(m.train(), batches[2]) for m in (model, stock)]
    assert torch.equal(*losses)
    for m, loss in zip((model, stock), losses, strict=True):
        m.zero_grad()
        loss.backward()
    assert_same(*({n: p.grad for n, p in m.named_parameters() if p.grad is not None} for m in (model, stock)))
    assert hooks(model) == hooks(stock)

    # Through JSON and the picture.
    again = Selection.from_json(selection.to_json())
    assert again == selection and json.loads(selection.to_json())["shortcuts"] == list(selection.shortcuts)
    assert f"and {len(selection.selected_shortcuts)} of 7 shortcuts" in selection.summary()


def test_the_picture_shows_shortcuts(tmp_path: Path) -> None:
    model, batches = ready()
    search = make_search(model, "snip")
    search.score(batches)
    selection = search.select()
    lora_only = [position[1] for n, position in zip(selection.modules, selection.positions, strict=True)
                 if n not in selection.shortcuts]  # fmt: skip
    assert len(selection.columns) == max(lora_only) + 1 + len(KINDS)
    assert imread(plot_selection(selection, tmp_path / "dam.png")).shape[1] > 700


def test_keep_shortcuts() -> None:
    model, batches = ready()
    plain = model_loss(model.eval(), batches[0])
    keep_shortcuts(model, shortcuts(model))
    assert torch.equal(model_loss(model, batches[0]), plain)
    there = shortcuts(model)
    # From the second layer's `shortcut2`, the first layer has to note what it passes on.
    keep_shortcuts(model, ["model.layers.1.shortcut2"])
    assert shortcuts(model) == {"model.layers.1.shortcut2": there["model.layers.1.shortcut2"]}
    one = model_loss(model, batches[0])
    twin = warm()[0].eval()
    add_shortcuts(twin, ShortcutConfig(r=3, kinds=("shortcut2",)))
    twin.load_state_dict(model.state_dict())
    assert torch.equal(model_loss(twin, batches[0]), one) and not torch.equal(one, plain)
    with pytest.raises(ValueError, match=r"no shortcut 'model\.layers\.0\.residual1'.*has 1"):
        keep_shortcuts(model, ["model.layers.0.residual1"])
    keep_shortcuts(model, [])
    assert not shortcuts(model) and hooks(model) == hooks(warm()[0])
    with pytest.raises(ValueError, match="no shortcuts"):
        keep_shortcuts(model, [])


def test_shortcuts_that_are_off_are_not_there() -> None:
    model, batches = ready()
    reallocation = Reallocation(make_search(model, "snip", selection_scope="model"))
    grid = reallocation.search.grid
    expected = reallocation.search.score(batches)
    on = torch.arange(len(grid)) % 2 == 0
    kept = [name for name, yes in zip(grid.names, on.tolist(), strict=True) if yes]
    off = [name for name in grid.shortcuts if name not in kept]
    assert off and set(kept) & set(grid.shortcuts)
    called: list[str] = []
    for name, shortcut in shortcuts(model).items():
        shortcut.register_forward_hook(lambda *_, name=name: called.append(name))
    reallocation.switch(on)
    loss = model_loss(model, batches[0])
    loss.backward()
    assert set(called) == set(kept) & set(grid.shortcuts)
    assert {name for name, pair in pairs(model).items() if pair[1].grad is not None} == set(kept)
    twin, _ = ready()
    twin.load_state_dict(model.state_dict())
    for name, module in searched_modules(twin, "default").items():
        if name not in kept:
            nn.init.zeros_(parameters_of(module, "default")[1])
    torch.testing.assert_close(model_loss(twin, batches[0]), loss)
    assert not any(p.requires_grad for name in off for p in pairs(model)[name])
    # Scored as if they were on.
    reallocation.reallocate(batches, 1)
    assert reallocation.history[0].scores == tuple(expected.tolist())
    selection = reallocation.finish(2)
    assert all(shortcut.enabled for shortcut in shortcuts(model).values())
    apply_selection(model, selection)
    assert set(pairs(model)) == set(selection.selected)


@pytest.mark.parametrize("ranking", ["combined", "separated"])
def test_dynamic_run(ranking: str, tmp_path: Path) -> None:
    """A trainer's run: the budget holds at each choice, and what is off waits with its state."""
    options = {"method": "grad_norm", "reallocate_every": 2, "selection_scope": "model", "score_batches": 2}
    trainer = make_trainer(tmp_path, "sft", search={**options, "shortcuts": list(KINDS), "shortcut_ranking": ranking})
    base = {n: t for n, t in snapshot(trainer.model).items() if "lora_" not in n and ATTRIBUTE not in n}
    trainer.train()
    selection = trainer.selection
    shortcut = [name in selection.shortcuts for name in selection.modules]
    assert len(selection.history) == 3
    for entry in selection.history:
        assert sum(entry.on) == 11
        if ranking == "separated":
            assert sum(o for o, s in zip(entry.on, shortcut, strict=True) if s) == 4
    assert selection.kept == selection.history[-1].on
    assert set(pairs(trainer.model)) == set(selection.selected)
    after = snapshot(trainer.model)
    assert_same({n.replace(".base_layer", ""): after.get(n, after.get(n.replace(".base_layer", ""))) for n in base},
                {n.replace(".base_layer", ""): t for n, t in base.items()})  # fmt: skip


def test_rank_and_scale_are_those_of_the_lora(tmp_path: Path) -> None:
    config = lora(r=4, lora_alpha=6, use_rslora=True, lora_dropout=0.25)
    trainer = make_trainer(tmp_path, peft_config=config, search={"shortcuts": ["shortcut1"]})
    found = list(shortcuts(trainer.model).values())
    assert len(found) == 2 and {s.A.shape[0] for s in found} == {4}
    layer = next(m for n, m in trainer.model.named_modules() if n.endswith("query"))
    assert {s.scale for s in found} == {layer.scaling["default"]} == {3.0} and {s.dropout for s in found} == {0.25}
    # A model with shortcuts of its own keeps them.
    model = get_peft_model(bert().model, lora(task_type="SEQ_CLS"))
    own = add_shortcuts(model, ShortcutConfig(r=2, kinds=("residual2",)))
    trainer = make_trainer(tmp_path, model=model, peft_config=None, search={"shortcuts": ["shortcut1"]})
    assert shortcuts(trainer.model) == own


@pytest.mark.parametrize("task", ["cls", "sft"])
def test_a_loaded_model_is_trained_on(task: str, tmp_path: Path) -> None:
    options = {"shortcuts": list(KINDS), "selection_scope": "model"}
    first = make_trainer(tmp_path / "first", task, search=options)
    first.train()
    first.save_model()
    kept = first.selection
    assert 0 < len(kept.selected_shortcuts) < len(kept.shortcuts)
    clean = classifier().model if task == "cls" else causal_model()
    loaded = ShortcutModel.from_pretrained(clean, tmp_path / "first", is_trainable=True)
    second = make_trainer(tmp_path / "second", task, model=loaded, peft_config=None, search=options)
    assert set(ModuleGrid.from_model(second.model).names) == set(kept.selected)
    before = {name: [p.clone() for p in pair] for name, pair in pairs(second.model).items()}
    second.train()
    assert set(second.selection.selected) < set(kept.selected)
    for name, pair in pairs(second.model).items():
        assert not any(torch.equal(a, b) for a, b in zip(pair, before[name], strict=True)), name


def test_half_precision_models_have_shortcuts_in_float32() -> None:
    tiny = llama()
    model = get_peft_model(tiny.model.to(torch.bfloat16), lora())
    plain = model(**tiny.batch).logits
    assert {p.dtype for s in add_shortcuts(model).values() for p in s.parameters()} == {torch.float32}
    assert torch.equal(model(**tiny.batch).logits, plain)


def test_config() -> None:
    (config,) = HfArgumentParser(DiffoRAConfig).parse_args_into_dataclasses(
        ["--shortcuts", "shortcut1", "residual1", "--shortcut_ranking", "separated"]
    )
    assert config.shortcuts == ["shortcut1", "residual1"] and config.shortcut_ranking == "separated"
    assert DiffoRAConfig(**config.to_dict()) == config
    for options, error, message in (
        ({"shortcuts": "residual1"}, TypeError, "must be a list"),
        ({"shortcuts": []}, ValueError, "leave it out"),
        ({"shortcuts": ["residual1", "residual1"]}, ValueError, "each once"),
        ({"shortcuts": ["residual3"]}, ValueError, "residual3.*'residual1'"),
        ({"shortcuts": [["residual1"]]}, ValueError, "must name"),
        ({"shortcut_ranking": "joint"}, ValueError, "shortcut_ranking='joint'.*'combined'"),
        ({"shortcuts": ["residual1"], "weight_sharing": "layer"}, ValueError, "weight_sharing='layer'.*none"),
    ):
        with pytest.raises(error, match=message):
            DiffoRAConfig(**options)


def test_refusals() -> None:
    model, _ = ready()
    with pytest.raises(ValueError, match="weight_sharing='model'.*remove_shortcuts"):
        ArchitectureSearch(model, DiffoRAConfig(weight_sharing="model"), loss_fn=model_loss)
    model.requires_grad_(False)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name)
    with pytest.raises(ValueError, match=r"shortcut 'model\.layers\.0\.residual1' is frozen.*is_trainable=True"):
        ModuleGrid.from_model(model)
    assert isinstance(model, PeftModel)


def test_time_of_steps_with_shortcuts() -> None:
    model, batches = ready()
    config = DiffoRAConfig(cost="time", selection_scope="model", max_step_time=0.9)
    search = ArchitectureSearch(model, config, loss_fn=model_loss)
    search.begin()
    trainable = {n for n, p in model.named_parameters() if p.requires_grad}
    search.measure_times(batches[0])
    assert all(s.enabled for s in shortcuts(model).values())
    assert trainable == {n for n, p in model.named_parameters() if p.requires_grad}
    assert search.step(batches[0]) is not None
    assert search.select().selected
