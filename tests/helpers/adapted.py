"""What tests do to models with a LoRA, and read from them."""

from __future__ import annotations

import random
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from diffora_trainer.adapters.grid import ModuleGrid
from diffora_trainer.core.selection import Selection
from helpers.tiny_model import TinyModel


def randomize(model: nn.Module) -> None:
    generator = torch.Generator().manual_seed(2)
    for parameter_name, parameter in model.named_parameters():
        if "lora_B" in parameter_name:
            parameter.data.normal_(0, 0.2, generator=generator)


def logits(model: nn.Module, tiny: TinyModel) -> Tensor:
    with torch.no_grad():
        return model(**tiny.batch).logits


def adapted_names(model: nn.Module) -> set[str]:
    return {name.removeprefix("base_model.model.") for name, m in model.named_modules() if isinstance(m, LoraLayer)}


def random_selection(grid: ModuleGrid, count: int | None = None, seed: int = 0) -> Selection:
    """A random choice, without regard to rows; the gates and what is folded are random too."""
    rng = random.Random(seed)
    chosen = set(rng.sample(grid.names, count or max(1, len(grid) // 2)))
    return Selection(
        rows=grid.rows,
        columns=grid.columns,
        modules=grid.names,
        positions=grid.positions,
        parameters=grid.parameters,
        scores=tuple(rng.random() for _ in grid.names),
        gates=tuple(rng.random() for _ in grid.names),
        kept=tuple(name in chosen for name in grid.names),
        factors=tuple(rng.random() for _ in grid.names),
    )


def make_selection(**changes: Any) -> Selection:
    """Two layers of three kinds and a pooler; the first layer's `down` does not exist."""
    fields: dict[str, Any] = {
        "rows": ("layers.0", "layers.1", "other"),
        "columns": ("attn.q", "attn.v", "mlp.down", "pooler"),
        "modules": ("layers.0.attn.q", "layers.0.attn.v", "layers.1.attn.q", "layers.1.attn.v", "layers.1.mlp.down")
        + ("pooler",),
        "positions": ((0, 0), (0, 1), (1, 0), (1, 1), (1, 2), (2, 3)),
        "parameters": (10, 10, 10, 10, 30, 5),
        "scores": (0.5, -1.25, 3.0e-9, 0.1, 2.0, 1 / 3),
        "gates": (1.0, 0.0, 0.125, 0.1, 1 / 3, 0.7),
        "kept": (True, False, False, False, False, True),
        "shared": (("layers.1.attn.q", "layers.0.attn.v"),),
        "step": 75,
        "config": {"selection_ratio": 0.5, "base_model_id": None},
        "versions": {"torch": "2.11"},
    }
    return Selection(**{**fields, **changes})


def base_weights(model: nn.Module) -> dict[str, torch.Tensor]:
    """The weights that no training may change, under the names of the model without LoRA."""
    return {
        name.removeprefix("base_model.model.")
        .replace(".base_layer", "")
        .replace(".original_module", ""): tensor.clone()
        for name, tensor in model.state_dict().items()
        if "lora_" not in name and ".modules_to_save" not in name
    }


def wake(model: nn.Module, adapter_name: str) -> None:
    """Give an adapter weights as if it had been trained."""
    generator = torch.Generator().manual_seed(3)
    for name, parameter in model.named_parameters():
        if f"lora_B.{adapter_name}." in name:
            parameter.data.normal_(std=0.3, generator=generator)
