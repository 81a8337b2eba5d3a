"""DPO and reward modelling with TRL's trainers."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import Trainer
from trl import DPOConfig, DPOTrainer, RewardConfig, RewardTrainer

from diffora_trainer import DiffoRAConfig, DiffoRAMixin
from helpers.adapted import lora_layers, wake
from helpers.checks import adapter, assert_same, assert_was_searched
from helpers.data import preference_dataset, tiny_tokenizer, vocabulary
from helpers.models import llama_classifier
from helpers.parents import kto_dataset, of_trl, searching
from helpers.rollouts import KEEP_ALL
from helpers.trainers import CUT, Probe, arguments, causal_model, classifier, lora, make_trainer, search_config


class DiffoRADPOTrainer(DiffoRAMixin, DPOTrainer):
    pass


class DiffoRARewardTrainer(DiffoRAMixin, RewardTrainer):
    pass


def dpo_trainer(
    folder: Path, model: nn.Module, config: LoraConfig | None, search: DiffoRAConfig | None = None, **overrides: Any
) -> Trainer:
    return DiffoRADPOTrainer(
        model=model,
        args=arguments(folder, DPOConfig, **overrides),
        train_dataset=preference_dataset(24),
        processing_class=tiny_tokenizer(),
        peft_config=config,
        diffora_config=search or search_config(),
    )


@dataclass
class Mean:
    """As TRL's `RunningMoments`."""

    value: float = 0.0
    count: int = 0

    def update(self, value: float) -> None:
        self.count += 1
        self.value += (value - self.value) / self.count


class RunningMeanTrainer(DPOTrainer):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.running = Mean()

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        loss = super().compute_loss(*args, **kwargs)
        self.running.update(float(loss))
        return loss


@pytest.mark.parametrize("case", ["own", "DPO", "BCO"])
def test_running_statistics_are_of_training_batches_alone(case: str, tmp_path: Path) -> None:
    """DPO with `loss_type="bco_pair"` and BCO have some in TRL 0.28, which shift their loss."""
    parent, args = (RunningMeanTrainer, DPOConfig) if case == "own" else of_trl(case)
    data = kto_dataset if case == "BCO" else preference_dataset
    found: list[dict[str, Any]] = []
    more: dict[str, Any] = {}
    for cls in (parent, searching(parent)):
        trainer = cls(
            model=causal_model(),
            args=arguments(tmp_path, args, **({"loss_type": "bco_pair"} if case == "DPO" else {})),
            train_dataset=data(24),
            processing_class=tiny_tokenizer(),
            peft_config=lora(task_type="CAUSAL_LM"),
            **more,
        )
        if not hasattr(trainer, "running"):
            pytest.skip("this version of TRL has no running statistics here")
        trainer.train()
        found.append({name: value for name, value in vars(trainer.running).items() if name != "accelerator"})
        held_out = trainer.train_dataset if case == "BCO" else data(8, seed=3)  # BCO's constructor prepares rows
        more = {"diffora_config": search_config(**KEEP_ALL), "arch_dataset": held_out}
    assert found[0] == found[1] and found[0]["count"] >= 1


def assert_saved_adapter_is_the_model(trainer: Trainer, base: nn.Module, folder: Path) -> None:
    """The adapter alone, on a fresh base model, gives the outputs of the trained model."""
    trainer.save_model(folder)
    batch = {"input_ids": torch.arange(5, 17).reshape(2, 6)}
    found = []
    for model in (PeftModel.from_pretrained(base, folder), trainer.model):
        model.eval()
        with torch.no_grad():
            found.append(model(**batch).logits)
    assert torch.equal(*found)


def test_dpo(tmp_path: Path) -> None:
    trainer = dpo_trainer(tmp_path, causal_model(), lora())
    trainer.train()
    assert_was_searched(trainer)
    assert_saved_adapter_is_the_model(trainer, causal_model(), tmp_path / "saved")


def test_scores_by_states_are_those_of_the_policy_alone(tmp_path: Path) -> None:
    """A reference that the loss takes from the same model adds no points to those of its own."""
    scores = []
    for precompute in (False, True):
        trainer = dpo_trainer(
            tmp_path,
            causal_model(attention_dropout=0.0, num_hidden_layers=4),
            lora(),
            search_config(method="gelora", arch_split=0.4, discretize_at=3, score_batches=4),
            precompute_ref_log_probs=precompute,
            max_steps=4,
        )
        trainer.train()
        scores.append(trainer.selection.scores)
    assert len(set(scores[1])) > 1 and scores[0] == pytest.approx(scores[1], rel=1e-3)


@pytest.mark.parametrize("precompute", [False, True])
def test_dpo_with_a_ready_model_keeps_the_reference(precompute: bool, tmp_path: Path) -> None:
    """TRL copies the ready adapter to a frozen one called "ref", which the cut must neither remove nor wake."""
    model = get_peft_model(causal_model(), lora(task_type="CAUSAL_LM"))
    wake(model, "default")
    trainer = dpo_trainer(tmp_path, model, None, precompute_ref_log_probs=precompute)
    reference = {name: tensor.clone() for name, tensor in model.named_parameters() if ".ref." in name}
    trainer.train()
    assert_was_searched(trainer)
    copied = "ref" in model.peft_config  # older TRL takes the base model for the reference
    assert set(lora_layers(model, "ref")) == (set(trainer.selection.modules) if copied else set())
    assert_same({name: tensor for name, tensor in model.named_parameters() if ".ref." in name}, reference)
    trainable = {name for name, tensor in model.named_parameters() if tensor.requires_grad}
    assert copied == bool(reference) and not trainable & set(reference)
    assert len(trainable) == 2 * len(trainer.selection.selected)
    assert_saved_adapter_is_the_model(trainer, causal_model(), tmp_path / "saved")


def test_another_adapter_stays_asleep(tmp_path: Path) -> None:
    """A second, inactive adapter is not switched on in the modules that lose theirs, not even for a moment."""
    model = get_peft_model(classifier().model, lora(task_type="SEQ_CLS"))
    model.add_adapter("other", lora(task_type="SEQ_CLS"))
    wake(model, "other")
    model.set_adapter("default")
    trainer = make_trainer(tmp_path, model=model, peft_config=None)
    layers = list(lora_layers(model, "other").values())
    trainer.add_callback(
        active := Probe(lambda **kwargs: [layer for layer in layers if "other" in layer.active_adapters], CUT)
    )
    trainer.train()
    assert_was_searched(trainer)
    assert active.found[CUT] == []
    assert set(lora_layers(model, "other")) == set(trainer.selection.modules)
    trainable = [name for name, tensor in model.named_parameters() if tensor.requires_grad]
    assert trainable and not any(".other." in name for name in trainable)
    assert_saved_adapter_is_the_model(trainer, classifier().model, tmp_path / "saved")


def test_reward(tmp_path: Path) -> None:
    trainer = DiffoRARewardTrainer(
        model=llama_classifier(len(vocabulary()), num_labels=1).model,
        args=arguments(tmp_path, RewardConfig),
        train_dataset=preference_dataset(24),
        processing_class=tiny_tokenizer(),
        peft_config=lora(),
        diffora_config=search_config(),
    )
    trainer.train()
    assert_was_searched(trainer)
    assert any("score" in name for name in adapter(trainer.model))
