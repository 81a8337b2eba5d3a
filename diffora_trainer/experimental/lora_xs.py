"""
LoRA-XS (https://huggingface.co/papers/2405.17604): a LoRA between the singular vectors of its weight.

Of the weight `W = U S V^T` the first `r` singular vectors are taken, `lora_A = S V^T` and `lora_B = U R`, and of these
the `r x r` matrix `R` alone is trained. It starts at 0 (in the paper: near 0). What is saved is the product `U R`, so
the adapter is plain LoRA for whoever loads it.
"""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from peft.utils.integrations import dequantize_module_weight
from torch import Tensor, nn
from torch.nn import functional
from transformers import TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from ..adapters.lora import LoraSite, register_lora_site
from .rebuilt import RebuiltLora


_TOLERANCE = 1e-3
"""How far a loaded product may lie from the frame, as a part of its largest entry. See [`_tolerance`]."""


class FrozenDown(nn.Module):
    """`lora_A`, which is not trained."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.register_buffer("weight", weight)
        self.weight: Tensor

    def forward(self, value: Tensor) -> Tensor:
        return functional.linear(value, self.weight)


class CoreUp(nn.Module):
    """`lora_B`: the trained core, and frozen directions. In a state dict it is their product, the `weight` of LoRA."""

    bias = None

    def __init__(self, frame: Tensor, rank: int) -> None:
        super().__init__()
        self.register_buffer("frame", frame, persistent=False)
        self.frame: Tensor
        self.core = nn.Parameter(frame.new_zeros(rank, rank))
        self.tolerance = _tolerance(frame.dtype)  # of the core, which grows coarser with what is loaded
        self.register_state_dict_post_hook(_save_product)
        self.register_load_state_dict_pre_hook(_load_product)

    @property
    def weight(self) -> Tensor:
        """The matrix of plain LoRA."""
        return self.frame @ self.core

    def forward(self, value: Tensor) -> Tensor:
        return functional.linear(functional.linear(value, self.core), self.frame)


def _save_product(module: Any, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    state.pop(f"{prefix}core", None)
    state[f"{prefix}weight"] = module.weight.detach()


def _load_product(module: Any, state: dict[str, Any], prefix: str, *args: Any) -> None:
    weight = state.pop(f"{prefix}weight", None)
    if weight is None:
        return
    tolerance = max(_tolerance(module.frame.dtype), _tolerance(weight.dtype))
    frame = module.frame.to(torch.promote_types(module.frame.dtype, torch.float32))
    weight = weight.to(frame)
    core = frame.T @ weight
    if not _close(frame @ core, weight, tolerance):
        raise ValueError(
            f"What is loaded into {prefix!r} is not a LoRA-XS of this model: it does not lie in the singular vectors "
            "of its weight. Please load it into the base model of the run, or without `LoraXS`."
        )
    state[f"{prefix}core"] = core.to(module.core.dtype)
    module.tolerance = tolerance


def _tolerance(dtype: torch.dtype) -> float:
    """
    That of a product or a frame in some dtype: both are rounded, each by up to half of its `eps`. What is not of the
    frame is wrong by about its own size.
    """
    return max(_TOLERANCE, 4 * torch.finfo(dtype).eps)


def _close(found: Tensor, wanted: Tensor, tolerance: float) -> bool:
    return bool((found - wanted).abs().max() <= tolerance * (wanted.abs().max() + 1e-6))


@register_lora_site
class LoraXSSite(LoraSite):
    """The LoRA-XS of one layer. It is kept whole or pruned."""

    shareable = False

    @classmethod
    def fits(cls, layer: Any, adapter_name: str) -> bool:
        if not isinstance(layer, LoraLayer) or adapter_name not in layer.lora_B:
            return False
        return isinstance(layer.lora_B[adapter_name], CoreUp)


class LoraXS(RebuiltLora, ExportableState):
    """
    Trains the adapter of a `LoraConfig` as LoRA-XS, of which `r * r` parameters a module are trained. Pass it in
    `callbacks` when the trainer is built; in a loop of your own call [`attach`] on the `PeftModel` before the
    optimizer is made.

    The adapter is saved as plain LoRA. A run is resumed bit for bit with the same callback, which keeps the cores in
    `trainer_state.json`.

    ```python
    trainer = DiffoRASFTTrainer(model, peft_config=LoraConfig(r=16), callbacks=[LoraXS()], ...)
    ```
    """

    form = CoreUp

    def rebuild(self, name: str, layer: Any, adapter_name: str) -> tuple[nn.Module, nn.Module]:
        rank, like = layer.r[adapter_name], layer.lora_B[adapter_name].weight
        weight = dequantize_module_weight(layer.get_base_layer()).detach().float()
        left, sizes, right = torch.linalg.svd(weight.T if layer.fan_in_fan_out else weight, full_matrices=False)
        if rank > len(sizes):
            raise ValueError(
                f"The LoRA of {name!r} has rank {rank}, but its weight only {len(sizes)}. Please lower `r`."
            )
        down = FrozenDown((sizes[:rank, None] * right[:rank]).contiguous().to(like))
        return down, CoreUp(left[:, :rank].contiguous().to(like), rank)

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps: the cores, which a product does not give back bit for bit."""
        cores = {name: module.core.tolist() for name, module in self.found().items()}
        return {"args": {}, "attributes": {"cores": cores}}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        super().on_train_begin(args, state, control, **kwargs)
        if not state.global_step:
            return
        states: Any = state.stateful_callbacks
        saved = states.get(type(self).__name__, {}).get("attributes", {}).get("cores", {})
        for name, module in self.found().items():
            if name in saved:
                exact = torch.tensor(saved[name], dtype=torch.float64).to(module.core)
                own = module.core.detach().float()
                if _close(exact.float(), own, module.tolerance):  # else other weights were loaded since
                    module.core.data.copy_(exact)
