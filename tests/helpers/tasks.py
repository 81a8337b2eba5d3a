"""Models with the head of a task, and rows to train them on."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch.utils.data import Dataset
from transformers import (
    T5Config,
    XLNetConfig,
)

from helpers.models import ARCHITECTURES, llama_config
from helpers.tiny_model import HIDDEN, VOCAB


class Rows(Dataset):
    """Random rows that a model of some task can be trained on."""

    def __init__(self, rows: list[dict[str, torch.Tensor]]) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return self.rows[index]


def rows_for(task: str, count: int = 24) -> Rows:
    generator = torch.Generator().manual_seed(0)

    def ids(*shape: int) -> torch.Tensor:
        return torch.randint(3, VOCAB, shape, generator=generator)

    def row(index: int) -> dict[str, torch.Tensor]:
        if task == "ForImageClassification":
            return {"pixel_values": torch.randn(3, 8, 8, generator=generator), "labels": torch.tensor(index % 2)}
        if task == "ForMultipleChoice":
            return {"input_ids": ids(2, 8), "labels": torch.tensor(index % 2)}
        if task == "ForTokenClassification":
            return {"input_ids": ids(8), "labels": ids(8) % 2}
        if task.startswith("ForQuestionAnswering"):
            return {"input_ids": ids(8), "start_positions": torch.tensor(1), "end_positions": torch.tensor(index % 8)}
        return {"input_ids": torch.cat([ids(7), torch.tensor([2])]), "labels": torch.tensor(index % 2)}

    return Rows([row(index) for index in range(count)])


def tiny_config(kind: str) -> Any:
    sizes = {"d_model": HIDDEN, "vocab_size": VOCAB}
    if kind == "XLNet":
        return XLNetConfig(**sizes, n_layer=2, n_head=4, d_inner=64)
    if kind == "T5":
        return T5Config(**sizes, d_kv=8, d_ff=64, num_layers=2, num_heads=4, decoder_start_token_id=0, eos_token_id=2)
    names = {"Bert": "bert", "Roberta": "roberta", "DebertaV2": "deberta_v2", "GPT2": "gpt2", "ViT": "vit"}
    return ARCHITECTURES[names[kind]]().model.config if kind in names else llama_config()


def model_for(kind: str, task: str, seed: int = 0) -> Any:
    config = tiny_config(kind)
    torch.manual_seed(seed)
    return getattr(transformers, f"{kind}{task}")(config)
