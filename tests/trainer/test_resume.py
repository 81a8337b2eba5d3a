"""A run that is stopped and resumed is the run that was not stopped, bit for bit."""

from __future__ import annotations

import json
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from safetensors.torch import load_file
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments, set_seed
from trl import SFTTrainer

from diffora_trainer import DiffoRATrainer
from diffora_trainer.methods.frank_wolfe import FrankWolfe
from helpers.checks import adapter, assert_continues, assert_same, step_logs
from helpers.data import classification_dataset, lm_dataset
from helpers.marks import mostly_slow
from helpers.resumed_runs import RUNS
from helpers.trainers import (
    CUT,
    MOMENTS,
    SAVES,
    causal_model,
    classifier,
    lora,
    make_trainer,
    saving_trainer,
    task_rows,
)


class StopAt(TrainerCallback):
    """Ends training at a step as a signal would: nothing is done at its end, so nothing is cut there."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object) -> None:
        if state.global_step == self.step < state.max_steps:
            raise KeyboardInterrupt


def scores_of_pairs(matrix: FrankWolfe) -> torch.Tensor:
    """The last but one is the best, and the last of the modules that share a pair leads it."""
    rising = torch.arange(len(matrix.budget)).float()
    return torch.cat([rising[:-2], rising[-2:].flip(0)])


@pytest.fixture(scope="module")
def whole_runs(tmp_path_factory: pytest.TempPathFactory):
    """The uninterrupted run of a name, made once."""
    made: dict[str, Trainer] = {}

    def run(name: str) -> Trainer:
        if name not in made:
            task, accumulation, options = RUNS[name]
            made[name] = saving_trainer(tmp_path_factory.mktemp("run"), task, accumulation, **dict(options))
            with pytest.MonkeyPatch.context() as patch:
                if name.startswith("shared pairs"):
                    patch.setattr(FrankWolfe, "scores", scores_of_pairs)
                made[name].train()
        return made[name]

    return run


def test_a_checkpoint_with_another_adapter_beside_resumes(tmp_path: Path) -> None:
    def make(folder: Path, names: tuple[str, ...]) -> Any:
        model = get_peft_model(causal_model(), lora(task_type="CAUSAL_LM"))
        for name in names:
            model.add_adapter(name, lora(task_type="CAUSAL_LM"))
        return saving_trainer(folder, "sft", model=model, peft_config=None)

    whole = make(tmp_path, ("other",))
    whole.train()
    for step in (MOMENTS["search"], MOMENTS["selected"]):
        for names in ((), ("other",)):
            resumed = make(tmp_path / "resumed", names)
            resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
            assert_continues(resumed, whole, step)


@pytest.mark.parametrize("granularity", mostly_slow(["module", "rank", "component"], "rank"))
def test_a_run_whose_losses_were_not_finite_for_a_while_resumes(granularity: str, tmp_path: Path) -> None:
    class Overflows(DiffoRATrainer):
        def compute_architecture_loss(self, *args: Any) -> torch.Tensor:
            loss = super().compute_architecture_loss(*args)
            return loss * float("nan") if 4 <= self.state.global_step <= CUT else loss

    def make(folder: Path) -> Any:
        scope = {"selection_granularity": granularity, "selection_scope": "model"}
        return saving_trainer(folder, "cls", cls=Overflows, search=scope)

    whole = make(tmp_path)
    whole.train()
    for step in SAVES:
        if (checkpoint := tmp_path / f"checkpoint-{step}").is_dir():
            resumed = make(tmp_path / "resumed")
            resumed.train(resume_from_checkpoint=str(checkpoint))
            assert_same(adapter(resumed.model), adapter(whole.model))
            assert resumed.selection == whole.selection


@pytest.mark.parametrize(
    ("name", "moment"),
    [
        *((name, moment) for name in ("classifier", "sft, accumulated") for moment in MOMENTS),
        *((name, moment) for name in ("classifier, accumulated", "sft") for moment in ("search", "cut")),
        ("closing", "search"),
        ("closing", "cut"),
        ("components", "search"),
        ("components", "cut"),
        *(("frozen", moment) for moment in ("search", "cut", "selected")),
        ("sampled", "search"),
        ("sigmoid, second order", "search"),
        ("shared pairs", "cut"),
        ("shared pairs", "selected"),
    ],
)
def test_resumed_run_is_the_uninterrupted_run(name: str, moment: str, whole_runs, tmp_path: Path, monkeypatch) -> None:
    whole, step = whole_runs(name), MOMENTS[moment]
    task, accumulation, options = RUNS[name]
    resumed = saving_trainer(tmp_path, task, accumulation, **dict(options))
    checkpoint = f"{whole.args.output_dir}/checkpoint-{step}"
    saved = load_file(f"{checkpoint}/adapter_model.safetensors")
    assert not any("gate" in key.rpartition("lora_")[2] for key in saved)

    with monkeypatch.context() as patch:
        if name.startswith("shared pairs"):
            patch.setattr(FrankWolfe, "scores", scores_of_pairs)
        resumed.train(resume_from_checkpoint=checkpoint)

    assert_continues(resumed, whole, step)
    assert resumed.model.peft_config["default"].target_modules == whole.model.peft_config["default"].target_modules


@pytest.mark.parametrize("name", ["closing", "components", "shared pairs", "shared pairs, one removed"])
@pytest.mark.parametrize("moment", ["cut", "selected"])
def test_the_model_of_the_checkpoint_resumes(name: str, moment: str, whole_runs, tmp_path: Path) -> None:
    whole, step = whole_runs(name), MOMENTS[moment]
    task, accumulation, options = RUNS[name]
    checkpoint = f"{whole.args.output_dir}/checkpoint-{step}"
    base = classifier("llama" if task == "llama" else "bert").model
    model = PeftModel.from_pretrained(base, checkpoint, is_trainable=True)
    resumed = saving_trainer(tmp_path, task, accumulation, **{**options, "model": model, "peft_config": None})
    resumed.train(resume_from_checkpoint=checkpoint)
    assert_continues(resumed, whole, step)
    assert bool(whole.selection.dropped) == (name in ("closing", "shared pairs, one removed"))
    assert sum(p.numel() for p in resumed.model.parameters() if p.requires_grad) == sum(
        p.numel() for p in whole.model.parameters() if p.requires_grad
    )


@pytest.mark.parametrize("task", ["cls", "sft"])
def test_stream_resumes(task: str, tmp_path: Path) -> None:
    def run(folder: Path, checkpoint: str | None = None) -> Trainer:
        trainer = saving_trainer(folder, task, train_dataset=task_rows(task, 100).to_iterable_dataset())
        trainer.train(resume_from_checkpoint=checkpoint)
        return trainer

    whole = run(tmp_path / "whole")
    for step in SAVES:
        resumed = run(tmp_path / str(step), f"{tmp_path}/whole/checkpoint-{step}")
        assert_continues(resumed, whole, step)


def test_a_stream_that_is_resumed_beyond_its_first_epoch_is_warned_of(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The Trainer cannot know how far it was in it: it skips as many batches as there were steps, and finds none."""

    def warned(checkpoint: str | None = None) -> bool:
        stream = task_rows("cls", 24).to_iterable_dataset()  # six steps, or five without the held-out rows
        caplog.clear()
        with caplog.at_level("WARNING", "diffora_trainer"):
            saving_trainer(tmp_path, "cls", train_dataset=stream).train(resume_from_checkpoint=checkpoint)
        return "training goes on at the start of the data" in caplog.text

    assert not warned()
    checkpoints = {step: str(tmp_path / f"checkpoint-{step}") for step in SAVES}
    assert [warned(checkpoints[step]) for step in (MOMENTS["warm-up"], MOMENTS["selected"])] == [False, True]


def test_rotated_checkpoints_resume(whole_runs, tmp_path: Path) -> None:
    """With `save_total_limit` alone, whatever is left at any moment continues the run."""
    whole = whole_runs("classifier")

    def run(**args: object) -> Trainer:
        settings = {"save_strategy": "steps", "save_steps": 1, "save_total_limit": 2, **args}
        return make_trainer(tmp_path, args=settings)

    for stop in (4, CUT, 10, 12):  # each run goes on from what the one before has left
        trainer = run()
        trainer.add_callback(StopAt(stop))
        with suppress(KeyboardInterrupt):
            trainer.train(resume_from_checkpoint=True if stop > 4 else None)
        left = sorted(path.name for path in tmp_path.glob("checkpoint-*"))
        assert left == sorted(f"checkpoint-{step}" for step in (stop - 1, stop))
    assert trainer.selection == whole.selection
    assert_same(adapter(trainer.model), adapter(whole.model))


def _remove(checkpoint: Path) -> None:
    (checkpoint / "diffora_state.json").unlink()


def _truncate(checkpoint: Path) -> None:
    path = checkpoint / "diffora_state.json"
    path.write_text(path.read_text()[:-40])


def _truncate_tensors(checkpoint: Path) -> None:
    path = checkpoint / "diffora_state.safetensors"
    path.write_bytes(path.read_bytes()[:-8])


@pytest.mark.parametrize("damage", [_remove, _truncate, _truncate_tensors])
@pytest.mark.parametrize("moment", ["search", "selected"])
def test_damaged_state_is_refused(damage, moment: str, whole_runs, tmp_path: Path) -> None:
    whole = whole_runs("classifier")
    checkpoint = tmp_path / "checkpoint"
    shutil.copytree(f"{whole.args.output_dir}/checkpoint-{MOMENTS[moment]}", checkpoint)
    damage(checkpoint)
    trainer = saving_trainer(tmp_path / "resumed", "cls")
    with pytest.raises(ValueError, match=r"diffora_state\.(json|safetensors)"):
        trainer.train(resume_from_checkpoint=str(checkpoint))
    assert trainer.state.global_step == 0


def test_checkpoint_of_another_search_is_refused(whole_runs, tmp_path: Path) -> None:
    checkpoint = f"{whole_runs('classifier').args.output_dir}/checkpoint-{MOMENTS['search']}"
    changes = {
        "`selection_ratio` saved: None, now: 0.4": {"search": {"selection_ratio": 0.4}},
        f"`discretize_at` saved: {CUT}.0, now: {CUT + 1}.0": {"search": {"discretize_at": CUT + 1}},
        "other LoRA modules": {"peft_config": lora(target_modules=["query", "value"])},
        "the number of held-out rows": {"train_dataset": classification_dataset(40)},
    }
    for what, change in changes.items():
        trainer = saving_trainer(tmp_path, "cls", **change)
        with pytest.raises((ValueError, RuntimeError)) as error:
            trainer.train(resume_from_checkpoint=checkpoint)
        assert isinstance(error.value, ValueError) and what in str(error.value), what


def test_cut_trainer_refuses_an_earlier_checkpoint(whole_runs, tmp_path: Path) -> None:
    checkpoint = f"{whole_runs('classifier').args.output_dir}/checkpoint-{MOMENTS['search']}"
    trainer = saving_trainer(tmp_path, "cls")
    trainer.train()
    with pytest.raises(ValueError, match="before the pruning"):
        trainer.train(resume_from_checkpoint=checkpoint)


def test_best_model_is_from_after_the_cut(tmp_path: Path) -> None:
    """The best metric of the run comes before the pruning, where the model has other modules."""
    losses = {2: 0.1, 4: 0.2, 6: 0.3, 8: 0.8, 10: 0.5, 12: 0.7}
    trainer = make_trainer(
        tmp_path,
        args={
            "save_strategy": "steps",
            "eval_strategy": "steps",
            "save_steps": 2,
            "eval_steps": 2,
            "load_best_model_at_end": True,
            "save_total_limit": 2,
        },
        eval_dataset=classification_dataset(8, seed=5),
    )
    trainer.evaluate = lambda *args, **kwargs: {"eval_loss": losses[trainer.state.global_step]}
    trainer.train()
    assert trainer.state.best_global_step == 10
    assert Path(trainer.state.best_model_checkpoint).name == "checkpoint-10"
    assert_same(
        {key: value for key, value in sorted(adapter(trainer.model).items())},
        dict(sorted(load_file(tmp_path / "checkpoint-10" / "adapter_model.safetensors").items())),
    )
    assert trainer.model.peft_config["default"].target_modules == set(trainer.selection.selected)


def test_second_training_is_that_of_a_plain_lora(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path)
    trainer.train()
    selection, start = trainer.selection, adapter(trainer.model)
    trainer.optimizer = None  # the stock run that follows has fresh moments
    set_seed(3)
    trainer.train()

    # The same training by the parent, of a plain LoRA with these weights.
    config = lora(target_modules=list(selection.selected), task_type="SEQ_CLS")
    stock = make_trainer(tmp_path, cls=Trainer, model=get_peft_model(classifier().model, config), peft_config=None)
    set_peft_model_state_dict(stock.model, start)
    set_seed(3)
    stock.train()
    assert_same(step_logs(trainer), step_logs(stock))
    assert_same(adapter(trainer.model), adapter(stock.model))
    assert trainer.selection == selection


def test_checkpoint_from_before_the_cut_records_the_phase(whole_runs) -> None:
    folder = Path(whole_runs("classifier").args.output_dir)
    phases = [
        json.loads((folder / f"checkpoint-{step}" / "diffora_state.json").read_text())["phase"] for step in SAVES
    ]
    assert phases == ["warm-up", "search", "selected", "selected"]
    kept = [(folder / f"checkpoint-{step}" / "diffora_selection.json").is_file() for step in SAVES]
    assert kept == [False, False, True, True]


@pytest.mark.parametrize("way", ["loaded", "configured"])
@pytest.mark.parametrize("task", ["sft", "cls"])
def test_stock_trainer_goes_on_after_the_cut(task: str, way: str, tmp_path: Path) -> None:
    """
    A checkpoint of after the cut is that of a plain LoRA run of the chosen modules. The stock trainer goes on from it
    to the same end, with the adapter that the checkpoint holds, or with LoRA of the configuration that it holds.
    """
    held_out = lm_dataset(8, seed=1) if task == "sft" else classification_dataset(8, seed=1)
    args = {"max_steps": 16, "save_strategy": "steps", "save_steps": 4, "weight_decay": 0.1}
    whole = make_trainer(tmp_path, task, arch_dataset=held_out, args=args)
    whole.train()
    folder = str(tmp_path / "checkpoint-12")
    base: Any = causal_model() if task == "sft" else classifier().model
    if way == "loaded":
        model = PeftModel.from_pretrained(base, folder, is_trainable=True)
    else:
        config = LoraConfig.from_pretrained(folder)
        config.inference_mode = False
        model = get_peft_model(base, config)
    stock = make_trainer(
        tmp_path / "stock",
        task,
        cls=SFTTrainer if task == "sft" else Trainer,
        model=model,
        peft_config=None,
        args=args,
    )
    stock.train(resume_from_checkpoint=folder)
    assert_same(adapter(stock.model), adapter(whole.model))


def test_optimizer_state_without_the_empty_groups(tmp_path: Path) -> None:
    """As checkpoints of earlier versions have it, and of runs whose cut emptied a group."""
    args = {"save_strategy": "steps", "save_steps": 10}
    whole = make_trainer(tmp_path, "sft", args=args)
    whole.train()
    file = tmp_path / "checkpoint-10" / "optimizer.pt"
    state = torch.load(file)
    assert [bool(group["params"]) for group in state["param_groups"]] == [True, False]
    state["param_groups"].pop()
    torch.save(state, file)
    scheduler = torch.load(file.with_name("scheduler.pt"))
    scheduler.update({name: scheduler[name][:1] for name in ("base_lrs", "_last_lr", "lr_lambdas")})
    torch.save(scheduler, file.with_name("scheduler.pt"))
    resumed = make_trainer(tmp_path / "resumed", "sft", args=args)
    resumed.train(resume_from_checkpoint=str(file.parent))
    assert_continues(resumed, whole, 10)
