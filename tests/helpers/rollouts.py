"""Runs whose trainer generates what it trains on."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import Trainer
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

from diffora_trainer import DiffoRAMixin
from helpers.checks import assert_same, optimizer_state, snapshot, step_logs
from helpers.data import prompt_completion_dataset, tiny_tokenizer
from helpers.trainers import CUT, WARMUP, arguments, causal_model, lora, search_config


ARCHITECTURE_STEPS = CUT - WARMUP
GENERATIONS = 4
# What it takes to keep all modules with open gates: the run is then the stock run to its end.
KEEP_ALL: dict[str, Any] = {"selection_ratio": 1.0, "fold_gates": False}


online_dpo = importlib.import_module("trl.experimental.online_dpo")


OnlineDPOConfig, OnlineDPOTrainer = online_dpo.OnlineDPOConfig, online_dpo.OnlineDPOTrainer


class DiffoRAGRPOTrainer(DiffoRAMixin, GRPOTrainer):
    pass


class DiffoRARLOOTrainer(DiffoRAMixin, RLOOTrainer):
    pass


class DiffoRAOnlineDPOTrainer(DiffoRAMixin, OnlineDPOTrainer):
    pass


SEARCHING = {
    GRPOTrainer: (DiffoRAGRPOTrainer, GRPOConfig),
    RLOOTrainer: (DiffoRARLOOTrainer, RLOOConfig),
    OnlineDPOTrainer: (DiffoRAOnlineDPOTrainer, OnlineDPOConfig),
}


class Reward:
    """Counts different words, and notes what it was asked."""

    __name__ = "words"

    def __init__(self) -> None:
        self.calls: list[tuple[list[str], list[str]]] = []

    def __call__(self, prompts: list[str], completions: list[str], **kwargs: Any) -> list[float]:
        self.calls.append((list(prompts), list(completions)))
        return [len(set(text.split())) + len(text) / 100 for text in completions]


def prompts(count: int = 24, seed: int = 0) -> Dataset:
    return prompt_completion_dataset(count, seed).select_columns(["prompt"])


def rollout_trainer(folder: Path, parent: type[Trainer] = GRPOTrainer, cls: Any = None, **kwargs: Any) -> Any:
    """A trainer of a tiny model with a reward; `cls=None` is the one that searches. See `make_trainer`."""
    searching, config = SEARCHING[parent]
    args: dict[str, Any] = {"per_device_train_batch_size": 4, **kwargs.pop("args", {})}
    if parent is OnlineDPOTrainer:
        args = {"max_new_tokens": 6, "remove_unused_columns": False, **args}
    else:
        args = {"max_completion_length": 6, "num_generations": GENERATIONS, **args}
    cls = cls or searching
    search = kwargs.pop("search", {})
    settings = {
        "model": causal_model(attention_dropout=0.0 if args.get("gradient_checkpointing") else 0.1),
        "args": arguments(folder, config, **args),
        "train_dataset": prompts(),
        "processing_class": tiny_tokenizer(),
        "peft_config": lora(task_type="CAUSAL_LM"),
        "reward_funcs": Reward(),
        **kwargs,
    }
    if issubclass(cls, DiffoRAMixin):
        settings.setdefault("diffora_config", search_config(**search))
    return cls(**settings)


def calls(trainer: Any) -> list[tuple[list[str], list[str]]]:
    return trainer.reward_funcs[0].calls


def assert_stock_run(found: Any, stock: Any) -> None:
    """Equal in weights, optimizer, logs and random streams."""
    ignored = ("diffora/", "step_time")
    assert_same(step_logs(found, ignored), step_logs(stock, ignored), "logs")
    assert_same(snapshot(found.model), snapshot(stock.model), "weights")
    assert_same(optimizer_state(found.model, found.optimizer), optimizer_state(stock.model, stock.optimizer), "Adam")
