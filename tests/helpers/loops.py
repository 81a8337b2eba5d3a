"""A training loop of one's own with a `SelectionRun`, and what it trains on."""

from __future__ import annotations

import json
from collections.abc import Iterator
from io import BytesIO
from typing import Any

import torch
from peft import get_peft_model
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset
from transformers import DataCollatorWithPadding, get_scheduler

from diffora_trainer import DiffoRAConfig, SelectionRun
from helpers.data import classification_dataset, tiny_tokenizer
from helpers.trainers import classifier, lora, search_config


STEPS = 12


def loss_of(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    return model(**batch).loss


class Loop:
    """What somebody writes who has no Trainer: AdamW, a linear schedule, clipping, and accumulation."""

    def __init__(self, config: DiffoRAConfig, batches: list[Any], held_out: Any, counts: Any = None) -> None:
        self.batches, self.losses, self.divisor = batches, [], 1
        self.counts = counts if counts is not None else [len(batch["labels"]) for batch in batches]
        self.accumulation = len(batches) // STEPS
        base = classifier().model
        torch.manual_seed(7)
        self.model = get_peft_model(base, lora(task_type="SEQ_CLS"))
        weights = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(weights, lr=1e-2, weight_decay=0.0)
        self.scheduler = get_scheduler("linear", self.optimizer, 0, STEPS)
        self.run = SelectionRun(self.model, self.optimizer, config, loss_of, held_out, STEPS, scheduler=self.scheduler)

    def train(self, until: int = STEPS) -> None:
        self.model.train()
        while self.run.step < until:
            start = self.run.step * self.accumulation
            loss = 0.0
            for index in range(start, start + self.accumulation):
                self.run.before_step(self.batches[index])
                found = self.model(**self.batches[index], num_items_in_batch=self.counts[index]).loss
                (found / self.divisor).backward()
                loss += float(found.detach())
            self.losses.append(loss)
            torch.nn.utils.clip_grad_norm_([p for p in self.model.parameters() if p.requires_grad], 1.0)
            self.optimizer.step()
            self.scheduler.step()
            self.optimizer.zero_grad()
            self.run.after_step()

    def checkpoint(self) -> dict[str, Any]:
        """As `torch.save` writes it, and reads without running code."""
        file = BytesIO()
        state = {
            "run": self.run.state_dict(),
            "model": trained(self.model),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "random": torch.get_rng_state(),
        }
        torch.save(state, file)
        json.dumps(state["run"]["run"], allow_nan=False)
        file.seek(0)
        return torch.load(file, weights_only=True)

    def resume(self, checkpoint: dict[str, Any]) -> None:
        self.run.load_state_dict(checkpoint["run"])
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                if parameter.requires_grad or "lora_" in name:
                    parameter.copy_(checkpoint["model"][name])
        self.optimizer.load_state_dict(checkpoint["optimizer"])
        self.scheduler.load_state_dict(checkpoint["scheduler"])
        torch.set_rng_state(checkpoint["random"])


def trained(model: nn.Module) -> dict[str, Tensor]:
    return {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad or "lora_" in n}


def with_defaults(**options: Any) -> DiffoRAConfig:
    return search_config(**{"arch_batch_size": 4, **options})


def batches(count: int, seed: int = 0) -> list[dict[str, Tensor]]:
    collate, rows = DataCollatorWithPadding(tiny_tokenizer()), classification_dataset(4 * count, seed=seed)
    return [dict(collate([rows[4 * index + offset] for offset in range(4)])) for index in range(count)]


def endless(found: list[Any]) -> Any:
    while True:
        yield from found


class Stream(IterableDataset):
    """Rows of which nobody knows how many there are."""

    def __iter__(self) -> Iterator[Any]:
        return iter(classification_dataset(20, seed=3))


SOURCES = {
    "list": lambda: batches(5, seed=3),
    "DataLoader": lambda: DataLoader(
        classification_dataset(20, seed=3),
        batch_size=4,
        shuffle=True,
        collate_fn=DataCollatorWithPadding(tiny_tokenizer()),
    ),
    "iterator": lambda: endless(batches(5, seed=3)),
    "DataLoader of a stream": lambda: DataLoader(
        Stream(), batch_size=4, collate_fn=DataCollatorWithPadding(tiny_tokenizer())
    ),
}
