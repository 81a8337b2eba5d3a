"""What a run saves into a folder in which an earlier one has saved: nothing there tells of the earlier one."""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path
from typing import Any

import pytest
from transformers import TrainerCallback

from diffora_trainer import Selection
from diffora_trainer.cli import main
from helpers.checks import assert_continues
from helpers.trainers import classifier, make_trainer


FINDINGS = {"diffora_selection.json", "diffora_report.html", "dam.png"}
CHECKPOINTS = {"save_strategy": "steps", "save_steps": 6}


class Interrupt(TrainerCallback):
    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 7:
            raise KeyboardInterrupt


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def adapted(folder: Path) -> set[str]:
    return set(json.loads((folder / "adapter_config.json").read_text())["target_modules"])


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """The folder of a run that has chosen at step 4, with checkpoints, and that of a file of the user's."""
    trainer = make_trainer(tmp_path / "out", "sft", args=CHECKPOINTS, search={"discretize_at": 4})
    trainer.train()
    trainer.save_model()
    for folder in (tmp_path / "out", tmp_path / "out" / "checkpoint-6"):
        assert names(folder) >= FINDINGS
        (folder / "notes.txt").touch()
    return tmp_path / "out"


def test_a_checkpoint_from_before_the_choice_tells_of_none(
    out: Path, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def again(folder: Path) -> Any:
        return make_trainer(folder, "sft", args=CHECKPOINTS, search={"discretize_at": 9})

    trainer = again(out)
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # no new picture takes the place of the old one
    trainer.train()
    assert len(adapted(out / "checkpoint-6")) == 14
    assert not names(out / "checkpoint-6") & FINDINGS
    assert names(out / "checkpoint-6") >= {"notes.txt", "diffora_state.json", "diffora_state.safetensors", "README.md"}
    assert Selection.load(out / "checkpoint-12") == trainer.selection
    assert names(out / "checkpoint-12") & FINDINGS == {"diffora_selection.json", "diffora_report.html"}
    assert main(["show", str(out / "checkpoint-6")]) == 1
    assert "There is no" in capsys.readouterr().err
    # Nothing that a run is resumed from was lost.
    resumed = again(tmp_path / "resumed")
    resumed.train(resume_from_checkpoint=str(out / "checkpoint-6"))
    assert_continues(resumed, trainer, 6)


def test_an_adapter_without_a_choice_replaces_one_with_it(out: Path, caplog: pytest.LogCaptureFixture) -> None:
    chosen = Selection.load(out)
    trainer = make_trainer(out, "sft", args=CHECKPOINTS, search={"discretize_at": 9}, callbacks=[Interrupt()])
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    # So far the output has the adapter of the earlier run.
    assert adapted(out) == set(chosen.selected) and Selection.load(out) == chosen and names(out) >= FINDINGS
    (out / "dam.png").unlink()
    (out / "dam.png").mkdir()  # what cannot be removed is no reason not to save
    with caplog.at_level(logging.WARNING, logger="diffora_trainer"):
        trainer.save_model()
    assert len(adapted(out)) == 14 and names(out) & FINDINGS == {"dam.png"} and "notes.txt" in names(out)
    assert "dam.png is of another adapter" in caplog.text
    assert "## Chosen modules" not in (out / "README.md").read_text()


def test_a_checkpoint_after_the_choice_leaves_an_earlier_adapter_its_own(out: Path) -> None:
    """TRL writes the card of the output at each checkpoint."""

    def told() -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in out.iterdir() if path.name in {*FINDINGS, "README.md"}}

    before = told()
    trainer = make_trainer(
        out, "sft", args=CHECKPOINTS, search={"discretize_at": 4, "arch_seed": 1}, callbacks=[Interrupt()]
    )
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert Selection.load(out / "checkpoint-6") == trainer.selection is not None
    assert len(before) == 4 and told() == before
    trainer.save_model()
    assert Selection.load(out) == trainer.selection
    card = (out / "README.md").read_text(encoding="utf-8")
    assert adapted(out) == set(trainer.selection.selected)
    assert "| `arch_seed` | 1 |" in card and "## Quick start" in card


def test_weights_alone_have_no_state_of_an_earlier_run(out: Path) -> None:
    def again() -> Any:
        return make_trainer(out, "sft", args={**CHECKPOINTS, "save_only_model": True}, search={"arch_seed": 1})

    again().train()
    with pytest.raises(ValueError, match=r"no diffora_state\.json.*save_only_model"):
        again().train(resume_from_checkpoint=str(out / "checkpoint-6"))


@pytest.mark.parametrize("second", ["unnamed", "sft"])
def test_names_of_classes_are_those_of_the_adapter(second: str, tmp_path: Path) -> None:
    model = classifier().model
    model.config.id2label = {index: f"colour {index}" for index in range(model.config.num_labels)}
    make_trainer(tmp_path, model=model).save_model()
    assert "id2label.json" in names(tmp_path)
    trainer = make_trainer(tmp_path, "sft" if second == "sft" else "cls")
    trainer.create_model_card()
    assert "id2label.json" in names(tmp_path)  # beside the adapter of which it tells, still
    trainer.save_model()
    assert "id2label.json" not in names(tmp_path)
