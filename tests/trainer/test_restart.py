"""Training that begins again on a trainer that was used: second runs, trials, smaller batches after memory ran out."""

from __future__ import annotations

import gc
import logging
import weakref
from pathlib import Path
from typing import Any

import optuna
import pytest
from peft import PeftModel, get_peft_model
from transformers import Trainer, TrainerCallback, set_seed

from diffora_trainer import Selection
from helpers.checks import adapter, assert_same, step_logs
from helpers.data import classification_dataset
from helpers.marks import mostly_slow
from helpers.trainers import CUT, SaveAt, classifier, lora, make_trainer, out_of_memory, running
from helpers.trials import Given


def build(folder: Path, **kwargs: Any) -> Trainer:
    kwargs["args"] = {"save_strategy": "steps", "save_steps": 1000, **kwargs.pop("args", {})}
    return make_trainer(folder, **{"callbacks": [SaveAt()], **kwargs})


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Trainer:
    set_seed(0)
    trainer = build(tmp_path_factory.mktemp("run"), task="llama")
    trainer.train()
    return trainer


def after(step: int, trainer: Trainer) -> dict[int, dict[str, float]]:
    return {at: log for at, log in step_logs(trainer).items() if at > step}


# A model in place of the trained one


def test_a_merged_model_is_saved_as_the_parent_saves_it(tmp_path: Path) -> None:
    """Beside the adapter of the run, of which the findings still tell, or in a folder of its own."""
    trainer = build(tmp_path / "run", task="llama")
    trainer.train()
    trainer.save_model()
    trainer.model = trainer.model.merge_and_unload()
    for folder, told in (("run", True), ("merged", False)):
        trainer.save_model(str(tmp_path / folder))
        assert (tmp_path / folder / "model.safetensors").is_file()
        for name in ("diffora_selection.json", "dam.png", "diffora_report.html", "adapter_config.json"):
            assert (tmp_path / folder / name).is_file() is told, name
    loaded = type(trainer.model).from_pretrained(tmp_path / "merged")
    assert_same(loaded.state_dict(), trainer.model.state_dict())


FATES = [{}, {"unselected": "freeze"}, {"weight_sharing": "model"}]


@pytest.mark.parametrize("search", mostly_slow(FATES, {}, {"unselected": "freeze"}), ids=str)
def test_findings_are_saved_with_the_adapter_that_they_describe(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, search: dict[str, str]
) -> None:
    trainer = build(tmp_path / "run", task="llama", search=search)
    trainer.train()
    trainer.save_model()
    files = ("diffora_selection.json", "dam.png", "diffora_report.html")
    # The run's own adapter, loaded again, is another object with the same modules.
    trainer.model = PeftModel.from_pretrained(classifier("llama").model, tmp_path / "run", is_trainable=True)
    trainer.save_model(str(tmp_path / "again"))
    assert all((tmp_path / "again" / name).is_file() for name in files)
    assert "is not the one of its run" not in caplog.text
    trainer.model = get_peft_model(classifier("llama").model, lora(task_type="SEQ_CLS", target_modules=["q_proj"]))
    trainer.save_model()
    assert "is not the one of its run" in caplog.text
    assert not any((tmp_path / "run" / name).is_file() for name in files)
    assert "LoRA modules" not in (tmp_path / "run" / "README.md").read_text()
    assert trainer.selection is not None


# Second runs


@pytest.mark.parametrize("step", mostly_slow([CUT, 10], 10))
def test_cut_trainer_goes_back_to_its_own_checkpoint(step: int, tmp_path: Path) -> None:
    trainer = build(tmp_path)
    trainer.train()
    selection, logs, weights = trainer.selection, after(step, trainer), adapter(trainer.model)
    trainer.train(resume_from_checkpoint=f"{tmp_path}/checkpoint-{step}")
    assert trainer.selection == selection
    assert_same(after(step, trainer), logs)
    assert_same(adapter(trainer.model), weights)


@pytest.mark.parametrize("stream", mostly_slow([False, True], True))
def test_checkpoint_of_a_second_training_resumes(stream: bool, tmp_path: Path) -> None:
    """No rows are held out of it, and a run that is resumed from its checkpoint reads them in the same order."""
    rows = classification_dataset(100)
    options = {"train_dataset": rows.to_iterable_dataset() if stream else rows.select(range(24))}
    trainer = build(tmp_path, **options)
    trainer.train()
    trainer.optimizer = None
    trainer.train()
    for step in (5, CUT, 10):
        resumed = build(tmp_path / "resumed", **options)
        resumed.train(resume_from_checkpoint=f"{tmp_path}/checkpoint-{step}")
        assert resumed.selection == trainer.selection
        assert_same(after(step, resumed), after(step, trainer), f"from {step}")
        assert_same(adapter(resumed.model), adapter(trainer.model), f"from {step}")


def test_failed_resumption_leaves_nothing_behind(whole: Trainer, tmp_path: Path, monkeypatch) -> None:
    for step in (5, 10):
        trainer = build(tmp_path / "new", task="llama")
        with monkeypatch.context() as patch:

            def fail(checkpoint: str) -> None:
                raise OSError("cannot be read")

            patch.setattr(trainer, "_load_optimizer_and_scheduler", fail)
            with pytest.raises(OSError, match="cannot be read"):
                trainer.train(resume_from_checkpoint=f"{whole.args.output_dir}/checkpoint-{step}")
        trainer.train()
        assert sorted(step_logs(trainer)) == list(range(1, 13))
        if step == 5:  # a search of its own, from the start
            assert trainer.selection.step == CUT
            assert step_logs(trainer)[1]["diffora/entropy"] == step_logs(whole)[1]["diffora/entropy"]
        else:  # the cut was made before the failure, and stays
            assert trainer.selection == whole.selection and "diffora/entropy" not in step_logs(trainer)[1]


def test_resumed_run_loads_the_best_model(tmp_path: Path) -> None:
    """From before the pruning, where the metric is best; and never on the trainer that has been cut since."""
    losses = {2: 0.1, 4: 0.2, 6: 0.3, 8: 0.8, 10: 0.5, 12: 0.7}
    settings = {"eval_strategy": "steps", "save_steps": 2, "eval_steps": 2, "load_best_model_at_end": True}

    def run(folder: Path) -> Trainer:
        trainer = make_trainer(
            folder, args={"save_strategy": "steps", **settings}, eval_dataset=classification_dataset(8, seed=5)
        )
        trainer.evaluate = lambda *args, **kwargs: {"eval_loss": losses[trainer.state.global_step]}
        return trainer

    first = run(tmp_path / "first")
    first.train()
    with pytest.raises(ValueError, match="before the pruning.*build a new trainer"):
        first.train(resume_from_checkpoint=f"{tmp_path}/first/checkpoint-4")
    for step in (4, 8):
        second = run(tmp_path / str(step))
        second.train(resume_from_checkpoint=f"{tmp_path}/first/checkpoint-{step}")
        assert Path(second.state.best_model_checkpoint) == tmp_path / str(step) / "checkpoint-10"
        assert second.selection == first.selection
        assert_same(adapter(second.model), adapter(first.model))


@pytest.mark.parametrize("best", mostly_slow([False, True], True))
def test_run_that_is_stopped_before_the_pruning_tells_of_its_choice(best: bool, tmp_path: Path) -> None:
    """Its metrics stand in its own log and report, and no checkpoint of other modules is loaded as the best."""

    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, model, **kwargs) -> None:
            control.should_training_stop = state.global_step == 6
            weights.append(adapter(model))

    weights: list[dict[str, Any]] = []
    args = {"eval_strategy": "steps", "save_strategy": "steps", "save_steps": 2, "eval_steps": 2}
    args["load_best_model_at_end"] = best
    trainer = make_trainer(
        tmp_path, "llama", args=args, search={"fold_gates": False}, eval_dataset=classification_dataset(8, seed=5)
    )
    trainer.evaluate = lambda *args, **kwargs: {"eval_loss": float(trainer.state.global_step)}  # best at step 2
    trainer.add_callback(stop := Stop())
    trainer.train()
    assert trainer.selection.step == 6 and trainer.state.best_model_checkpoint is None
    left = adapter(trainer.model)
    assert 0 < len(left) < len(weights[-1])
    assert_same(left, {name: weights[-1][name] for name in left})
    last = trainer.state.log_history[-1]
    assert last["diffora/selected_modules"] == len(trainer.selection.selected) and "train_runtime" in last
    trainer.save_model()
    report = tmp_path / "diffora_report.html"
    written = report.read_text(encoding="utf-8")
    assert "No log of the Trainer" not in written

    trainer.remove_callback(stop)
    trainer.train()
    assert not any("diffora" in key for log in trainer.state.log_history for key in log)
    trainer.save_model()
    assert report.read_text(encoding="utf-8") == written


# Smaller batches


def run(folder: Path, steps: tuple[int, ...] = (), batch: int = 4, checkpoint: str | None = None) -> Trainer:
    """A run in which memory runs out, or with no `steps` one whose batches are small from the start."""
    set_seed(0)
    args = {"auto_find_batch_size": bool(steps), "per_device_train_batch_size": batch}
    trainer = out_of_memory(build(folder, task="llama", args=args), *steps)
    trainer.train(resume_from_checkpoint=checkpoint)
    return trainer


@pytest.mark.parametrize(
    ("begun", "steps", "batch"),
    mostly_slow(
        [(0, (0,), 3), (0, (0, 0), 2), (5, (5,), 3), (5, (6, 7), 2), (CUT, (10,), 3), (10, (11,), 3)],
        (5, (6, 7), 2),
    ),
)
def test_smaller_batches_are_those_of_a_run_begun_with_them(
    begun: int, steps: tuple[int, ...], batch: int, whole: Trainer, tmp_path: Path
) -> None:
    checkpoint = f"{whole.args.output_dir}/checkpoint-{begun}" if begun else None
    found = run(tmp_path / "found", steps, checkpoint=checkpoint)
    asked = run(tmp_path / "asked", batch=batch, checkpoint=checkpoint)
    assert found.selection == asked.selection
    assert_same(after(begun, found), after(begun, asked))
    assert_same(adapter(found.model), adapter(asked.model))


def test_memory_that_runs_out_in_the_search_restarts_it(tmp_path: Path) -> None:
    steps = []

    class Watch(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs) -> None:
            run = running(trainer)
            steps.append(None if run is None else (run.search.method.steps, len(run.search.adapters.sites)))

    args = {"auto_find_batch_size": True}
    trainer = out_of_memory(build(tmp_path, task="llama", args=args), 6)
    trainer.add_callback(Watch())
    trainer.train()
    searched = [(0, 14)] * 4 + [(1, 14), (2, 14), (3, 14)]
    assert steps == [*searched, *searched, (4, 14), *[None] * 4]
    assert trainer.selection.step == CUT and sorted(step_logs(trainer)) == list(range(1, 13))


def test_memory_that_runs_out_after_the_cut(whole: Trainer, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The modules stay and training begins again, as the parent's does; one from before the pruning cannot."""
    with caplog.at_level(logging.WARNING, "diffora_trainer"):
        trainer = run(tmp_path, (9,))
    assert "The modules that were chosen stay" in caplog.text
    assert trainer.selection == whole.selection
    assert sorted(step_logs(trainer)) == list(range(1, 13)) and "diffora/entropy" not in step_logs(trainer)[1]
    resumed = build(tmp_path / "resumed", task="llama", args={"per_device_train_batch_size": 3})
    resumed.train(resume_from_checkpoint=f"{tmp_path}/checkpoint-10")
    assert_same(adapter(resumed.model), adapter(trainer.model))

    with pytest.raises(ValueError, match="before the pruning.*build a new trainer"):
        run(tmp_path / "late", (9,), checkpoint=f"{whole.args.output_dir}/checkpoint-5")


# Trials


def test_each_trial_of_a_hyperparameter_search_is_a_run_of_its_own(tmp_path: Path) -> None:
    rates, found, models = [1e-2, 1e-3, 1e-2], [], []

    class Watch(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs) -> None:
            if state.global_step == 5:
                gc.collect()
                assert sum(model() is not None for model in models) <= 1  # the trial before has left no model
                assert len(running(trainer).search.grid) == 14

        def on_train_begin(self, args, state, control, model, **kwargs) -> None:
            models.append(weakref.ref(model))

        def on_train_end(self, args, state, control, model, **kwargs) -> None:
            found.append((args.learning_rate, trainer.selection, adapter(model), step_logs(trainer)))

    settings = {"eval_strategy": "steps", "eval_steps": 6, "save_strategy": "steps", "save_steps": 6}
    evaluation = classification_dataset(8, seed=5)
    trainer = make_trainer(
        tmp_path, model=None, model_init=lambda: classifier("llama").model, args=settings, eval_dataset=evaluation
    )
    trainer.add_callback(Watch())
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    best = trainer.hyperparameter_search(
        hp_space=lambda trial: {"learning_rate": trial.suggest_categorical("learning_rate", [1e-2, 1e-3])},
        n_trials=3,
        backend="optuna",
        sampler=Given(rates),
    )
    assert [rate for rate, *_ in found] == rates
    assert best.hyperparameters["learning_rate"] in rates
    assert found[0][1] != found[1][1] and found[0][1].scores != found[1][1].scores
    for number, (rate, selection, weights, logs) in enumerate(found):
        alone = make_trainer(
            tmp_path / "alone",
            model=None,
            model_init=lambda: classifier("llama").model,
            args={**settings, "learning_rate": rate},
            eval_dataset=evaluation,
        )
        alone.train()
        assert selection == alone.selection
        assert_same(weights, adapter(alone.model))
        assert_same(logs, step_logs(alone))
        assert Selection.load(tmp_path / f"run-{number}/checkpoint-12") == selection
