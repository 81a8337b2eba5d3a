"""The short training runs that the tests of the trainers share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import torch
from peft import LoraConfig, PeftConfig
from torch import nn
from transformers import (
    DataCollatorWithPadding,
    LlamaForCausalLM,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from trl import SFTConfig

from diffora_trainer import DiffoRAConfig, DiffoRASFTTrainer, DiffoRATrainer
from diffora_trainer.methods.registry import get_method
from diffora_trainer.search.run import SelectionRun
from helpers.data import classification_dataset, lm_dataset, tiny_tokenizer, vocabulary
from helpers.models import bert, llama_classifier, llama_config
from helpers.options import make_config
from helpers.tiny_model import TinyModel


WARMUP, CUT = 3, 8
VOCABULARY = len(vocabulary())


def lora(**overrides: object) -> LoraConfig:
    """A small LoRA on all linear layers."""
    return LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": "all-linear", **overrides})


def adapter_config(type: str = "LoraConfig", **options: Any) -> PeftConfig:
    """A small adapter of one of PEFT's types, on all linear layers unless it says otherwise."""
    if type == "LoraConfig":
        return lora(**options)
    return getattr(peft, type)(**{"r": 8, "target_modules": "all-linear", **options})


def search_config(**overrides: object) -> DiffoRAConfig:
    """Warm-up until step 3, search until the cut at step 8, an architecture step after each training step."""
    options: dict[str, Any] = {"arch_warmup": WARMUP, "discretize_at": CUT, "fade_out": 0, **overrides}
    if get_method(options.get("method", "diffora")).searches:
        options = {"arch_every": 1, **options}
    return make_config(**options)


def arguments(folder: object, cls: type = TrainingArguments, **overrides: object) -> TrainingArguments:
    """Twelve logged steps on the CPU, in float32, that write nothing."""
    settings: dict[str, object] = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 4,
        "max_steps": 12,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "seed": 7,
    }
    if cls.__module__.startswith("trl."):  # its defaults: bf16 and checkpointing
        settings.update(bf16=False, gradient_checkpointing=False)
    return cls(**{**settings, **overrides})


def classifier(kind: str = "bert") -> TinyModel:
    """A classifier that reads the tokenizer's vocabulary; the BERT has dropout."""
    if kind == "llama":
        return llama_classifier(VOCABULARY)
    tiny = bert()
    torch.manual_seed(0)
    tiny.model.resize_token_embeddings(VOCABULARY)
    return tiny


def causal_model(**overrides: object) -> LlamaForCausalLM:
    """A Llama for the tokenizer's vocabulary, with dropout."""
    torch.manual_seed(0)
    return LlamaForCausalLM(llama_config(VOCABULARY, **{"attention_dropout": 0.1, **overrides}))


def make_trainer(folder: object, task: str = "cls", cls: type[Trainer] | None = None, **kwargs: object) -> Trainer:
    """
    A DiffoRA trainer of a tiny model, or with `cls` another class. Arguments of the constructor are taken as they
    are; `args` is a dictionary of overrides, and `search` one of the search's options.
    """
    overrides, search = dict(kwargs.pop("args", {})), dict(kwargs.pop("search", {}))
    if task == "sft":
        settings: dict[str, object] = {
            "model": causal_model,
            "args": arguments(folder, SFTConfig, **overrides),
            "train_dataset": lm_dataset(24),
            "processing_class": tiny_tokenizer(),
            "peft_config": lora(),
        }
    else:
        settings = {
            "model": lambda: classifier("llama" if task == "llama" else "bert").model,
            "args": arguments(folder, **overrides),
            "train_dataset": classification_dataset(24),
            "data_collator": DataCollatorWithPadding(tiny_tokenizer()),
            "peft_config": lora(),
        }
    settings.update(kwargs)
    if cls is not None and not hasattr(cls, "selection") and task != "sft":
        settings.pop("peft_config")  # Trainer takes none
    if callable(settings["model"]) and not isinstance(settings["model"], nn.Module):
        settings["model"] = settings["model"]()
    if cls is None:
        cls = DiffoRASFTTrainer if task == "sft" else DiffoRATrainer
    if hasattr(cls, "selection"):
        settings.setdefault("diffora_config", search_config(**search))
    return cls(**settings)


def running(trainer: Any) -> SelectionRun | None:
    """The run of a trainer, until its modules are pruned."""
    return trainer._session.run


class Probe(TrainerCallback):
    """Calls a function at the end of some steps: before the run's own work if the trainer is built with it, after that
    work if it is added to the built trainer."""

    def __init__(self, function, *steps: int) -> None:
        self.function, self.steps = function, steps
        self.found: dict[int, object] = {}

    def on_step_end(self, args, state, control, **kwargs) -> None:
        if not self.steps or state.global_step in self.steps:
            self.found[state.global_step] = self.function(**kwargs)


def out_of_memory(trainer: Trainer, *steps: int) -> Trainer:
    """Memory runs out once after each of these steps."""
    step, left = trainer.training_step, list(steps)

    def training_step(*args: Any, **kwargs: Any) -> Any:
        if left and trainer.state.global_step == left[0]:
            left.pop(0)
            raise RuntimeError("CUDA out of memory. Tried to allocate 2 GiB")
        return step(*args, **kwargs)

    trainer.training_step = training_step
    return trainer


# In the warm-up, in the search, at the step of the cut, and after it. With 24 rows an epoch ends at step 6 or, with
# accumulation, at steps 3, 6, 9: all of these but the first lie in the middle of one.
MOMENTS = {"warm-up": 2, "search": 5, "cut": CUT, "selected": 10}
SAVES = tuple(MOMENTS.values())


class SaveAt(TrainerCallback):
    """Saves a checkpoint at some steps."""

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        control.should_save = state.global_step in SAVES


def saving_trainer(folder: Path, task: str, accumulation: int = 1, **kwargs: object) -> Trainer:
    args = {
        "gradient_accumulation_steps": accumulation,
        "per_device_train_batch_size": 4 // accumulation,
        "save_strategy": "steps",
        "save_steps": 1000,
        **kwargs.pop("args", {}),
    }
    if accumulation == 2:  # three steps an epoch
        kwargs.setdefault("train_dataset", kwargs.pop("rows", None) or task_rows(task, 12))
    return make_trainer(folder, task, args=args, callbacks=[SaveAt()], **kwargs)


def task_rows(task: str, count: int):
    return lm_dataset(count) if task == "sft" else classification_dataset(count)


def deep_model():
    """Six layers, so that a third of the modules fits into the last two."""
    return causal_model(num_hidden_layers=6, attention_dropout=0.0)
