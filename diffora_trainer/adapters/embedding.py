"""LoRA on embeddings."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from peft.tuners.lora.layer import Embedding
from torch import Tensor, nn

from ..compat.peft import hook_lookup
from .base import Handle, Scale, peft_name
from .lora import LoraSite, register_lora_site


@register_lora_site
class EmbeddingSite(LoraSite):
    """
    The LoRA of an embedding, two bare parameters: what belongs to the tokens is looked up in `lora_embedding_A`, which
    PEFT starts at 0, and multiplied by `lora_embedding_B`. A gate multiplies what was looked up.
    """

    resizable = False
    reads_vectors = False

    @classmethod
    def fits(cls, layer: Any, adapter_name: str) -> bool:
        return isinstance(layer, Embedding) and adapter_name in layer.lora_embedding_A

    @property
    def parameters(self) -> list[nn.Parameter]:
        name = self.adapter_name
        return [self.layer.lora_embedding_B[name], self.layer.lora_embedding_A[name]]

    @property
    def matrices(self) -> tuple[nn.Parameter, nn.Parameter]:
        up, down = self.parameters
        return down, up

    @property
    def num_components(self) -> int:
        return self.rank  # a gate multiplies what was looked up, a number for each

    @property
    def gated(self) -> nn.Module:
        return self.layer

    def attach(self, scale: Scale) -> Handle:
        def gate(rows: Tensor) -> Tensor:
            if list(self.layer.active_adapters) != [self.adapter_name]:  # another adapter's, such as DPO's reference
                return rows
            scaled = scale(self.layer, (), rows)
            return rows if scaled is None else scaled

        return hook_lookup(self.layer, gate)

    @property
    def shape(self) -> tuple[Any, ...]:
        return ("embedding", *(tuple(parameter.shape) for parameter in self.parameters))

    def saved_shapes(self, rank: int, adapted: Collection[str] | None = None) -> dict[str, tuple[int, ...]]:
        b, a = (tuple(parameter.shape) for parameter in self.parameters)
        name = peft_name(self.name)
        return {f"{name}.lora_embedding_A": (rank, a[1]), f"{name}.lora_embedding_B": (b[0], rank)}

    def share(self, other: LoraSite) -> None:
        for matrix in ("lora_embedding_A", "lora_embedding_B"):
            getattr(self.layer, matrix)[self.adapter_name] = getattr(other.layer, matrix)[other.adapter_name]

    def obstacle(self) -> str | None:
        if self.adapter_name in self.layer.lora_variant:
            return (
                "PEFT multiplies the output of an embedding with DoRA by its magnitudes in place, so there is nothing "
                "that a gate could multiply. Please leave it out with `exclude_modules`, or use plain LoRA."
            )
        return None
