"""Settings of every test, and the short training runs that the tests of the trainers share."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any


# Before the imports: the libraries read these once.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import datasets  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402
from datasets import Dataset  # noqa: E402
from models import TinyModel, bert, llama_classifier, llama_config  # noqa: E402
from peft import LoraConfig, get_peft_model_state_dict  # noqa: E402
from tokenizer import classification_dataset, lm_dataset, tiny_tokenizer, vocabulary  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from transformers import (  # noqa: E402
    DataCollatorWithPadding,
    LlamaForCausalLM,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)
from trl import SFTConfig  # noqa: E402

from diffora_trainer import DiffoRAConfig, DiffoRASFTTrainer, DiffoRATrainer  # noqa: E402


torch.set_num_threads(1)
datasets.disable_progress_bars()

WARMUP, CUT = 3, 8
VOCABULARY = len(vocabulary())


@pytest.fixture(autouse=True)
def fixed_seeds() -> None:
    set_seed(0)


def lora(**overrides: object) -> LoraConfig:
    """A small LoRA on all linear layers."""
    return LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": "all-linear", **overrides})


def search_config(**overrides: object) -> DiffoRAConfig:
    """Warm-up until step 3, search until the cut at step 8, an architecture step after each training step."""
    return DiffoRAConfig(
        **{"arch_warmup": WARMUP, "discretize_at": CUT, "arch_every": 1, "arch_closing": 0, **overrides}
    )


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


class Probe(TrainerCallback):
    """Calls a function at the end of some steps: before the cut's own work if the trainer is built with it, after that
    work if it is added to the built trainer."""

    def __init__(self, function, *steps: int) -> None:
        self.function, self.steps = function, steps
        self.found: dict[int, object] = {}

    def on_step_end(self, args, state, control, **kwargs) -> None:
        if not self.steps or state.global_step in self.steps:
            self.found[state.global_step] = self.function(**kwargs)


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    """A copy of every parameter and buffer."""
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def adapter(model: nn.Module) -> dict[str, Tensor]:
    """A copy of what is saved of the adapter."""
    return {name: tensor.detach().clone() for name, tensor in get_peft_model_state_dict(model).items()}


def raw_optimizer(optimizer: object) -> torch.optim.Optimizer:
    """The optimizer inside accelerate's wrapper."""
    return getattr(optimizer, "optimizer", optimizer)


def optimizer_state(model: nn.Module, optimizer: object) -> dict[str, dict[str, object]]:
    """A copy of the optimizer's state, by the name of the parameter."""
    state = raw_optimizer(optimizer).state
    return {
        name: {k: v.detach().clone() if isinstance(v, Tensor) else v for k, v in state[parameter].items()}
        for name, parameter in model.named_parameters()
        if parameter in state
    }


def assert_same(first: object, second: object, where: str = "") -> None:
    """Equal bit for bit, through dictionaries, lists and tensors."""
    if isinstance(first, dict):
        assert isinstance(second, dict) and list(first) == list(second), f"{where}: {set(first) ^ set(second)}"
        for key in first:
            assert_same(first[key], second[key], f"{where}/{key}")
    elif isinstance(first, (list, tuple)):
        assert len(first) == len(second), where
        for index, (a, b) in enumerate(zip(first, second, strict=True)):
            assert_same(a, b, f"{where}[{index}]")
    elif isinstance(first, Tensor):
        assert torch.equal(first, second), where
    else:
        assert first == second, where


def step_logs(trainer: Trainer, ignored: tuple[str, ...] = ()) -> dict[int, dict[str, float]]:
    """The training logs by step, without the one at the end of training."""
    return {
        log["step"]: {key: value for key, value in log.items() if not key.startswith(ignored or ("\0",))}
        for log in trainer.state.log_history
        if "loss" in log
    }


def assert_continues(resumed: Trainer, whole: Trainer, step: int) -> None:
    """A run resumed from a step is the one that was not interrupted: selection, logs from there on, and adapter."""
    assert resumed.selection == whole.selection
    # TRL counts tokens from 0 again when it resumes.
    expected, found = (
        {at: log for at, log in step_logs(trainer, ("num_tokens",)).items() if at > step}
        for trainer in (whole, resumed)
    )
    assert set(expected) == set(range(step + 1, whole.state.max_steps + 1))
    assert_same(found, expected, f"logs from step {step}")
    assert_same(adapter(resumed.model), adapter(whole.model), f"adapter from step {step}")


def elsewhere(program: str, jobs: object, folder: Path, missing: tuple[str, ...] = ("diffora_trainer", "trl")) -> Any:
    """
    What a program reports that runs in a process of its own, where some packages cannot be imported. It finds its
    `jobs`, and leaves its `report`.
    """
    program = f"""
import json, sys

for name in {missing!r}:
    sys.modules[name] = None
jobs = json.loads(sys.argv[1])
{program}
print("REPORT" + json.dumps(report))
"""
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": str(torch.get_num_threads())}
    command = [sys.executable, "-c", program, json.dumps(jobs)]
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=150)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.split("REPORT")[1])


def rows_of(count: int, start: int = 0) -> Dataset:
    """Rows for the classifier of one length, with a number in `row` to know them by."""
    rows = classification_dataset(count)
    return Dataset.from_list(
        [
            {"input_ids": row["input_ids"][:8], "attention_mask": [1] * 8, "label": row["label"], "row": start + index}
            for index, row in enumerate(rows)
        ]
    )
