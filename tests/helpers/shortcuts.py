"""What the tests of models with shortcuts share."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from diffora_trainer import (
    ShortcutConfig,
    add_shortcuts,
)
from diffora_trainer.experimental.shortcuts.structure import ATTRIBUTE
from helpers.searches import warm


def ready(tiny: Any = None, **options: Any) -> tuple[Any, list[dict[str, Tensor]]]:
    """A model whose LoRA modules and shortcuts all do something, and three batches."""
    model, batches = warm(tiny)
    torch.manual_seed(5)
    for shortcut in add_shortcuts(model, ShortcutConfig(**{"r": 3, **options})).values():
        nn.init.normal_(shortcut.B, std=0.1 * float(torch.rand(())))
    return model, batches


def pairs(model: nn.Module) -> dict[str, list[nn.Parameter]]:
    """The two matrices of each LoRA module and shortcut, by the module's name, read from the parameters' names."""
    found: dict[str, list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        name = name.removeprefix("base_model.model.")
        if ".lora_" in name:
            found.setdefault(name.partition(".lora_")[0], []).append(parameter)
        elif ATTRIBUTE in name:
            found.setdefault(name.replace(f"{ATTRIBUTE}.", "").rpartition(".")[0], []).append(parameter)
    return found


def filled(model: nn.Module, config: ShortcutConfig | None = None) -> nn.Module:
    """A model with shortcuts that do something."""
    generator = torch.Generator().manual_seed(1)
    for shortcut in add_shortcuts(model, config).values():
        with torch.no_grad():
            shortcut.B.copy_(0.1 * torch.randn(shortcut.B.shape, generator=generator))
    return model


def result(model: nn.Module, batch: dict[str, Tensor], seed: int = 0) -> dict[str, Tensor]:
    torch.manual_seed(seed)
    output = model(**batch)
    return {"loss": output.loss.detach(), "logits": output.logits.detach()}


def gradients(model: nn.Module, *losses: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    sum(losses).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
