"""Runs that choose shortcuts lose nothing: resumed, saved, pushed, begun again, on several processes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import optuna
import pytest
import torch
from torch import nn
from transformers import Trainer, TrainerCallback
from trl import DPOConfig, DPOTrainer
from trl.trainer.utils import use_adapter

from diffora_trainer import DiffoRAMixin, Selection, ShortcutModel
from helpers.checks import adapter, assert_continues, assert_same, optimizer_state, step_logs
from helpers.data import classification_dataset, preference_dataset, tiny_tokenizer
from helpers.marks import mostly_slow
from helpers.processes import train
from helpers.shortcut_runs import (
    ALL,
    BLOB,
    DYNAMIC,
    JSON,
    MOMENTS,
    RUNS,
    SEARCHED,
    assert_chose,
    logits,
    shortcut_trainer,
    tensors,
)
from helpers.trainers import CUT, Probe, arguments, causal_model, classifier, lora, out_of_memory, search_config
from helpers.trials import Given


# Resuming


@pytest.mark.parametrize(
    ("name", "moment"),
    [
        *mostly_slow(
            (("classifier", moment) for moment in MOMENTS), ("classifier", "search"), ("classifier", "selected")
        ),
        *mostly_slow(
            (("sft, accumulated", moment) for moment in ("search", "cut", "closing")), ("sft, accumulated", "cut")
        ),
        pytest.param("scored once", "cut", marks=pytest.mark.slow),
        *mostly_slow((("reallocated", moment) for moment in ("search", "cut")), ("reallocated", "cut")),
    ],
)
def test_resumed_run_is_the_uninterrupted_run(name: str, moment: str, runs: Any, tmp_path: Path) -> None:
    whole, step = runs(name), MOMENTS[moment]
    assert_chose(whole)
    task, options = RUNS[name]
    checkpoint = Path(whole.args.output_dir, f"checkpoint-{step}")
    state = json.loads((checkpoint / "diffora_state.json").read_text())
    if name == "reallocated" and step < CUT:
        off = [name for name, on in zip(state["modules"], state["history"][-1]["on"], strict=True) if not on]
        assert set(off) & set(whole.selection.grid.of_kind("shortcuts"))
    resumed = shortcut_trainer(tmp_path, task, **options)
    resumed.train(resume_from_checkpoint=str(checkpoint))

    assert_continues(resumed, whole, step)
    assert_same(tensors(resumed.model), tensors(whole.model))
    states = [optimizer_state(trainer.model, trainer.optimizer) for trainer in (whole, resumed)]
    assert_same(*states)
    assert sum("diffora_shortcuts" in name for name in states[0]) == 2 * len(whole.selection.of_kind("shortcuts"))


@pytest.mark.slow
def test_stream_resumes(tmp_path: Path) -> None:
    def run(folder: Path, checkpoint: Path | None = None) -> Trainer:
        trainer = shortcut_trainer(folder, train_dataset=classification_dataset(100).to_iterable_dataset())
        trainer.train(resume_from_checkpoint=checkpoint and str(checkpoint))
        return trainer

    whole = run(tmp_path / "whole")
    resumed = run(tmp_path / "resumed", tmp_path / "whole/checkpoint-5")
    assert_chose(whole)
    assert_continues(resumed, whole, 5)
    assert_same(tensors(resumed.model), tensors(whole.model))


# The Trainer's own ways


@pytest.mark.parametrize("alone", [False, True], ids=["with states", "models alone"])
def test_best_model_is_loaded_with_its_shortcuts(alone: bool, tmp_path: Path) -> None:
    """From after the cut, though losses before it were lower, and with all but two checkpoints rotated away."""
    losses = {2: 0.1, 4: 0.2, 6: 0.3, 8: 0.8, 10: 0.5, 12: 0.7}
    every = {"save_steps": 2, "eval_steps": 2, "eval_strategy": "steps", "save_total_limit": 2}
    args = {**every, "load_best_model_at_end": True, "save_only_model": alone}
    trainer = shortcut_trainer(tmp_path, callbacks=[], args=args, eval_dataset=classification_dataset(8, seed=5))
    trainer.evaluate = lambda *args, **kwargs: {"eval_loss": losses[trainer.state.global_step]}
    trainer.add_callback(held := Probe(lambda model, **_: (tensors(model), adapter(model)), 10, 12))
    trainer.train()
    assert_chose(trainer)
    best = tmp_path / "checkpoint-10"
    assert Path(trainer.state.best_model_checkpoint) == best
    assert_same((tensors(trainer.model), adapter(trainer.model)), held.found[10])
    assert not any(map(torch.equal, held.found[10][0].values(), held.found[12][0].values()))
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-10", "checkpoint-12"]
    loaded = ShortcutModel.from_pretrained(classifier().model, best)
    assert torch.equal(logits(loaded), logits(trainer.model))
    if alone:
        with pytest.raises(ValueError, match="(?s)save_only_model=True.*please start a new run"):
            shortcut_trainer(tmp_path).train(resume_from_checkpoint=True)
    else:
        again = shortcut_trainer(tmp_path / "again", callbacks=[])
        again.train(resume_from_checkpoint=str(best))
        assert_same(tensors(again.model), held.found[12][0])


def test_second_training_is_that_of_the_chosen_ones(tmp_path: Path) -> None:
    """Its checkpoint resumes, and the trainer goes back to one of its first training after the cut."""
    trainer = shortcut_trainer(tmp_path)
    trainer.train()
    selection, first = trainer.selection, tensors(trainer.model)
    trainer.train(resume_from_checkpoint=f"{tmp_path}/checkpoint-{CUT}")
    assert trainer.selection == selection
    assert_same(tensors(trainer.model), first)
    trainer.optimizer = None
    trainer.train()
    assert trainer.selection == selection and "diffora/entropy" not in step_logs(trainer)[1]
    assert not any(map(torch.equal, first.values(), tensors(trainer.model).values()))
    assert_chose(trainer)
    resumed = shortcut_trainer(tmp_path / "resumed")
    resumed.train(resume_from_checkpoint=f"{tmp_path}/checkpoint-5")
    assert_continues(resumed, trainer, 5)
    assert_same(tensors(resumed.model), tensors(trainer.model))
    assert_same(*(optimizer_state(t.model, t.optimizer) for t in (trainer, resumed)))


@pytest.mark.slow
def test_each_trial_of_a_hyperparameter_search_has_its_own_shortcuts(tmp_path: Path) -> None:
    rates, found = [1e-2, 1e-3], []
    settings = {"eval_strategy": "steps", "eval_steps": 12, "save_strategy": "no"}
    given = {
        "model": None,
        "model_init": lambda: classifier().model,
        "eval_dataset": classification_dataset(8, seed=5),
        "callbacks": [],
    }
    trainer = shortcut_trainer(tmp_path, args=settings, **given)

    class Watch(TrainerCallback):
        def on_train_end(self, args: Any, state: Any, control: Any, model: Any, **kwargs: Any) -> None:
            found.append((args.learning_rate, trainer.selection, tensors(model), step_logs(trainer)))

    trainer.add_callback(Watch())
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    trainer.hyperparameter_search(
        hp_space=lambda trial: {"learning_rate": trial.suggest_categorical("learning_rate", rates)},
        n_trials=2,
        backend="optuna",
        sampler=Given(rates),
    )
    assert [rate for rate, *_ in found] == rates
    rate, selection, weights, logs = found[1]
    alone = shortcut_trainer(tmp_path / "alone", args={**settings, "learning_rate": rate}, **given)
    alone.train()
    assert_chose(alone)
    assert selection == alone.selection
    assert_same((weights, logs), (tensors(alone.model), step_logs(alone)))


@pytest.mark.parametrize("begun", [5, pytest.param(10, marks=pytest.mark.slow)])
def test_smaller_batches_are_those_of_a_run_begun_with_them(begun: int, runs: Any, tmp_path: Path) -> None:
    """Memory runs out in the search, or after the cut."""
    checkpoint = f"{runs('classifier').args.output_dir}/checkpoint-{begun}"

    def run(folder: Path, batch: int, *steps: int) -> Trainer:
        args = {"auto_find_batch_size": bool(steps), "per_device_train_batch_size": batch}
        trainer = out_of_memory(shortcut_trainer(folder, args=args), *steps)
        trainer.train(resume_from_checkpoint=checkpoint)
        return trainer

    found, asked = run(tmp_path / "found", 4, begun + 1), run(tmp_path / "asked", 3)
    assert_chose(found)
    assert_continues(found, asked, begun)
    assert_same(tensors(found.model), tensors(asked.model))


@pytest.mark.parametrize(
    "search",
    [pytest.param(SEARCHED, id="searched", marks=pytest.mark.slow), pytest.param(DYNAMIC, id="reallocated")],
)
def test_gradient_checkpointing_changes_nothing(search: dict[str, Any], tmp_path: Path) -> None:
    found = []
    for checkpointing in (False, True):
        args = {"gradient_checkpointing": checkpointing, "gradient_checkpointing_kwargs": {"use_reentrant": False}}
        trainer = shortcut_trainer(tmp_path, "sft", args={**args, "save_strategy": "no"}, search=search, callbacks=[])
        trainer.train()
        assert_chose(trainer)
        assert any(getattr(m, "gradient_checkpointing", False) for m in trainer.model.modules()) == checkpointing
        found.append((trainer.selection.kept, {step: log["loss"] for step, log in step_logs(trainer).items()}))
    assert found[0][0] == found[1][0]
    assert found[0][1] == pytest.approx(found[1][1], rel=1e-4)


class DiffoRADPOTrainer(DiffoRAMixin, DPOTrainer):
    pass


def test_the_reference_of_dpo_is_the_base_model(tmp_path: Path) -> None:
    """The adapter is switched off for it, and so are the shortcuts, in the search and after the cut."""
    trainer = DiffoRADPOTrainer(
        model=causal_model(attention_dropout=0.0),
        args=arguments(tmp_path, DPOConfig),
        train_dataset=preference_dataset(24),
        processing_class=tiny_tokenizer(),
        peft_config=lora(),
        diffora_config=search_config(**SEARCHED),
    )
    base, checked = causal_model(attention_dropout=0.0), []
    expected = logits(base)

    def compare(decoder: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        if trainer.model._adapters_disabled:  # a pass for the reference
            with torch.no_grad():
                same = torch.equal(output.last_hidden_state, base.model(*args, **kwargs).last_hidden_state)
            checked.append((trainer.state.global_step, same))

    trainer.model.get_base_model().model.register_forward_hook(compare, with_kwargs=True)
    trainer.train()
    assert_chose(trainer)
    assert {step for step, _ in checked} == set(range(12)) and all(same for _, same in checked)
    trained = logits(trainer.model)
    assert not torch.equal(trained, expected)
    with use_adapter(trainer.model, None):
        assert torch.equal(logits(trainer.model), expected)
    assert torch.equal(logits(trainer.model), trained)
    trainer.save_model()
    assert torch.equal(logits(ShortcutModel.from_pretrained(causal_model(), tmp_path)), trained)


# Several processes


@pytest.mark.slow
@pytest.mark.parametrize(
    "search",
    [
        {"method": "sigmoid", "fade_out": 0},  # scores that differ by little
        {"method": "random", "reallocate_every": 1, "selection_scope": "model", "selection_ratio": 0.25},
    ],
    ids=["searched", "reallocated"],
)
def test_two_processes_decide_as_one(search: dict[str, Any], tmp_path: Path) -> None:
    """With gradient accumulation and checkpointing, as one process on the same rows."""
    search = {"shortcuts": ALL, "shortcut_ranking": "separated", **search}
    args = {
        "gradient_checkpointing": True,
        "gradient_checkpointing_kwargs": {"use_reentrant": False},
        "ddp_find_unused_parameters": False,  # so that one that gets no gradient any more is an error
    }
    alone = train(None, tmp_path / "alone", search=search)[0]
    reports = train("ddp", tmp_path / "two", search=search, args=args, save_at=[5, 10])
    assert [report["wrapper"] for report in reports] == ["DistributedDataParallel"] * 2
    assert reports[0] == reports[1]
    report = reports[0]
    assert report["selected"] == alone["selected"] and 0 < len(report["selected_shortcuts"]) < 7
    assert report["scores"] == pytest.approx(alone["scores"], abs=1e-5)
    assert report["losses"] == pytest.approx(alone["losses"], abs=1e-4)
    for name, weights in alone["weights"].items():
        assert report["weights"][name] == pytest.approx(weights, abs=1e-4), name
    assert all(report["moved"]) and report["gathered"] == report["parameters"]
    assert report["optimized"] == report["trainable"]
    if "reallocate_every" in search:
        history = Selection.load(tmp_path / "two").history
        assert history == Selection.load(tmp_path / "alone").history and len({entry.on for entry in history}) == 5

    # What they saved together, and a run that goes on from it.
    model = ShortcutModel.from_pretrained(causal_model(attention_dropout=0.0), tmp_path / "two").model
    held = {name: p.flatten().tolist() for name, p in model.named_parameters() if name in report["weights"]}
    assert held == report["weights"]
    for step in (5, 10):
        assert {JSON, BLOB} <= {path.name for path in (tmp_path / f"two/checkpoint-{step}").iterdir()}
    resumed = train("ddp", tmp_path / "resumed", search=search, args=args, resume=f"{tmp_path}/two/checkpoint-5")
    for key in ("losses", "scores", "selected", "weights"):
        assert [r[key] for r in resumed] == [w[key] for w in reports], key
