"""Saving and loading of models with shortcuts, and what is refused."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn

from diffora_trainer import (
    ShortcutConfig,
    ShortcutModel,
    add_shortcuts,
    load_shortcuts,
    remove_shortcuts,
    save_shortcuts,
)
from diffora_trainer.experimental.shortcuts.files import SHORTCUT_CONFIG_NAME as CONFIG_NAME
from diffora_trainer.experimental.shortcuts.files import SHORTCUT_TENSORS_NAME as TENSORS_NAME
from diffora_trainer.experimental.shortcuts.shortcuts import shortcuts
from helpers.checks import assert_same
from helpers.models import bert, gemma, roberta, t5
from helpers.shortcuts import filled, hooks, result
from helpers.tiny_model import TinyModel
from helpers.trainers import lora


@pytest.mark.parametrize("adapted", [True, False])
def test_saved_shortcuts_load_with_one_call(adapted: bool, tmp_path: Path) -> None:
    tiny = bert()
    base = copy.deepcopy(tiny.model)
    inner = get_peft_model(tiny.model, lora(init_lora_weights=False)) if adapted else tiny.model
    filled(inner, ShortcutConfig(r=2, lora_alpha=3, kinds=["shortcut2", "residual1"], dropout=0.1))
    model = ShortcutModel(inner).eval()
    model.save_pretrained(tmp_path)
    loaded = ShortcutModel.from_pretrained(copy.deepcopy(base), tmp_path)
    assert_same(result(loaded, tiny.batch), result(model, tiny.batch))
    assert loaded.shortcut_config == model.shortcut_config and isinstance(loaded.model, PeftModel) == adapted
    assert not any(p.requires_grad for p in loaded.parameters())
    again = ShortcutModel.from_pretrained(copy.deepcopy(base), tmp_path, is_trainable=True)
    names = [n for n, p in again.named_parameters() if p.requires_grad]
    assert sum("diffora_shortcuts" in n for n in names) == 2 * len(shortcuts(again))
    assert any("lora_" in n for n in names) == adapted and len(names) == sum(
        "lora_" in n or "diff" in n for n in names
    )

    # Plain PEFT would leave the shortcuts out in silence.
    with pytest.raises(KeyError, match=r"use diffora_trainer\.ShortcutModel\.from_pretrained"):
        PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    if adapted:
        assert isinstance(PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "adapter"), PeftModel)


def test_a_checkpoint_of_the_adapter_stays_plain_peft(tmp_path: Path) -> None:
    model = get_peft_model(bert().model, lora())
    model.save_pretrained(tmp_path / "before")
    filled(model).save_pretrained(tmp_path / "after")
    name = "adapter_model.safetensors"
    assert (tmp_path / "before" / name).read_bytes() == (tmp_path / "after" / name).read_bytes()


def test_what_does_not_fit_is_refused_and_changes_nothing(tmp_path: Path) -> None:
    model = filled(bert().model, ShortcutConfig(r=2))
    save_shortcuts(model, tmp_path)
    fresh = bert().model
    assert_same(
        {n: [s.A, s.B] for n, s in load_shortcuts(fresh, tmp_path).items()},
        {n: [s.A, s.B] for n, s in shortcuts(model).items()},
    )
    load_shortcuts(fresh, tmp_path)  # into those that are there
    other = bert().model
    add_shortcuts(other, ShortcutConfig(r=3))
    with pytest.raises(ValueError, match="remove_shortcuts"):
        load_shortcuts(other, tmp_path)
    target = roberta().model
    with pytest.raises(ValueError, match=r"another model: \d+ tensors do not fit.*missing"):
        load_shortcuts(target, tmp_path)
    assert not shortcuts(target) and not hooks(target)

    target = bert().model
    text = (tmp_path / CONFIG_NAME).read_text()
    (tmp_path / CONFIG_NAME).write_text(text.replace('"r": 2', '"r": 4'))
    with pytest.raises(ValueError, match=r"\(2, 32\) there, and \(4, 32\)"):
        load_shortcuts(target, tmp_path)
    for wrong in ("{", "[]", '{"r": 2}', text.replace('"r": 2', '"r": 0'), text.replace(": 1,", ": 9,", 1)):
        (tmp_path / CONFIG_NAME).write_text(wrong)
        with pytest.raises(ValueError):
            load_shortcuts(target, tmp_path)
    (tmp_path / CONFIG_NAME).write_text(text)
    with torch.no_grad():
        next(iter(shortcuts(model).values())).B[0, 0] = float("nan")
    save_shortcuts(model, tmp_path)
    with pytest.raises(ValueError, match=r"residual1\.B' that are not finite"):
        load_shortcuts(target, tmp_path)
    (tmp_path / TENSORS_NAME).write_bytes((tmp_path / TENSORS_NAME).read_bytes()[:-5])
    with pytest.raises(ValueError, match="damaged"):
        load_shortcuts(target, tmp_path)
    (tmp_path / TENSORS_NAME).unlink()
    with pytest.raises(FileNotFoundError):
        load_shortcuts(target, tmp_path)
    assert not shortcuts(target) and not hooks(target)


@pytest.mark.parametrize(
    ("make", "found"),
    [
        (t5, r"layer \(ModuleList\)"),
        (gemma, "pre_feedforward_layernorm"),
        (lambda: TinyModel(nn.Linear(3, 3), {}, "", None, 0, 0), "0 numbered layers"),
    ],
)
def test_structures_that_are_not_understood_are_refused_by_their_children(make: object, found: str) -> None:
    model = make().model
    with pytest.raises(ValueError, match=found):
        add_shortcuts(model)
    assert not hooks(model) and not shortcuts(model)


def test_bad_use_is_refused() -> None:
    tiny = bert()
    with pytest.raises(ValueError, match="no shortcuts"):
        save_shortcuts(tiny.model, "nowhere")
    with pytest.raises(TypeError, match="ShortcutConfig"):
        add_shortcuts(tiny.model, {"r": 2})
    add_shortcuts(tiny.model)
    with pytest.raises(ValueError, match="already"):
        add_shortcuts(tiny.model)
    remove_shortcuts(tiny.model)
    tiny.model.bert.encoder.layer[1].chunk_size_feed_forward = 4
    with pytest.raises(ValueError, match="chunk_size_feed_forward"):
        add_shortcuts(tiny.model)
    compiled = copy.deepcopy(tiny.model)
    compiled.compile()
    with pytest.raises(ValueError, match="compile"):
        add_shortcuts(compiled, ShortcutConfig(kinds=("residual1",)))


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"r": 0}, ValueError),
        ({"r": 2.0}, TypeError),
        ({"r": True}, TypeError),
        ({"lora_alpha": 0}, ValueError),
        ({"lora_alpha": float("inf")}, ValueError),
        ({"lora_alpha": "16"}, TypeError),
        ({"dropout": 1.0}, ValueError),
        ({"kinds": "residual1"}, TypeError),
        ({"kinds": []}, ValueError),
        ({"kinds": ["residual3"]}, ValueError),
        ({"kinds": ["residual1", "residual1"]}, ValueError),
    ],
)
def test_the_configuration_checks_its_values(options: dict[str, object], error: type[Exception]) -> None:
    with pytest.raises(error, match=f"`{next(iter(options))}"):
        ShortcutConfig(**options)


def test_the_configuration_is_json_both_ways() -> None:
    config = ShortcutConfig(r=3, lora_alpha=1.5, kinds=["shortcut1", "residual2"], dropout=0.25)
    assert config.kinds == ("residual2", "shortcut1")
    assert ShortcutConfig.from_json(config.to_json()) == config
    assert json.loads(config.to_json())["kinds"] == ["residual2", "shortcut1"]
