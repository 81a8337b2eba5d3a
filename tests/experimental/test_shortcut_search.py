"""A search among LoRA modules and shortcuts: what is scored, how they are compared, and what a cut leaves."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import HfArgumentParser

from diffora_trainer import (
    ArchitectureSearch,
    DiffoRAConfig,
    Selection,
    add_shortcuts,
)
from diffora_trainer.adapters.grid import AdapterGrid
from diffora_trainer.experimental.shortcuts.shortcuts import KINDS, shortcuts
from diffora_trainer.experimental.shortcuts.structure import ATTRIBUTE
from helpers.checks import assert_same, snapshot
from helpers.models import bert, llama, opt
from helpers.options import make_config
from helpers.searches import by_hand, make_search, model_loss, warm
from helpers.shortcuts import pairs, ready
from helpers.trainers import lora, make_trainer


def test_shortcuts_stand_in_the_grid() -> None:
    model, _ = ready()
    plain = AdapterGrid.from_model(warm()[0]).grid
    grid = AdapterGrid.from_model(model).grid
    assert grid.rows == plain.rows and grid.columns == (*plain.columns, *KINDS)
    assert set(grid.names) == {*plain.names, *shortcuts(model)} == set(pairs(model))
    assert grid.of_kind("shortcuts") == tuple(n for n in grid.names if n in shortcuts(model))
    assert [
        n for n, is_one in zip(grid.names, [kind == "shortcuts" for kind in grid.kinds], strict=True) if is_one
    ] == list(grid.of_kind("shortcuts"))
    sizes = {name: sum(p.numel() for p in found) for name, found in pairs(model).items()}
    assert grid.parameters == tuple(sizes[name] for name in grid.names)
    for name, (row, column) in zip(grid.names, grid.positions, strict=True):
        assert f"{grid.rows[row]}.{grid.columns[column]}" == name
    assert grid.describe().startswith("14 LoRA modules and 7 shortcuts in 2 layers x 11 kinds")
    # Layers without LoRA keep their place.
    model = get_peft_model(llama().model, lora(target_modules=["layers.1.self_attn.q_proj"]))
    add_shortcuts(model)
    assert AdapterGrid.from_model(model).grid.rows == plain.rows


@pytest.mark.parametrize("kind", [llama, bert, opt])
@pytest.mark.parametrize("method", ["grad_norm", "snip", "synflow"])
def test_formulas_hold_for_shortcuts(method: str, kind: Any) -> None:
    model, batches = ready(kind())
    raw = make_search(model, method, shortcut_ranking="separated", loss_scale=lambda: 64.0)
    found = raw.score(batches)
    direct = by_hand(method, model, batches, lambda twin: [pairs(twin)[name] for name in raw.grid.names])
    expected = torch.tensor(direct, dtype=torch.float64)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=float(expected.max()) * 1e-6)
    ours = torch.tensor([kind == "shortcuts" for kind in raw.grid.kinds])
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
        for name, rise in zip(search.grid.names, search.method._tie_breaker.tolist(), strict=True):
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
    _, gates = search._gradient.first_order(batches[0], torch.ones(len(search.grid)))
    model_loss(model, batches[0]).backward()
    expected = torch.stack([(pairs(model)[name][1] * pairs(model)[name][1].grad).sum() for name in search.grid.names])
    torch.testing.assert_close(gates, expected, rtol=1e-3, atol=1e-6)
    assert (expected[torch.tensor([kind == "shortcuts" for kind in search.grid.kinds])] != 0).all()


def planted(good: set[str], unit: float) -> Any:
    """A score function that gives every name of `good` more than any other of its kind; shortcuts in another unit."""

    def scores(model: nn.Module, batches: list[Any]) -> dict[str, float]:
        grid = AdapterGrid.from_model(model).grid
        return {
            name: (1.0 + 0.01 * index + 5.0 * (name in good)) * (unit if shortcut else 1.0)
            for index, (name, shortcut) in enumerate(
                zip(grid.names, [kind == "shortcuts" for kind in grid.kinds], strict=True)
            )
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
    assert len(selection.lora_modules) == 7 + (scope == "layer") and len(selection.of_kind("shortcuts")) == 4
    assert set(selection.selected) == {*selection.lora_modules, *selection.of_kind("shortcuts")}
    # Under a cap each has its part of it.
    cap = sum(selection.parameters) // 3
    selection = chosen(max_trainable_parameters=cap)
    size = dict(zip(selection.modules, selection.parameters, strict=True))
    part = sum(size[name] for name in selection.grid.of_kind("shortcuts")) / sum(selection.parameters)
    kept = sum(size[name] for name in selection.of_kind("shortcuts"))
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
        assert selection.lora_modules == (best,) and selection.of_kind("shortcuts")
        if "selection_ratio" in options:
            assert len(selection.selected) == 5
        else:
            assert selection.trainable_parameters <= 900


@pytest.mark.parametrize("ranking", ["combined", "separated"])
def test_dynamic_run(ranking: str, tmp_path: Path) -> None:
    """A trainer's run: the budget holds at each choice, and what is off waits with its state."""
    options = {"method": "grad_norm", "reallocate_every": 2, "selection_scope": "model", "score_batches": 2}
    trainer = make_trainer(tmp_path, "sft", search={**options, "shortcuts": list(KINDS), "shortcut_ranking": ranking})
    base = {n: t for n, t in snapshot(trainer.model).items() if "lora_" not in n and ATTRIBUTE not in n}
    trainer.train()
    selection = trainer.selection
    shortcut = [name in selection.grid.of_kind("shortcuts") for name in selection.modules]
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


def test_config(tmp_path: Path) -> None:
    (config,) = HfArgumentParser(DiffoRAConfig).parse_args_into_dataclasses(
        ["--shortcuts", "shortcut1", "residual1", "--shortcut_ranking", "separated"]
    )
    assert config.extra_sites == {"shortcuts": {"kinds": ["shortcut1", "residual1"], "ranking": "separated"}}
    assert make_config(**config.to_dict()) == config
    for options, error, message in (
        ({"shortcuts": "residual1"}, TypeError, "must be a list"),
        ({"shortcuts": []}, ValueError, "leave it out"),
        ({"shortcuts": ["residual1", "residual1"]}, ValueError, "each once"),
        ({"shortcuts": ["residual3"]}, ValueError, "residual3.*'residual1'"),
        ({"shortcuts": [["residual1"]]}, ValueError, "must name"),
        ({"shortcut_ranking": "joint"}, ValueError, "ranking='joint'.*'combined'"),
        ({"shortcuts": ["residual1"], "weight_sharing": "layer"}, ValueError, "weight_sharing='layer'.*none"),
    ):
        with pytest.raises(error, match=message):
            make_trainer(tmp_path, search=options)


def test_refusals() -> None:
    model, _ = ready()
    with pytest.raises(ValueError, match="weight_sharing='model'.*with shortcuts.*take them out of the model"):
        ArchitectureSearch(model, DiffoRAConfig(weight_sharing="model"), loss_fn=model_loss)
    model.requires_grad_(False)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name)
    with pytest.raises(ValueError, match=r"shortcut 'model\.layers\.0\.residual1' is frozen.*is_trainable=True"):
        AdapterGrid.from_model(model)
    assert isinstance(model, PeftModel)


def test_time_of_steps_with_shortcuts() -> None:
    model, batches = ready()
    config = DiffoRAConfig(selection_scope="model", max_step_time=1.0)
    search = ArchitectureSearch(model, config, loss_fn=model_loss)
    search.begin()
    trainable = {n for n, p in model.named_parameters() if p.requires_grad}
    search.measure_costs(batches[0])
    assert all(s.enabled for s in shortcuts(model).values())
    assert trainable == {n for n, p in model.named_parameters() if p.requires_grad}
    assert search.step(batches[0]) is not None
    assert search.select().selected
