"""A tiny model with its batch, and the sizes of all of them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import (
    PreTrainedModel,
)


SEED = 0
VOCAB = 64
HIDDEN = 32
BATCH = 4
LENGTH = 12
PAD, BOS, EOS = 0, 1, 2
NUM_LABELS = 2
INIT = 0.2
"""Standard deviation of the initial weights. With the usual 0.02 the logits of a model this narrow are so flat that
its loss can hardly fall while its head is frozen."""


@dataclass
class TinyModel:
    """A tiny model with everything a test needs to put LoRA on it and take a loss."""

    model: PreTrainedModel
    batch: dict[str, Tensor]
    """A small batch with labels; `model(**batch).loss` is a scalar."""
    target_modules: str | list[str]
    """What to pass to `LoraConfig(target_modules=...)`."""
    task_type: str | None
    """What to pass to `LoraConfig(task_type=...)`."""
    rows: int
    """Number of transformer layers (encoder plus decoder)."""
    kinds: int
    """Number of distinct kinds of adapted linear modules inside the layers. A layer need not have all of them: a T5
    encoder layer has no cross-attention."""
    linear_modules: int | None = None
    """Number of adapted linear modules inside the layers; left out, it is `rows * kinds`."""
    outside: tuple[str, ...] = ()
    """Names of the modules outside the layers that these target modules adapt as well."""
    parameters: int = 0
    """Number of bare parameters in a layer (a router, fused experts) that these target modules adapt as well."""

    def __post_init__(self) -> None:
        if self.linear_modules is None:
            self.linear_modules = self.rows * self.kinds


def random_ids(low: int = 3, shape: tuple[int, ...] = (BATCH, LENGTH), vocab: int = VOCAB) -> Tensor:
    """Random token ids without the special ones, drawn from a generator of their own."""
    generator = torch.Generator().manual_seed(SEED)
    return torch.randint(low, vocab, shape, generator=generator)


def causal_batch() -> dict[str, Tensor]:
    """A language-modelling batch: the last row is padded on the right."""
    input_ids = random_ids()
    attention_mask = torch.ones_like(input_ids)
    input_ids[-1, -3:] = PAD
    attention_mask[-1, -3:] = 0
    labels = input_ids.masked_fill(attention_mask == 0, -100)
    return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}


def classification_batch() -> dict[str, Tensor]:
    """A sequence-classification batch: the label is whether the first token is in the upper half of the vocabulary."""
    batch = causal_batch()
    batch["labels"] = (batch["input_ids"][:, 0] >= VOCAB // 2).long()
    return batch


def seq2seq_batch() -> dict[str, Tensor]:
    """A sequence-to-sequence batch: the target is the start of the source."""
    batch = causal_batch()
    batch["labels"] = batch["input_ids"][:, : LENGTH // 2].clone()
    return batch


def image_batch() -> dict[str, Tensor]:
    """An image-classification batch of random images."""
    generator = torch.Generator().manual_seed(SEED)
    return {
        "pixel_values": torch.randn(BATCH, 3, 8, 8, generator=generator),
        "labels": torch.arange(BATCH) % NUM_LABELS,
    }


def speech_batch(shape: tuple[int, int]) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(SEED)
    return {"input_features": torch.randn(BATCH, *shape, generator=generator), "labels": random_ids(shape=(BATCH, 6))}
