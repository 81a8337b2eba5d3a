"""Shortcuts that are cut, kept, or switched off and on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from matplotlib.image import imread
from peft import get_peft_model
from torch import nn

from diffora_trainer import (
    ArchitectureSearch,
    Selection,
    ShortcutConfig,
    ShortcutModel,
    add_shortcuts,
    apply_selection,
)
from diffora_trainer.adapters.base import find_sites
from diffora_trainer.adapters.grid import AdapterGrid
from diffora_trainer.experimental.shortcuts.shortcuts import KINDS, keep_shortcuts, shortcuts
from diffora_trainer.experimental.shortcuts.structure import ATTRIBUTE
from diffora_trainer.hub.plots import plot_selection
from diffora_trainer.search.reallocation import Reallocation
from helpers.checks import assert_same, optimizer_state, snapshot
from helpers.models import bert, llama
from helpers.searches import make_search, model_loss, warm
from helpers.shortcuts import hooks, pairs, ready
from helpers.trainers import causal_model, classifier, lora, make_trainer, search_config


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
    assert 0 < len(selection.of_kind("shortcuts")) < len(selection.grid.of_kind("shortcuts"))
    assert 0 < len(selection.lora_modules) < len(selection.modules) - len(selection.grid.of_kind("shortcuts"))
    weights, moments = snapshot(model), optimizer_state(model, optimizer)
    apply_selection(model, selection, optimizer)

    names = [name for name, _ in model.named_parameters() if "lora_" in name or ATTRIBUTE in name]
    assert set(pairs(model)) == set(selection.selected) == set(find_sites(model, "default"))
    assert_same({n: t for n, t in snapshot(model).items() if n in names}, {n: weights[n] for n in names})
    assert_same(
        optimizer_state(model, optimizer), {n: moments[n] for n, _ in model.named_parameters() if n in moments}
    )
    assert {id(p) for group in optimizer.param_groups for p in group["params"]} == {
        id(p) for name, p in model.named_parameters() if name in names
    }

    stock = get_peft_model(llama().model, lora(target_modules=list(selection.lora_modules), task_type=tiny.task_type))
    add_shortcuts(stock, ShortcutConfig(r=3, names=selection.of_kind("shortcuts")))
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
    assert again == selection
    kinds = {record["name"]: record["kind"] for record in json.loads(selection.to_json())["modules"]}
    assert {name for name, kind in kinds.items() if kind == "shortcuts"} == set(selection.grid.of_kind("shortcuts"))
    assert f"and {len(selection.of_kind('shortcuts'))} of 7 shortcuts" in selection.summary()


def test_the_picture_shows_shortcuts(tmp_path: Path) -> None:
    model, batches = ready()
    search = make_search(model, "snip")
    search.score(batches)
    selection = search.select()
    lora_only = [position[1] for n, position in zip(selection.modules, selection.positions, strict=True)
                 if n not in selection.grid.of_kind('shortcuts')]  # fmt: skip
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
    off = [name for name in grid.of_kind("shortcuts") if name not in kept]
    assert off and set(kept) & set(grid.of_kind("shortcuts"))
    called: list[str] = []
    for name, shortcut in shortcuts(model).items():
        shortcut.register_forward_hook(lambda *_, name=name: called.append(name))
    reallocation.switch(on)
    loss = model_loss(model, batches[0])
    loss.backward()
    assert set(called) == set(kept) & set(grid.of_kind("shortcuts"))
    assert {name for name, pair in pairs(model).items() if pair[1].grad is not None} == set(kept)
    twin, _ = ready()
    twin.load_state_dict(model.state_dict())
    for name, module in find_sites(twin, "default").items():
        if name not in kept:
            nn.init.zeros_(module.parameters[1])
    torch.testing.assert_close(model_loss(twin, batches[0]), loss)
    assert not any(p.requires_grad for name in off for p in pairs(model)[name])
    # Scored as if they were on.
    reallocation.reallocate(batches, 1)
    assert reallocation.history[0].scores == tuple(expected.tolist())
    selection = reallocation.finish(2)
    assert all(shortcut.enabled for shortcut in shortcuts(model).values())
    apply_selection(model, selection)
    assert set(pairs(model)) == set(selection.selected)


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
    assert 0 < len(kept.of_kind("shortcuts")) < len(kept.grid.of_kind("shortcuts"))
    clean = classifier().model if task == "cls" else causal_model()
    loaded = ShortcutModel.from_pretrained(clean, tmp_path / "first", is_trainable=True)
    second = make_trainer(tmp_path / "second", task, model=loaded, peft_config=None, search=options)
    assert set(AdapterGrid.from_model(second.model).grid.names) == set(kept.selected)
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
