"""Trainers that make their own completions (GRPO, RLOO), and those whose loss is in `training_step` (OnlineDPO)."""

from __future__ import annotations

import logging
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import Trainer
from trl import GRPOTrainer, RLOOTrainer

from diffora_trainer import DiffoRAConfig, DiffoRAMixin
from helpers.adapted import lora_layers
from helpers.checks import adapter, assert_same, step_logs
from helpers.data import prompt_completion_dataset, tiny_tokenizer
from helpers.marks import mostly_slow
from helpers.options import make_config
from helpers.parents import of_trl, searching
from helpers.rollouts import (
    ARCHITECTURE_STEPS,
    GENERATIONS,
    KEEP_ALL,
    DiffoRAGRPOTrainer,
    OnlineDPOTrainer,
    assert_stock_run,
    calls,
    prompts,
    rollout_trainer,
)
from helpers.trainers import CUT, WARMUP, arguments, causal_model, lora, make_trainer, search_config


# GRPO and RLOO


RUNS: dict[str, tuple[type[Trainer], dict[str, Any], dict[str, Any]]] = {
    "GRPO": (GRPOTrainer, {}, {}),
    "GRPO, parts of a group": (GRPOTrainer, {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}, {}),
    "GRPO, generations for two steps": (
        GRPOTrainer,
        {"steps_per_generation": 4, "gradient_accumulation_steps": 2, "beta": 0.1, "loss_type": "grpo"},
        {},
    ),
    "GRPO, steps repeated": (GRPOTrainer, {"num_iterations": 2, "gradient_checkpointing": True, "beta": 0.1}, {}),
    "GRPO, evaluated": (
        GRPOTrainer,
        {"eval_strategy": "steps", "eval_steps": 2, "per_device_eval_batch_size": 4, "log_completions": True},
        {"eval_dataset": prompts(2, seed=1)},
    ),
    "RLOO": (RLOOTrainer, {}, {}),
    "RLOO, generations for two steps": (
        RLOOTrainer,
        {"steps_per_generation": 4, "gradient_accumulation_steps": 2},
        {},
    ),
}


@pytest.mark.parametrize("name", mostly_slow(RUNS, "GRPO, evaluated", "GRPO, steps repeated", "RLOO"))
def test_run_is_the_stock_run(name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Where no gate acts, a run is the parent's to the last bit: prompts, groups, completions, calls of the reward,
    metrics and weights. Architecture steps add nothing to any of them."""
    parent, args, more = RUNS[name]
    found = rollout_trainer(tmp_path, parent, args=args, search=KEEP_ALL, **more)
    with caplog.at_level(logging.INFO, logger="diffora_trainer"):
        found.train()
    stock = rollout_trainer(tmp_path, parent, cls=parent, args=args, **more)
    stock.train()

    assert "on the completions of the training steps, with nothing held out" in caplog.text
    assert min(found.selection.gates) < 1  # the matrix has moved
    losses = [log for log in step_logs(found).values() if "diffora/arch_loss" in log]
    assert len(losses) == ARCHITECTURE_STEPS
    assert calls(found) == calls(stock)
    groups = [asked[start : start + GENERATIONS] for asked, _ in calls(found) for start in range(0, len(asked), 4)]
    assert all(len(set(group)) == 1 and len(group) == GENERATIONS for group in groups)
    assert_stock_run(found, stock)
    assert found._step == stock._step
    assert_same(found._logs, stock._logs)
    assert_same([dict(batch) for batch in found._buffered_inputs], [dict(b) for b in stock._buffered_inputs])


@pytest.mark.parametrize("parent", [GRPOTrainer, RLOOTrainer])
def test_modules_are_chosen(parent: type[Trainer], tmp_path: Path) -> None:
    """The choice is made, what remains is trained alone, and plain PEFT loads it."""
    trainer = rollout_trainer(tmp_path, parent, args={"per_device_train_batch_size": 8, "num_generations": 4})
    trainer.train()
    assert trainer.selection.step == CUT
    assert 0 < len(trainer.selection.selected) < len(trainer.selection.modules)
    # The values of such a loss tell nothing, so none is shown, and none makes the choice doubtful.
    assert not any("held_out" in key or "gap" in key for log in step_logs(trainer).values() for key in log)
    # What does is that so few steps rank the modules no better than chance.
    assert [
        note
        for note in trainer.selection.notes
        if "rank the modules that compete no more alike than chance" not in note
    ] == []
    assert trainer._held_out.rollouts is None  # nothing of the completions is kept

    trainer.save_model(tmp_path / "saved")
    reloaded = PeftModel.from_pretrained(causal_model(), tmp_path / "saved")
    assert_same(adapter(reloaded), adapter(trainer.model))
    batch = {"input_ids": torch.arange(5, 17).reshape(2, 6)}
    trainer.model.eval()
    with torch.no_grad():
        assert torch.equal(reloaded(**batch).logits, trainer.model(**batch).logits)


def test_gradient_is_taken_on_the_step_just_made(tmp_path: Path) -> None:
    """An architecture step is given, as a copy, what the training step before it was given."""

    class Noting(DiffoRAGRPOTrainer):
        trained: list[Any] = []
        searched: list[Any] = []

        def _prepare_inputs(self, generation_batch: Any) -> Any:
            inputs = {**super()._prepare_inputs(generation_batch), "column": torch.ones(1)}
            self.trained.append((self.state.global_step + 1, inputs))
            return inputs

        def compute_architecture_loss(self, model: nn.Module, inputs: Any) -> Tensor:
            if torch.is_grad_enabled():
                self.searched.append((self.state.global_step, inputs["column"]))
            loss = super().compute_architecture_loss(model, inputs)
            inputs.clear()  # it is the search's own
            return loss

    trainer = rollout_trainer(tmp_path, cls=Noting, args={"gradient_accumulation_steps": 2})
    trainer.train()
    last = dict(trainer.trained)  # the last micro-batch of each step
    assert [step for step, _ in trainer.searched] == list(range(WARMUP + 1, CUT + 1))
    assert all(column is last[step]["column"] for step, column in trainer.searched)


METHODS = ("snip", "grad_norm", "synflow", "reallocation", "custom", "sigmoid", "cka", "sora", "beamlora")


@pytest.mark.parametrize("name", METHODS)
def test_methods_read_the_latest_completions(name: str, tmp_path: Path) -> None:
    found: list[Any] = []

    def scores(model: nn.Module, batches: list[Any]) -> dict[str, float]:
        found.extend(batches)
        names = [key for key, module in model.named_modules() if hasattr(module, "lora_A")]
        return {key.removeprefix("base_model.model."): float(index) for index, key in enumerate(names)}

    options: dict[str, Any] = {"method": name, "discretize_at": CUT, "score_batches": 3}
    if name == "reallocation":
        options.update(method="snip", reallocate_every=2, arch_warmup=WARMUP)
    if name == "sigmoid":
        options = {"method": "sigmoid", "discretize_at": CUT, "arch_warmup": WARMUP}
    if name in ("sora", "beamlora"):  # reads none of them
        options = {"method": name, "discretize_at": CUT, "method_options": {"gate_learning_rate": 0.1}}
    trainer = rollout_trainer(
        tmp_path,
        diffora_config=make_config(**options),
        score_function=scores if name == "custom" else None,
    )
    trainer.train()
    assert trainer.selection.step == CUT
    assert 0 < sum(trainer.selection.ranks) < sum(trainer.selection.grid.ranks)  # "beamlora" keeps every module
    assert len(calls(trainer)) == 12
    if name == "custom":  # the last three micro-batches, the newest first
        assert len(found) == 3 and all("advantages" in batch for batch in found)


SAVES = {"warm-up": 2, "search": 5, "cut": CUT, "selected": 10}


@pytest.mark.parametrize("parent", mostly_slow([GRPOTrainer, RLOOTrainer], GRPOTrainer))
def test_run_resumes_in_every_phase(parent: type[Trainer], tmp_path: Path) -> None:
    """With completions made anew for each step, a resumed run is the whole one; TRL itself resumes no more than that,
    since it does not save completions that are left over."""
    args = {"save_strategy": "steps", "save_steps": 1}
    whole = rollout_trainer(tmp_path, parent, args=args)
    whole.train()
    for phase, step in SAVES.items():
        resumed = rollout_trainer(tmp_path / phase, parent)
        resumed.train(resume_from_checkpoint=f"{tmp_path}/checkpoint-{step}")
        assert resumed.state.global_step == 12 and resumed.selection == whole.selection, phase
        assert_same(adapter(resumed.model), adapter(whole.model), phase)


@pytest.mark.parametrize(
    "args",
    mostly_slow(
        [{"steps_per_generation": 4, "gradient_accumulation_steps": 2}, {"num_iterations": 2}],
        {"steps_per_generation": 4, "gradient_accumulation_steps": 2},
    ),
)
def test_run_with_completions_left_over_resumes(args: dict[str, Any], tmp_path: Path) -> None:
    """Exactly from a step after which new completions are made; from another one with new ones for its prompts."""
    whole = rollout_trainer(tmp_path, args={"save_strategy": "steps", "save_steps": 1, **args})
    whole.train()
    for step in (4, 5, 9, 10):
        resumed = rollout_trainer(tmp_path / str(step), args=args)
        resumed.train(resume_from_checkpoint=f"{tmp_path}/checkpoint-{step}")
        assert resumed.selection.step == CUT and resumed.state.global_step == 12
        losses = [log for log in step_logs(resumed).values() if "diffora/arch_loss" in log]
        # The log of the steps until the checkpoint is that of the run which made it.
        assert len(losses) == ARCHITECTURE_STEPS
        assert len(calls(resumed)) == math.ceil((12 - step) / 2)
        if step % 2 == 0:
            assert calls(resumed) == calls(whole)[step // 2 :]
            assert_same(adapter(resumed.model), adapter(whole.model), f"from step {step}")


def test_prompts_of_a_later_epoch_come_in_the_order_of_the_first(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """TRL's sampler forgets how often it has shuffled; nothing is said where that makes no difference."""
    args = {"save_strategy": "steps", "save_steps": 1}
    whole = rollout_trainer(tmp_path, train_dataset=prompts(5), args=args)
    whole.train()
    for step, exact in ((4, True), (7, False)):
        caplog.clear()
        resumed = rollout_trainer(tmp_path / str(step), train_dataset=prompts(5))
        resumed.train(resume_from_checkpoint=f"{tmp_path}/checkpoint-{step}")
        assert ([call[0] for call in calls(resumed)] == [call[0] for call in calls(whole)][step:]) is exact
        assert ("from epoch 2, and TRL's sampler" in caplog.text) is not exact


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "held-out data": ({"arch_dataset": prompts(8)}, "Please leave `arch_dataset` out"),
    "batch size": ({"search": {"arch_batch_size": 2}}, "Please leave `arch_batch_size` out"),
    "second order": ({"search": {"method": "sigmoid", "arch_order": 2}}, "set `arch_order=1`"),
    "scored at once": (
        {"diffora_config": DiffoRAConfig(method="snip", discretize_at=0)},
        "Please set `discretize_at=1` or later",
    ),
    "scored by loss": ({"diffora_config": DiffoRAConfig(method="alpha_test")}, "set `method='snip'`"),
    "time": ({"search": {"max_step_time": 0.7, "selection_scope": "model"}}, "set `max_step_time=None`"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_completions_cannot_do_is_refused(name: str, tmp_path: Path) -> None:
    options, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        rollout_trainer(tmp_path, **options)


def test_a_harmless_preparation_does_not_stop_holding_out(tmp_path: Path) -> None:
    """Only a trainer that generates is taken for one."""

    class Preparing(DiffoRAMixin, Trainer):
        def _prepare_inputs(self, inputs: Any) -> Any:
            return super()._prepare_inputs(inputs)

    class Parent(Trainer):
        def _prepare_inputs(self, inputs: Any) -> Any:
            return super()._prepare_inputs(inputs)

    class Searching(DiffoRAMixin, Parent):
        pass

    for cls in (Preparing, Searching):
        trainer = make_trainer(tmp_path, cls=cls)
        trainer.train()
        assert len(trainer._held_out.split.held_out) == 3 and trainer._held_out.rollouts is None


def with_vllm(parent: Any) -> Any:
    """A searching trainer whose arguments say at the end of its constructor that it generates with vLLM."""

    class Parent(parent):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.args.use_vllm = True

    class Searching(DiffoRAMixin, Parent):
        pass

    return Searching


@pytest.mark.parametrize(("method", "warned"), [("diffora", True), ("sora", True), ("snip", False)])
def test_vllm_knows_no_gates(method: str, warned: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rollout_trainer(tmp_path, cls=with_vllm(GRPOTrainer), diffora_config=DiffoRAConfig(method=method))
    assert ("vLLM generates with the LoRA of all modules and without gates" in caplog.text) == warned
    with pytest.raises(ValueError, match="set `use_vllm=False`"):
        rollout_trainer(tmp_path, OnlineDPOTrainer, cls=with_vllm(OnlineDPOTrainer))


# OnlineDPO


def distilling(folder: Path, search: dict[str, Any] | None = None) -> Any:
    """A trainer that searches, or the stock one."""
    parent, config = of_trl("Distillation")
    torch.manual_seed(1)
    cls: Any = parent if search is None else searching(parent)
    return cls(
        model=causal_model(),
        teacher_model=causal_model(num_hidden_layers=1).eval(),
        args=arguments(folder, config, max_completion_length=6),
        train_dataset=prompts(24),
        processing_class=tiny_tokenizer(),
        peft_config=lora(task_type="CAUSAL_LM"),
        **({} if search is None else {"diffora_config": search_config(**search)}),
    )


def test_distillation_is_the_stock_run(tmp_path: Path) -> None:
    """As long as all modules are kept; and what GRPO cannot do, it cannot either."""
    stock = distilling(tmp_path / "stock")
    stock.train()
    trainer = distilling(tmp_path, KEEP_ALL)
    trainer.train()
    assert_stock_run(trainer, stock)
    assert any("diffora/arch_loss" in log for log in step_logs(trainer).values())
    with pytest.raises(ValueError, match="which makes the completions that it trains on.*`max_step_time=None`"):
        distilling(tmp_path, {"max_step_time": 0.7, "selection_scope": "model"})


def self_distilling(folder: Path, **search: Any) -> Any:
    """With a teacher that is a mean of the adapter over the steps."""
    parent, config = of_trl("SDFT")
    rows = prompt_completion_dataset(24).rename_column("completion", "privileged_context")
    args = {"max_completion_length": 6, "num_generations": 1, "teacher_model_kind": "ema", "teacher_sync_steps": 1}
    return searching(parent)(
        model=causal_model(attention_dropout=0.0),
        args=arguments(folder, config, **args),
        train_dataset=rows,
        processing_class=tiny_tokenizer(),
        peft_config=lora(task_type="CAUSAL_LM"),
        diffora_config=search_config(**search),
    )


def test_a_teacher_that_averages_the_adapter(tmp_path: Path) -> None:
    """It keeps the modules that are pruned, and cannot follow a choice in ranks."""
    for search in ({"max_trainable_parameters": 3000}, {"method": "beamlora"}):
        with pytest.raises(ValueError, match="a mean of the adapter.*`selection_granularity='module'`"):
            self_distilling(tmp_path, **search)
    trainer = self_distilling(tmp_path)
    trainer.train()
    selection = trainer.selection
    assert 0 < len(selection.selected) < len(selection.modules)
    assert set(lora_layers(trainer.model, "default")) == set(selection.selected)
    teacher = lora_layers(trainer.model, "teacher")
    assert set(teacher) == set(selection.modules)
    assert all(layer.lora_B["teacher"].weight.any() for layer in teacher.values())
