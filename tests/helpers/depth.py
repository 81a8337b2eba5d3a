"""Models and runs of which it is seen how deep the backward pass reaches."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
    GPT2LMHeadModel,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    Trainer,
    TrainerCallback,
)
from trl import DPOConfig, DPOTrainer

from diffora_trainer import DiffoRAMixin
from diffora_trainer.adapters.grid import AdapterGrid
from helpers.data import preference_dataset, tiny_tokenizer
from helpers.models import llama_config
from helpers.trainers import VOCABULARY, arguments, lora, make_trainer, search_config


LAYERS = 4
NOT_REENTRANT = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}}
LATE = {"method": "custom", "selection_scope": "model", "selection_ratio": 0.4}


class DiffoRADPOTrainer(DiffoRAMixin, DPOTrainer):
    pass


def layer_of(name: str) -> int:
    """The number of the layer that a module is in; what stands outside of the layers comes after them."""
    return next((int(part) for part in name.split(".") if part.isdigit()), LAYERS)


def late_first(model: nn.Module, batches: list[Any]) -> dict[str, float]:
    return {name: layer_of(name) + index / 1e3 for index, name in enumerate(AdapterGrid.from_model(model).grid.names)}


def deep(kind: str, task: str) -> Any:
    torch.manual_seed(0)
    if kind == "llama":
        config = llama_config(VOCABULARY, num_hidden_layers=LAYERS, attention_dropout=0.1)
        return LlamaForSequenceClassification(config) if task == "cls" else LlamaForCausalLM(config)
    common = {"vocab_size": VOCABULARY, "pad_token_id": 0, "initializer_range": 0.2}
    if kind == "gpt2":
        config = GPT2Config(n_embd=32, n_layer=LAYERS, n_head=4, n_positions=128, bos_token_id=1, **common)
        return GPT2ForSequenceClassification(config) if task == "cls" else GPT2LMHeadModel(config)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "max_position_embeddings": 128}
    return BertForSequenceClassification(BertConfig(num_hidden_layers=LAYERS, **sizes, **common))


def layers_of(model: nn.Module) -> list[nn.Module]:
    """The layers, in order: the one list of that many modules."""
    return next(
        list(m) for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == LAYERS and "Layer" in repr(m[0])
    )


class Reach(TrainerCallback):
    """The layers whose output has a gradient, in each training step and in each forward and backward pass."""

    def __init__(self) -> None:
        self.steps: dict[int, set[int]] = {}
        self.passes: list[set[int]] = []

    def watch(self, model: nn.Module) -> Reach:
        model.register_forward_pre_hook(lambda *_: self.passes.append(set()))
        for index, layer in enumerate(layers_of(model)):
            layer.register_forward_hook(lambda _, args, output, index=index: self._note(index, output))
        return self

    def _note(self, index: int, output: Any) -> None:
        output = output[0] if isinstance(output, tuple) else output
        if output.requires_grad:
            found = self.passes[-1]
            output.register_hook(lambda gradient: found.add(index))

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.passes.clear()

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.steps[state.global_step + 1] = set().union(*self.passes)


def embeddings_require_gradient(model: Any) -> bool:
    return model.get_input_embeddings()(torch.tensor([[3]])).requires_grad


def trainer_of(folder: Path, task: str, model: Any, args: dict[str, Any], **kwargs: Any) -> Trainer:
    search = {**LATE, **kwargs.pop("search", {})}
    if search["method"] == "custom":
        kwargs["score_function"] = late_first
    if task == "dpo":
        return DiffoRADPOTrainer(
            model=model,
            args=arguments(folder, DPOConfig, **args),
            train_dataset=preference_dataset(24),
            processing_class=tiny_tokenizer(),
            diffora_config=search_config(**search),
            **{"peft_config": lora(), **kwargs},
        )
    return make_trainer(folder, task, model=model, args=args, search=search, **kwargs)
