"""Trainers whose loss is in the training step: OnlineDPO, its kin, and others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import Trainer
from trl import GRPOTrainer

from diffora_trainer import DiffoRAConfig, DiffoRAMixin
from helpers.checks import adapter, assert_same, step_logs
from helpers.data import chat_dataset, tiny_tokenizer
from helpers.marks import mostly_slow
from helpers.models import llama_classifier
from helpers.parents import of_trl, searching
from helpers.rollouts import (
    ARCHITECTURE_STEPS,
    KEEP_ALL,
    SEARCHING,
    OnlineDPOTrainer,
    assert_stock_run,
    calls,
    prompts,
    rollout_trainer,
)
from helpers.trainers import VOCABULARY, arguments, causal_model, lora, make_trainer, search_config


def test_online_dpo_searches_without_a_trace(tmp_path: Path) -> None:
    """An architecture step generates and asks the reward for itself; but for that the run is the stock run."""
    own = prompts(8, seed=3)
    found = rollout_trainer(tmp_path, OnlineDPOTrainer, search=KEEP_ALL, arch_dataset=own)
    found.train()
    stock = rollout_trainer(tmp_path, OnlineDPOTrainer, cls=OnlineDPOTrainer)
    stock.train()
    assert_stock_run(found, stock)

    losses = [log["diffora/arch_loss"] for log in step_logs(found).values() if "diffora/arch_loss" in log]
    assert len(losses) == ARCHITECTURE_STEPS and all(loss > 0.1 for loss in losses)
    assert min(found.selection.gates) < 1
    held_out = set(own["prompt"])
    training = [call for call in calls(found) if not set(call[0]) <= held_out]
    assert training == calls(stock)
    assert len(calls(found)) - len(training) == ARCHITECTURE_STEPS
    assert "train" not in vars(found.model) and "backward" not in vars(found.accelerator)


@pytest.mark.parametrize(("name", "module"), [("XPO", "xpo"), ("NashMD", "nash_md")])
def test_its_kin_search_without_a_trace(name: str, module: str, tmp_path: Path) -> None:
    """They are in TRL 0.28 alone, where they take a model for the reward."""
    kin = pytest.importorskip(f"trl.experimental.{module}")
    parent = getattr(kin, f"{name}Trainer")

    class Searching(DiffoRAMixin, parent):  # type: ignore[misc, valid-type]
        pass

    found: list[Any] = []
    for cls in (Searching, parent):
        options = {"diffora_config": search_config(**KEEP_ALL), "arch_dataset": prompts(8, seed=3)}
        args = {"max_new_tokens": 6, "remove_unused_columns": False}
        trainer = cls(
            model=causal_model(),
            args=arguments(tmp_path, getattr(kin, f"{name}Config"), **args),
            train_dataset=prompts(),
            processing_class=tiny_tokenizer(),
            peft_config=lora(task_type="CAUSAL_LM"),
            reward_funcs=llama_classifier(VOCABULARY, num_labels=1).model,
            **(options if cls is Searching else {}),
            **({} if name == "NashMD" else {"reward_processing_classes": tiny_tokenizer()}),
        )
        trainer.train()
        found.append(trainer)
    assert_stock_run(*found)
    losses = [log for log in step_logs(found[0]).values() if "diffora/arch_loss" in log]
    assert len(losses) == ARCHITECTURE_STEPS and min(found[0].selection.gates) < 1


@pytest.mark.parametrize("checkpointing", mostly_slow([False, True], True))
def test_online_dpo_holds_out_chooses_and_resumes(checkpointing: bool, tmp_path: Path) -> None:
    args = {"save_strategy": "steps", "save_steps": 1, "gradient_checkpointing": checkpointing}
    whole = rollout_trainer(tmp_path, OnlineDPOTrainer, args=args)
    whole.train()
    assert 0 < len(whole.selection.selected) < len(whole.selection.modules)
    for step in (5, 10):
        resumed = rollout_trainer(
            tmp_path / str(step), OnlineDPOTrainer, args={"gradient_checkpointing": checkpointing}
        )
        resumed.train(resume_from_checkpoint=f"{tmp_path}/checkpoint-{step}")
        assert resumed.selection == whole.selection
        assert_same(adapter(resumed.model), adapter(whole.model))
    whole.save_model(tmp_path / "saved")
    assert_same(adapter(PeftModel.from_pretrained(causal_model(), tmp_path / "saved")), adapter(whole.model))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"search": {"method": "sigmoid", "arch_order": 2}}, "set `arch_order=1`"),
        ({"diffora_config": DiffoRAConfig(method="alpha_test")}, "set `method='snip'`"),
        ({"search": {"max_step_time": 0.7, "selection_scope": "model"}}, "set `max_step_time=None`"),
    ],
)
def test_what_a_generating_step_cannot_do_is_refused(options: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        rollout_trainer(tmp_path, OnlineDPOTrainer, **options)


def gkd_trainer(folder: Path, search: dict[str, Any], **args: Any) -> Any:
    parent, config = of_trl("GKD")
    return searching(parent)(
        model=causal_model(),
        teacher_model=causal_model(num_hidden_layers=1).eval(),
        args=arguments(folder, config, max_new_tokens=4, max_length=64, **args),
        train_dataset=chat_dataset(8),
        processing_class=tiny_tokenizer(),
        peft_config=lora(),
        diffora_config=search_config(**search),
    )


@pytest.mark.parametrize("args", [{"lmbda": 0.5}, {"lmbda": 0.0, "seq_kd": True}], ids=str)
@pytest.mark.parametrize(
    ("search", "message"),
    [
        ({"prefix_cache": "memory"}, r"whose `training_step` generates.*`lmbda=0.0`"),
        ({"max_step_time": 0.7, "selection_scope": "model"}, r"generates in its `training_step`.*max_step_time=None"),
        ({"max_step_memory": 0.7, "selection_scope": "model"}, r"generates in.*`max_step_memory=None`"),
    ],
)
def test_what_a_step_that_generates_in_the_place_of_the_data_cannot_do_is_refused(
    search: dict[str, Any], message: str, args: dict[str, Any], tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        gkd_trainer(tmp_path, search, **args)
    trainer = gkd_trainer(tmp_path, search, lmbda=0.0, seq_kd=False)  # which generates nothing
    assert trainer.diffora_config.to_dict().items() >= search.items()


class OwnStepTrainer(Trainer):
    """Takes its loss in `training_step`, and the gradient without accelerate."""

    def training_step(self, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Tensor:
        model.train()
        loss = model(**self._prepare_inputs(inputs)).loss
        loss.backward()
        return loss.detach()


def test_a_loss_out_of_reach_is_refused_before_training(tmp_path: Path) -> None:
    class Searching(DiffoRAMixin, OwnStepTrainer):
        pass

    with pytest.raises(ValueError, match="which calls `backward` itself. Please override `compute_architecture_loss`"):
        make_trainer(tmp_path, cls=Searching)


@pytest.mark.parametrize("kind", ["plain", "own step", "GRPO", "OnlineDPO"])
def test_architecture_loss_can_be_overridden(kind: str, tmp_path: Path) -> None:
    """The hook decides what the matrix is moved by, in any trainer."""
    parent = {"plain": Trainer, "own step": OwnStepTrainer, "GRPO": GRPOTrainer, "OnlineDPO": OnlineDPOTrainer}[kind]

    class Searching(DiffoRAMixin, parent):  # type: ignore[misc, valid-type]
        seen: list[set[str]] = []

        def compute_architecture_loss(self, model: nn.Module, inputs: Any) -> Tensor:
            self.seen.append(set(inputs))
            ids = torch.arange(5, 17).reshape(2, 6)
            return 2.0 + 0 * model(input_ids=ids).logits.float().square().mean()

    if parent in SEARCHING:
        trainer = rollout_trainer(tmp_path, parent, cls=Searching)
    else:
        trainer = make_trainer(tmp_path, cls=Searching)
    trainer.train()
    losses = [log["diffora/arch_loss"] for log in step_logs(trainer).values() if "diffora/arch_loss" in log]
    assert losses == [2.0] * ARCHITECTURE_STEPS
    column = {"GRPO": "completion_ids", "OnlineDPO": "prompt"}.get(kind, "input_ids")
    assert all(column in keys for keys in Searching.seen)
    if parent in SEARCHING:
        assert len(calls(trainer)) == 12  # the reward is asked for training alone
