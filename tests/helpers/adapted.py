"""What tests do to models with a LoRA, and read from them."""

from __future__ import annotations

import json
import random
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from diffora_trainer.adapters.base import find_sites
from diffora_trainer.compat.peft import LOADS_VERA_MATRICES
from diffora_trainer.core.grid import LORA, Grid, SiteInfo
from diffora_trainer.core.selection import Selection
from helpers.tiny_model import TinyModel


VERA_TARGETS = ["q_proj", "k_proj", "up_proj"] if LOADS_VERA_MATRICES else ["q_proj", "o_proj"]
"""Modules that can have VeRA; of several shapes where PEFT loads its matrices."""


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


def lora_layers(model: Any, adapter_name: str) -> dict[str, Any]:
    """The LoRA layers of an adapter by their names in the base model, in the model's order."""
    found: list[Any] = [site for site in find_sites(model, adapter_name).values() if site.kind == LORA]
    return {site.name: site.layer for site in found}


def random_selection(grid: Grid, count: int | None = None, seed: int = 0) -> Selection:
    """A random choice, without regard to rows; the gates and what is folded are random too."""
    rng = random.Random(seed)
    chosen = set(rng.sample(grid.names, count or max(1, len(grid) // 2)))
    return Selection(
        grid=grid,
        scores=tuple(rng.random() for _ in grid.names),
        gates=tuple(rng.random() for _ in grid.names),
        ranks=tuple(site.rank if site.name in chosen else 0 for site in grid.sites),
        factors=tuple(rng.random() for _ in grid.names),
    )


def make_grid(**changes: Any) -> Grid:
    """Two layers of three kinds and a pooler; the first layer's `down` does not exist."""
    fields: dict[str, Any] = {
        "rows": ("layers.0", "layers.1", "other"),
        "columns": ("attn.q", "attn.v", "mlp.down", "pooler"),
        "sites": (
            SiteInfo("layers.0.attn.q", 0, 0, 5, 2),
            SiteInfo("layers.0.attn.v", 0, 1, 5, 2),
            SiteInfo("layers.1.attn.q", 1, 0, 5, 2),
            SiteInfo("layers.1.attn.v", 1, 1, 5, 2),
            SiteInfo("layers.1.mlp.down", 1, 2, 5, 6),
            SiteInfo("pooler", 2, 3, 5, 1),
        ),
    }
    return Grid(**{**fields, **changes})


def make_selection(**changes: Any) -> Selection:
    """The first module of [`make_grid`] and its pooler are kept."""
    fields: dict[str, Any] = {
        "grid": make_grid(),
        "ranks": (5, 0, 0, 0, 0, 5),
        "scores": (0.5, -1.25, 3.0e-9, 0.1, 2.0, 1 / 3),
        "gates": (1.0, 0.0, 0.125, 0.1, 1 / 3, 0.7),
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
        if not any(part in name for part in ("lora_", "hada_", "lokr_", "vera_", ".modules_to_save"))
    }


def wake(model: nn.Module, adapter_name: str) -> None:
    """Give an adapter weights as if it had been trained."""
    generator = torch.Generator().manual_seed(3)
    for name, parameter in model.named_parameters():
        if f"lora_B.{adapter_name}." in name:
            parameter.data.normal_(std=0.3, generator=generator)


def format_1(selection: Selection, shortcuts: tuple[str, ...] = ()) -> dict[str, Any]:
    """A selection as the first release wrote it."""
    record = json.loads(selection.to_json())
    for module in record["modules"]:
        for name in ("kind", "rank", "kept_rank", "gain"):
            del module[name]
    for name in ("history", "times", "notes", "frequency"):
        del record[name]
    return {**record, "format": 1, "shortcuts": list(shortcuts)}
