"""Objects that the user gave are read, and never written into."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers import Trainer
from trl import SFTTrainer

from diffora_trainer import DiffoRAMixin, DiffoRATrainer
from helpers.adapted import lora_layers, wake
from helpers.checks import adapter, assert_same, step_logs
from helpers.data import preference_dataset, tiny_tokenizer
from helpers.parents import of_trl, searching
from helpers.trainers import arguments, causal_model, classifier, lora, make_trainer, search_config


@pytest.mark.parametrize("base_model_id", [None, "org/base"])
def test_configuration_is_used_again(base_model_id: str | None, tmp_path: Path) -> None:
    """A second model that is wrapped with the same configuration has all its modules."""
    config = lora(task_type="SEQ_CLS", target_modules=["query", "value", "dense"], exclude_modules=["pooler.dense"])
    model = get_peft_model(classifier().model, config)
    given, count = copy.deepcopy(config.to_dict()), len(lora_layers(model, "default"))
    trainer = make_trainer(tmp_path, model=model, peft_config=None, search={"base_model_id": base_model_id})
    trainer.train()
    assert len(lora_layers(model, "default")) < count
    assert model.peft_config["default"].base_model_name_or_path == (base_model_id or given["base_model_name_or_path"])
    assert config.to_dict() == given
    assert len(lora_layers(get_peft_model(classifier().model, config), "default")) == count


def test_saved_copy_of_the_adapter_is_whole(tmp_path: Path) -> None:
    """TRL's DPO gives one configuration object to the adapter that it trains and to its frozen copy, the reference."""
    model = get_peft_model(causal_model(), lora(task_type="CAUSAL_LM"))
    model.add_adapter("ref", model.peft_config["default"])
    wake(model, "ref")
    model.set_adapter("default")
    modules = len(lora_layers(model, "ref"))
    trainer = make_trainer(tmp_path, "sft", model=model, peft_config=None)
    trainer.train()
    model.save_pretrained(tmp_path / "saved")

    def logits(model: nn.Module) -> Tensor:
        model.eval()
        with torch.no_grad():
            return model(input_ids=torch.arange(5, 17).reshape(2, 6)).logits

    for name, folder, count in (
        ("default", tmp_path / "saved", len(trainer.selection.selected)),
        ("ref", tmp_path / "saved" / "ref", modules),
    ):
        reloaded = PeftModel.from_pretrained(causal_model(), folder)
        assert len(lora_layers(reloaded, "default")) == count
        model.set_adapter(name)
        assert torch.equal(logits(reloaded), logits(model)), name


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("task", ["cls", "sft"])
def test_model_of_a_trainer_that_could_not_be_built(task: str, checkpointing: bool, tmp_path: Path) -> None:
    """It is as it was, so once the option is mended it can be passed again, as one does in a notebook."""
    options: dict[str, Any] = {"args": {"gradient_checkpointing": checkpointing}}
    model, twin = (causal_model() if task == "sft" else classifier().model for _ in range(2))
    twin.get_input_embeddings().weight.requires_grad_(False)
    torch.manual_seed(0)  # TRL 0.28 draws the LoRA before its trainer sets a seed
    whole = make_trainer(tmp_path / "whole", task, model=twin, **options)
    whole.train()
    model.get_input_embeddings().weight.requires_grad_(False)  # by the user
    as_given = [(name, p, p.requires_grad) for name, p in model.named_parameters()]
    modules = dict(model.named_modules())
    small, none = {"max_trainable_parameters": 1}, lora(target_modules=["no_such_layer"])
    for wrong in ({"search": small}, {"peft_config": none}):
        with pytest.raises(ValueError):
            make_trainer(tmp_path / "wrong", task, model=model, **options, **wrong)
        assert dict(model.named_modules()) == modules and not hasattr(model, "peft_config")
        assert all(
            (name, p.requires_grad) == (known, grad) and p is parameter
            for (name, p), (known, parameter, grad) in zip(model.named_parameters(), as_given, strict=True)
        )
        assert not any(module._forward_hooks for module in model.modules())
    torch.manual_seed(0)
    again = make_trainer(tmp_path / "again", task, model=model, **options)
    again.train()
    assert step_logs(again) == step_logs(whole)
    assert_same(adapter(again.model), adapter(whole.model))


def test_number_of_layers_of_a_model_whose_trainer_could_not_be_built(tmp_path: Path) -> None:
    """PEFT writes it into the configuration where the adapter repeats layers."""
    model = causal_model()
    layers = model.config.num_hidden_layers
    config = lora(layer_replication=[[0, layers], [0, layers]])
    with pytest.raises(ValueError, match="max_trainable_parameters=1"):
        make_trainer(tmp_path, "sft", model=model, peft_config=config, search={"max_trainable_parameters": 1})
    assert model.config.num_hidden_layers == layers == len(model.model.layers)


@pytest.mark.parametrize("wrong", [{"max_trainable_parameters": 1}, {"search_micro_batches": 2}], ids=str)
def test_adapters_of_a_model_whose_trainer_could_not_be_built(wrong: dict[str, Any], tmp_path: Path) -> None:
    """TRL adds one for the reference, which may not be there the next time."""
    trainer, config = of_trl("DPO")
    model = get_peft_model(causal_model(), lora(task_type="CAUSAL_LM"))
    model.add_adapter("other", lora())
    model.set_adapter("default")
    as_given = [(name, parameter, parameter.requires_grad) for name, parameter in model.named_parameters()]

    def build(**search: Any) -> Any:
        return searching(trainer)(
            model=model,
            args=arguments(tmp_path, config),
            train_dataset=preference_dataset(24),
            processing_class=tiny_tokenizer(),
            diffora_config=search_config(**search),
        )

    with pytest.raises(ValueError, match=next(iter(wrong))):
        build(**wrong)
    assert set(model.peft_config) == {"default", "other"} and model.active_adapters == ["default"]
    assert all(
        (name, p.requires_grad) == (known, grad) and p is parameter
        for (name, p), (known, parameter, grad) in zip(model.named_parameters(), as_given, strict=True)
    )
    trainer = build()
    trainer.train()
    assert trainer.selection.selected


def test_model_whose_weights_a_start_has_changed_is_refused_again(tmp_path: Path) -> None:
    model, small = classifier().model, {"max_trainable_parameters": 1}
    with pytest.raises(ValueError, match="max_trainable_parameters"):
        make_trainer(tmp_path, model=model, peft_config=lora(init_lora_weights="pissa"), search=small)
    with pytest.raises(ValueError, match="has an adapter already"):
        make_trainer(tmp_path, model=model)


@pytest.mark.skipif(not hasattr(LoraLayer, "mica_init"), reason="this PEFT has no MiCA")
def test_model_of_a_start_that_is_refused_and_leaves_its_weights_can_be_passed_again(tmp_path: Path) -> None:
    model = classifier().model
    with pytest.raises(ValueError, match="MiCA"):
        make_trainer(tmp_path, model=model, peft_config=lora(init_lora_weights="mica"))
    make_trainer(tmp_path, model=model)


def test_mixin_in_the_wrong_place_is_refused(tmp_path: Path) -> None:
    class Custom(Trainer):
        """A trainer of the user's own."""

    for parent in (Trainer, SFTTrainer, Custom):
        with pytest.raises(TypeError, match=rf"class Wrong\(DiffoRAMixin, {parent.__name__}\)"):
            type("Wrong", (parent, DiffoRAMixin), {})
    # It may stand behind classes that come before its own parent, since these hand on to it.
    right = type("Right", (Custom, DiffoRATrainer), {})
    trainer = right(
        model=causal_model(),
        args=arguments(tmp_path),
        train_dataset=[{"input_ids": [5, 6, 7], "labels": [5, 6, 7]}] * 24,
        processing_class=tiny_tokenizer(),
        peft_config=lora(),
        diffora_config=search_config(),
    )
    trainer.train()
    assert trainer.selection is not None


def test_training_loop_of_ones_own_is_refused(tmp_path: Path) -> None:
    """As that of TRL's PPO, in which no callback and no `training_step` of ours would ever be called."""

    class Loop(DiffoRAMixin, Trainer):
        def train(self, *args: Any, **kwargs: Any) -> Any:
            for batch in self.get_train_dataloader():
                self.model(**batch).loss.backward()

    class Noted(DiffoRAMixin, Trainer):
        def train(self, *args: Any, **kwargs: Any) -> Any:
            self.noted = True
            return super().train(*args, **kwargs)

    with pytest.raises(TypeError, match="`Loop.train` is a training loop of its own.*ArchitectureSearch"):
        make_trainer(tmp_path, cls=Loop)
    noted = make_trainer(tmp_path, cls=Noted)
    noted.train()
    assert noted.noted and noted.selection is not None
