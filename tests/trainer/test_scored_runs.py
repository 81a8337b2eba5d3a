"""Runs that choose by scores taken at one step."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor
from transformers import Trainer, TrainerCallback

from diffora_trainer import ArchitectureSearch, Selection
from diffora_trainer.adapters.grid import AdapterGrid
from diffora_trainer.methods.base import ScoreMethod
from helpers.checks import adapter, assert_continues, assert_same, step_logs
from helpers.data import lm_dataset
from helpers.marks import mostly_slow
from helpers.trainers import CUT, SAVES, classifier, lora, make_trainer, running, saving_trainer


METHODS = ("diffora", "grad_norm", "snip", "synflow", "alpha_test", "random", "custom")


SCORES = METHODS[1:-1]


@pytest.mark.parametrize("task", mostly_slow(["cls", "sft"], "cls"))
@pytest.mark.parametrize("method", SCORES)
def test_run(method: str, task: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All modules train as in a run of plain LoRA, the best-scored go on, and the adapter is plain PEFT."""
    seen: list[Tensor] = []
    take = ScoreMethod.set_scores
    monkeypatch.setattr(ScoreMethod, "set_scores", lambda self, s, t: (seen.append(s.clone()), take(self, s, t))[1])
    trainer = make_trainer(tmp_path, task, search={"method": method, "selection_scope": "model", "arch_warmup": 0})
    names = AdapterGrid.from_model(trainer.model).grid.names
    trainer.train()
    trainer.save_model()

    selection = trainer.selection
    assert selection is not None and selection == Selection.load(tmp_path)
    assert selection.step == CUT and selection.config["method"] == method
    assert len(seen) == 1 and selection.scores == tuple(seen[0].tolist()) and set(selection.gates) == {1.0}
    by_score = dict(zip(names, selection.scores, strict=True))
    assert min(by_score[name] for name in selection.selected) >= max(by_score[name] for name in selection.dropped)
    assert len(selection.selected) == (len(names) + 1) // 2
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert {key.split(".lora_")[0].removeprefix("base_model.model.") for key in saved if ".lora_" in key} == set(
        selection.selected
    )
    logs = step_logs(trainer)
    assert not [key for step, log in logs.items() if step != CUT for key in log if key.startswith("diffora")]
    assert logs[CUT]["diffora/score_max"] == max(selection.scores)
    assert not [key for key in logs[CUT] if key.startswith(("diffora/gate", "diffora/entropy"))]
    card = (tmp_path / "README.md").read_text()
    assert ("2406.14956" in card) == (method != "random") and "2502.08905" not in card
    assert "| `method` |" in card and "relaxation" not in card
    assert (tmp_path / "dam.png").stat().st_size > 1000


def test_scoring_leaves_no_trace_in_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With one and the same choice the runs of all methods are one run, in the middle of an epoch, with dropout."""
    monkeypatch.setattr(ScoreMethod, "discretize", lambda self: torch.arange(len(self.budget)) % 2 == 0)

    def run(method: str) -> tuple[Any, Any]:
        trainer = make_trainer(
            tmp_path / method,
            "sft",
            args={"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2},
            search={"method": method},
        )
        trainer.train()
        return step_logs(trainer, ("diffora/score",)), adapter(trainer.model)

    expected = run("random")
    for method in ("grad_norm", "snip", "synflow", "alpha_test"):
        assert_same(run(method), expected, method)


@pytest.mark.parametrize(("task", "method"), mostly_slow([("cls", "alpha_test"), ("sft", "snip")], ("sft", "snip")))
def test_resumed_run_is_the_uninterrupted_run(task: str, method: str, tmp_path: Path) -> None:
    search = {"method": method, "max_step_time": None}
    whole = saving_trainer(tmp_path / "whole", task, 2, search=search)
    whole.train()
    for step in SAVES:
        checkpoint = f"{whole.args.output_dir}/checkpoint-{step}"
        state = json.loads(Path(checkpoint, "diffora_state.json").read_text())
        assert state["phase"] == ("warm-up" if step < CUT else "selected")
        resumed = saving_trainer(tmp_path / str(step), task, 2, search=search)
        resumed.train(resume_from_checkpoint=checkpoint)
        assert_continues(resumed, whole, step)


def test_scored_after_the_first_step(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, search={"method": "snip", "discretize_at": 1})
    trainer.train()
    assert trainer.selection.step == 1


@pytest.mark.parametrize("limit", mostly_slow([None, 1.0], 1.0))
def test_scored_before_the_first_step(limit: float | None, tmp_path: Path) -> None:
    """Of an adapter that was trained before: the run is one of a plain LoRA of the chosen modules, from the start."""
    state = get_peft_model(classifier().model, lora(task_type="SEQ_CLS", init_lora_weights=False)).state_dict()

    def warmed() -> PeftModel:
        model = get_peft_model(classifier().model, lora(task_type="SEQ_CLS"))
        model.load_state_dict(state)
        return model

    def run(folder: str, method: str, **kwargs: Any) -> Any:
        options = {
            "method": method,
            "discretize_at": 0,
            "selection_ratio": 0.5,
            "selection_scope": "model",
            "max_step_time": limit,
        }
        args = {"save_strategy": "steps", "save_steps": 4}
        trainer = make_trainer(tmp_path / folder, peft_config=None, args=args, search=options, **kwargs)
        trainer.train(resume_from_checkpoint=kwargs.get("resume"))
        return trainer

    trainer = run("snip", "snip", model=warmed())
    selection = trainer.selection
    assert selection.step == 0 and len(selection.selected) < len(selection.modules)
    stock = get_peft_model(classifier().model, lora(task_type="SEQ_CLS", target_modules=list(selection.selected)))
    stock.load_state_dict({name: state.get(name, state.get(_unwrapped(name))) for name in stock.state_dict()})
    plain = make_trainer(tmp_path / "plain", model=stock, cls=Trainer)
    plain.train()
    assert_same(adapter(trainer.model), adapter(plain.model))
    resumed = make_trainer(
        tmp_path / "resumed",
        model=warmed(),
        peft_config=None,
        search={
            "method": "snip",
            "discretize_at": 0,
            "selection_ratio": 0.5,
            "selection_scope": "model",
            "max_step_time": limit,
        },
    )
    resumed.train(resume_from_checkpoint=str(tmp_path / "snip" / "checkpoint-4"))
    assert_continues(resumed, trainer, 4)

    with pytest.raises(ValueError, match="the score 0, .*an adapter that was trained before"):
        run("fresh", "snip", model=get_peft_model(classifier().model, lora(task_type="SEQ_CLS")))
    assert run("gradients", "grad_norm", model=get_peft_model(classifier().model, lora(task_type="SEQ_CLS"))).selection


def _unwrapped(name: str) -> str:
    """The name of a base weight in the model that has a LoRA around it."""
    head, _, last = name.rpartition(".")
    return f"{head}.base_layer.{last}"


def test_learning_rate_of_zero_is_explained(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, args={"warmup_steps": 4}, search={"method": "snip", "discretize_at": 1})
    with pytest.raises(ValueError, match="the score 0, .*learning rate is 0"):
        trainer.train()


def test_run_that_ends_before_the_scores_keeps_all(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, search={"method": "snip"})
    modules = len(AdapterGrid.from_model(trainer.model).grid)

    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step >= 4

    trainer.add_callback(Stop())
    trainer.train()
    assert trainer.selection is None and running(trainer) is None or not running(trainer).gates_active
    assert len(AdapterGrid.from_model(trainer.model).grid) == modules


def test_budget_of_time_and_stream(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[int] = []
    score = ArchitectureSearch.score
    monkeypatch.setattr(ArchitectureSearch, "score", lambda self, rows: (read.append(len(rows)), score(self, rows))[1])
    trainer = make_trainer(tmp_path, search={"method": "snip", "max_step_time": 1.0, "selection_ratio": 0.5})
    trainer.train()
    assert trainer.selection.times["predicted"] > 0
    trainer = make_trainer(
        tmp_path / "stream",
        "sft",
        train_dataset=Dataset.from_list(list(lm_dataset(48))).to_iterable_dataset(),
        search={"method": "snip", "score_batches": 3, "arch_split": 0.25},
    )
    trainer.train()
    assert trainer.selection.step == CUT and read == [1, 3]


def test_function_of_ones_own(tmp_path: Path) -> None:
    """It is called once, in evaluation mode, with batches on the device; what it returns is what is kept."""
    called: list[int] = []

    def last_ones(model: PeftModel, batches: list[dict[str, Tensor]]) -> dict[str, float]:
        called.append(len(batches))
        assert not model.training and model(**batches[0]).loss.requires_grad
        grid = AdapterGrid.from_model(model).grid
        return {f"base_model.model.{name}": index for index, name in enumerate(grid.names)}

    search = {"method": "custom", "selection_scope": "model", "arch_batch_size": 1, "score_batches": 2}
    trainer = make_trainer(tmp_path, score_function=last_ones, search=search)
    trainer.train()
    trainer.save_model()
    selection = trainer.selection
    assert called == [2] and selection.selected == selection.modules[-len(selection.selected) :]
    assert "by a function of the run's own" in (tmp_path / "README.md").read_text()
