"""Models on which no search can run."""

from __future__ import annotations

from typing import Any

import torch
from peft import PeftModel, get_peft_model
from peft.optimizers import create_lorafa_optimizer
from torch import nn

from diffora_trainer import add_shortcuts
from helpers.adapted import lora_layers
from helpers.trainers import causal_model, classifier, lora


def ready_model(**overrides: Any) -> PeftModel:
    return get_peft_model(classifier().model, lora(task_type="SEQ_CLS", **overrides))


def merged() -> PeftModel:
    model = ready_model()
    model.merge_adapter()
    return model


def disabled() -> PeftModel:
    model = ready_model()
    model.base_model.disable_adapter_layers()
    return model


def with_shortcuts_and_a_reference() -> PeftModel:
    model = ready_model()
    model.add_adapter("ref", lora())
    add_shortcuts(model)
    return model


def frozen() -> PeftModel:
    model = ready_model()
    return model.requires_grad_(False)


def with_lora_fa(thawed: bool = False) -> dict[str, Any]:
    """A model whose `lora_A` is frozen, and its optimizer; `thawed`, as one may who is told that it is."""
    model = ready_model()
    optimizer = create_lorafa_optimizer(model, r=4, lora_alpha=8, lr=1e-2)
    if thawed:
        model.set_adapter("default")
    return {"model": model, "peft_config": None, "optimizers": (optimizer, None)}


def two_adapters() -> PeftModel:
    model = get_peft_model(causal_model(), lora(task_type="CAUSAL_LM"))
    model.add_adapter("other", lora(task_type="CAUSAL_LM"))
    model.base_model.set_adapter(["default", "other"])
    return model


def without_layers() -> PeftModel:
    model = ready_model(target_modules=["query"])
    for name in list(lora_layers(model, "default")):
        parent, _, child = f"base_model.model.{name}".rpartition(".")
        setattr(model.get_submodule(parent), child, model.get_submodule(f"base_model.model.{name}").get_base_layer())
    return model


def on_meta() -> nn.Module:
    with torch.device("meta"):
        return causal_model()


class NoLinear(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(9, 2)
