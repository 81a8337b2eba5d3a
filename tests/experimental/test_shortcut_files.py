"""Damaged and hostile files of shortcuts."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor

from diffora_trainer import ShortcutModel, load_shortcuts
from diffora_trainer.experimental.shortcuts.files import ADAPTER_FOLDER, SHORTCUT_CONFIG_NAME, SHORTCUT_TENSORS_NAME
from diffora_trainer.trainer.checkpoint import newest_checkpoint
from helpers.checks import assert_continues, assert_same
from helpers.shortcut_runs import ALL, BLOB, JSON, SEARCHED, cut_short, remove, shortcut_trainer, tensors
from helpers.shortcuts import hooks
from helpers.trainers import classifier, lora


def edit(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        config = json.loads((folder / SHORTCUT_CONFIG_NAME).read_text())
        change(config)
        (folder / SHORTCUT_CONFIG_NAME).write_text(json.dumps(config))

    return damage


def put(name: str, content: str | bytes) -> Callable[[Path], None]:
    return lambda folder: (
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode()) and None
    )


def change_tensors(change: Callable[[dict[str, Tensor]], Any]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        content = load_file(folder / SHORTCUT_TENSORS_NAME)
        change(content)
        save_file(content, folder / SHORTCUT_TENSORS_NAME)

    return damage


def of_other_type(folder: Path) -> None:
    """A data type that the format knows and PyTorch does not."""
    path = folder / SHORTCUT_TENSORS_NAME
    content = path.read_bytes()
    size = int.from_bytes(content[:8], "little")
    header = content[8 : 8 + size].replace(b'"F32"', b'"U42"', 1)
    path.write_bytes(content[:8] + header + content[8 + size :])


DAMAGES: list[tuple[Callable[[Path], None], str]] = [
    (remove(JSON), JSON),
    (remove(BLOB), BLOB),
    (remove(JSON, BLOB), JSON),
    *((cut_short(name, left), name) for name in (JSON, BLOB) for left in (0.9, 0.1, 0)),
    (put(BLOB, b"\xff" * 5000), BLOB),
    (of_other_type, BLOB),
    (change_tensors(lambda t: t.pop(min(t))), BLOB),
    (change_tensors(lambda t: t.update(more=torch.zeros(2))), BLOB),
    (change_tensors(lambda t: t.update({min(t): torch.zeros(2, 2)})), BLOB),
    (change_tensors(lambda t: t[min(t)].fill_(float("nan"))), BLOB),
    (change_tensors(lambda t: t.update({min(t): torch.zeros(t[min(t)].shape, dtype=torch.int64)})), BLOB),
    (edit(lambda c: c.update(r=8)), JSON),
    (edit(lambda c: c.update(lora_alpha=9)), JSON),
    (edit(lambda c: c.update(dropout=0.5)), JSON),
    (edit(lambda c: c.update(kinds=["residual1", "residual2"], names=None)), JSON),
    (edit(lambda c: c.update(format=2)), JSON),
    (edit(lambda c: c.pop("r")), JSON),
    (edit(lambda c: c.update(more=1)), JSON),
    (put(f"{ADAPTER_FOLDER}/adapter_config.json", "{"), "adapter_config.json"),
    (remove(f"{ADAPTER_FOLDER}/adapter_model.safetensors"), "adapter_model.safetensors"),
]


HOSTILE: list[Callable[[Path], None]] = [
    put(JSON, "[" * 100_000),
    put(JSON, '{"a":' * 100_000),
    put(JSON, "{}" + " " * 1_000_000 + "x"),
    put(JSON, bytes(range(256))),
    put(JSON, "null"),
    put(JSON, '{"py/reduce": [{"py/type": "pathlib.Path.touch"}, {"py/tuple": ["executed"]}]}'),
    *(
        edit(lambda c, key=key, value=value: c.update({key: value}))
        for key, value in (
            ("names", ["../../x.residual1"]),
            ("names", ["/etc/passwd.residual1", "C:\\x.residual1"]),
            ("names", ["../../x"]),
            ("names", ["x" * 10_000_000 + ".residual1"]),
            ("names", ["\x1b[2J\u202e\ud800\n.residual1"]),
            ("names", ["__class__.__init__.residual1"]),
            ("names", [f"{number}.residual1" for number in range(100_000)]),
            ("names", "all"),
            ("names", [{"a": []}]),
            ("names", []),
            ("kinds", [["residual1"]]),
            ("kinds", ["../../x"] * 100_000),
            ("kinds", {"residual1": 1}),
            ("r", 10**18),
            ("r", 10**3000),
            ("r", "4"),
            ("r", True),
            ("r", float("nan")),
            ("lora_alpha", 10**3000),
            ("lora_alpha", float("inf")),
            ("lora_alpha", -1),
            ("dropout", 10**3000),
            ("dropout", float("nan")),
            ("format", {"x": 1}),
            ("format", None),
        )
    ),
]  # fmt: skip


def test_every_damage_is_named(runs: Any, tmp_path: Path) -> None:
    """Nothing is resumed from a damaged checkpoint, from before the cut or after it: no step can be taken."""
    whole = runs("classifier")
    for step in (5, 10):
        source = Path(whole.args.output_dir, f"checkpoint-{step}")
        trainer = shortcut_trainer(tmp_path / "resumed", callbacks=[])
        training_step, trainer.training_step = trainer.training_step, None
        for number, (damage, name) in enumerate(DAMAGES):
            checkpoint = tmp_path / str(number) / source.name
            shutil.copytree(source, checkpoint)
            damage(checkpoint)
            with pytest.raises(Exception) as error:
                trainer.train(resume_from_checkpoint=str(checkpoint))
            assert error.type is ValueError, (number, name, error.value)
            error.match(re.escape(name))
            assert "lease" in str(error.value) and len(str(error.value)) < 2000  # what to do
        trainer.training_step = training_step
        trainer.train(resume_from_checkpoint=str(source))
        assert_continues(trainer, whole, step)
        assert_same(tensors(trainer.model), tensors(whole.model))


def test_shortcuts_of_another_run_are_refused(runs: Any, tmp_path: Path) -> None:
    whole, changes = (
        runs("classifier"),
        {
            f"`r` of the shortcuts in {JSON}": {"r": 2},
            f"`lora_alpha` of the shortcuts in {JSON}": {"lora_alpha": 4},
            f"`dropout` of the shortcuts in {JSON}": {"lora_dropout": 0.1},
            "other LoRA modules.*`extra_sites` of the run": {},
        },
    )
    for step in (5, 10):
        for message, change in changes.items():
            search = SEARCHED if change else {**SEARCHED, "shortcuts": ALL[:2]}
            trainer = shortcut_trainer(tmp_path, peft_config=lora(**change), search=search)
            with pytest.raises(ValueError, match=f"(?s){message}"):
                trainer.train(resume_from_checkpoint=f"{whole.args.output_dir}/checkpoint-{step}")
    other = shortcut_trainer(tmp_path / "other", search={**SEARCHED, "selection_ratio": 0.2}, args={"seed": 3})
    other.train()
    mixed = tmp_path / "mixed" / "checkpoint-10"
    shutil.copytree(f"{whole.args.output_dir}/checkpoint-10", mixed)
    for name in (JSON, BLOB):
        shutil.copy(f"{tmp_path}/other/checkpoint-10/{name}", mixed)
        with pytest.raises(ValueError, match=f"{BLOB}.*does not fit diffora_state.json"):
            shortcut_trainer(tmp_path / "resumed").train(resume_from_checkpoint=str(mixed))


def test_newest_whole_checkpoint_is_taken(runs: Any, tmp_path: Path) -> None:
    whole = runs("classifier")
    shutil.copytree(whole.args.output_dir, tmp_path / "run")
    remove(BLOB)(tmp_path / "run/checkpoint-10")
    cut_short(JSON, 0.5)(tmp_path / "run/checkpoint-8")
    remove(JSON, BLOB, "adapter_config.json")(tmp_path / "run/checkpoint-7")
    found, passed = newest_checkpoint(tmp_path / "run")
    assert found == str(tmp_path / "run/checkpoint-5") and list(passed) == [f"checkpoint-{at}" for at in (10, 8, 7)]
    assert BLOB in passed["checkpoint-10"] and JSON in passed["checkpoint-8"] and JSON in passed["checkpoint-7"]
    trainer = shortcut_trainer(tmp_path / "run")
    trainer.train(resume_from_checkpoint=True)
    assert_continues(trainer, whole, 5)
    assert_same(tensors(trainer.model), tensors(whole.model))


def test_foreign_configurations_are_data(runs: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They execute nothing, write nothing, take no memory, leave the model as it was, and are told in short."""
    whole = runs("classifier")
    source = tmp_path / "inside" / "checkpoint-10"
    shutil.copytree(f"{whole.args.output_dir}/checkpoint-10", source)
    text = (source / JSON).read_text()
    monkeypatch.chdir(tmp_path / "inside")
    model = get_peft_model(classifier().model, lora(task_type="SEQ_CLS"))
    trainer = shortcut_trainer(tmp_path / "resumed", callbacks=[])
    names, held = [[name for name, _ in m.named_modules()] for m in (model, trainer.model)], hooks(model)
    before = sorted(tmp_path.rglob("*"))
    for number, hostile in enumerate(HOSTILE):
        hostile(source)
        for load in (
            lambda: ShortcutModel.from_pretrained(classifier().model, source),
            lambda: load_shortcuts(model, source),
            lambda: trainer.train(resume_from_checkpoint=str(source)),
        ):
            with pytest.raises(Exception) as error:
                load()
            assert error.type is ValueError, (number, error.value)
            told = str(error.value)
            assert "shortcut" in told and len(told) < 1500 and told.replace("\n", "").isprintable(), (number, told)
        assert [[name for name, _ in m.named_modules()] for m in (model, trainer.model)] == names
        assert hooks(model) == held
        (source / JSON).write_text(text)
    assert sorted(tmp_path.rglob("*")) == before
