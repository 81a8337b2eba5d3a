"""DoRA: a gate on its whole effect."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from peft.utils.integrations import dequantize_module_weight
from torch import Tensor, nn

from .base import peft_name
from .lora import LoraSite, register_lora_site


@register_lora_site
class DoraSite(LoraSite):
    """
    The DoRA of one layer (https://huggingface.co/papers/2402.09353), whose weight is
    `m * (W + s * B A) / ||W + s * B A||`, row by row.

    PEFT adds to the output of the layer what this weight changes of it, which is what the module of the magnitudes `m`
    computes. A gate multiplies that, so an open one is DoRA, and a closed one is the layer without an adapter.

    Its magnitudes belong to no unit of rank, and a smaller rank would change the norms: it is kept whole or pruned,
    and counts as one unit.
    """

    resizable = False
    shareable = False  # the magnitudes are norms of its own weight

    def __init__(self, name: str, layer: Any, adapter_name: str) -> None:
        super().__init__(name, layer, adapter_name)
        self.rank = 1

    @classmethod
    def fits(cls, layer: Any, adapter_name: str) -> bool:
        return (
            isinstance(layer, LoraLayer)
            and adapter_name in layer.lora_magnitude_vector
            and adapter_name in layer.lora_A
        )

    @property
    def gated(self) -> nn.Module:
        return self.layer.lora_magnitude_vector[self.adapter_name]

    @property
    def parameters(self) -> list[nn.Parameter]:
        return [self.gated.weight, *super().parameters]  # type: ignore[list-item]

    @property
    def matrices(self) -> tuple[nn.Parameter, nn.Parameter]:
        _, down, up = self.parameters
        return down, up

    @property
    def down(self) -> nn.Module:
        return self.layer.lora_A[self.adapter_name]

    @property
    def shape(self) -> tuple[Any, ...]:
        return ("dora", *super().shape)

    def saved_shapes(self, rank: int, adapted: Collection[str] | None = None) -> dict[str, tuple[int, ...]]:
        shapes = super().saved_shapes(self.layer.r[self.adapter_name])
        magnitudes: Any = self.gated.weight
        return {**shapes, f"{peft_name(self.name)}.lora_magnitude_vector": tuple(magnitudes.shape)}

    def fold(self, factor: float) -> None:
        """
        What a layer computes under a gate `g` is `(1 - g) W + g c (W + s * B A)` with `c = m / ||W + s * B A||`. With
        `k = 1 - g + g c`, which is positive, that is the DoRA whose rows of `B` are multiplied by `g c / k`, and whose
        magnitudes are `k` times the new norms. The gradient of these is `1 / g` times what it was, as far as the norms
        stay what they are.
        """
        if factor == 1.0:
            return
        magnitudes: Any = self.gated.weight
        b: Any = self.layer.lora_B[self.adapter_name].weight
        with torch.no_grad():
            c = (magnitudes / self._norms()).flatten().float()
            k = 1.0 - factor + factor * c
            self.multiply(b, (factor * c / k).view(-1, *[1] * (b.dim() - 1)))
            magnitudes.copy_((k.view_as(magnitudes) * self._norms()).to(magnitudes.dtype))
        self.note_folded(magnitudes, factor)

    def _norms(self) -> Tensor:
        """`||W + s * B A||` of each row, as PEFT computes it, in the shape of the magnitudes."""
        layer, name = self.layer, self.adapter_name
        a, b = layer.lora_A[name].weight, layer.lora_B[name].weight
        rank = layer.r[name]
        base = dequantize_module_weight(layer.get_base_layer())
        update = b.reshape(-1, rank) @ a.reshape(rank, -1)
        if base.dim() > 2:  # a convolution
            update = update.reshape(base.shape)
        found: Tensor = self.gated.get_weight_norm(base.to(a.dtype), update, layer.scaling[name])  # type: ignore
        return found

    def obstacle(self) -> str | None:
        return None
